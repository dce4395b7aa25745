package main

import (
	"context"
	"encoding/binary"
	"flag"
	"io"
	"net"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	core "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
)

// clusterdns answers what pods ask of cluster DNS, out of Services and EndpointSlices as they are now:
//
//	SERVICE.NAMESPACE.svc.cluster.local       its cluster IP; of a headless one the addresses of its ready endpoints
//	HOSTNAME.SERVICE.NAMESPACE.svc.cluster.local  that endpoint of a headless one (publishNotReadyAddresses makes all of them ready)
//
// Anything else does not exist, as nothing outside is reachable. IPv4 only; other types of a name that exists have no records. Like
// fakelet it consists of packages that the API server needs anyway: CoreDNS would be a build of its own.
const (
	dnsZone = ".svc.cluster.local."
	dnsTTL  = 2 // seconds: a pod that was replaced is found under its new name at once, and nobody caches its absence
)

type clusterDNS struct {
	services cache.Store
	slices   cache.Indexer // by "NAMESPACE/SERVICE"
}

func runClusterDNS(args []string) error {
	flags := flag.NewFlagSet("clusterdns", flag.ContinueOnError)
	kubeconfig := flags.String("kubeconfig", "", "who to be")
	listen := flags.String("listen", "127.0.0.1:53", "UDP and TCP")
	if err := flags.Parse(args); err != nil {
		return err
	}
	config, err := clientcmd.BuildConfigFromFlags("", *kubeconfig)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	factory := informers.NewSharedInformerFactory(client, 0)
	slices := factory.Discovery().V1().EndpointSlices().Informer()
	byService := cache.Indexers{"service": func(object any) ([]string, error) {
		slice := object.(*discovery.EndpointSlice)
		return []string{slice.Namespace + "/" + slice.Labels[discovery.LabelServiceName]}, nil
	}}
	if err := slices.AddIndexers(byService); err != nil {
		return err
	}
	d := &clusterDNS{services: factory.Core().V1().Services().Informer().GetStore(), slices: slices.GetIndexer()}
	factory.Start(context.Background().Done())
	factory.WaitForCacheSync(context.Background().Done())
	tcp, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	udp, err := net.ListenPacket("udp", *listen)
	if err != nil {
		return err
	}
	go d.serveTCP(tcp)
	return d.serveUDP(udp)
}

func (d *clusterDNS) serveUDP(socket net.PacketConn) error {
	query := make([]byte, 1500)
	for {
		n, from, err := socket.ReadFrom(query)
		if err != nil {
			return err
		}
		if answer := d.answer(query[:n]); answer != nil {
			socket.WriteTo(answer, from) //nolint:errcheck // as lost as any datagram
		}
	}
}

func (d *clusterDNS) serveTCP(socket net.Listener) {
	for {
		connection, err := socket.Accept()
		if err != nil {
			return
		}
		go func() {
			defer connection.Close()
			connection.SetDeadline(time.Now().Add(10 * time.Second)) //nolint:errcheck
			for {
				var size uint16
				if binary.Read(connection, binary.BigEndian, &size) != nil {
					return
				}
				query := make([]byte, size)
				if _, err := io.ReadFull(connection, query); err != nil {
					return
				}
				answer := d.answer(query)
				if answer == nil || binary.Write(connection, binary.BigEndian, uint16(len(answer))) != nil {
					return
				}
				if _, err := connection.Write(answer); err != nil {
					return
				}
			}
		}()
	}
}

func (d *clusterDNS) answer(query []byte) []byte {
	var parser dnsmessage.Parser
	header, err := parser.Start(query)
	if err != nil || header.Response {
		return nil
	}
	question, err := parser.Question()
	if err != nil {
		return nil
	}
	addresses, known := d.lookup(strings.ToLower(question.Name.String()))
	reply := dnsmessage.Header{ID: header.ID, Response: true, Authoritative: true, RecursionDesired: header.RecursionDesired, RecursionAvailable: true}
	if !known {
		reply.RCode = dnsmessage.RCodeNameError
	}
	builder := dnsmessage.NewBuilder(nil, reply)
	builder.EnableCompression()
	if builder.StartQuestions() != nil || builder.Question(question) != nil || builder.StartAnswers() != nil {
		return nil
	}
	if question.Type == dnsmessage.TypeA {
		for _, address := range addresses {
			head := dnsmessage.ResourceHeader{Name: question.Name, Class: dnsmessage.ClassINET, TTL: dnsTTL}
			if builder.AResource(head, dnsmessage.AResource{A: address.As4()}) != nil {
				return nil
			}
		}
	}
	answer, err := builder.Finish()
	if err != nil {
		return nil
	}
	return answer
}

// lookup says whether the name exists, and its addresses.
func (d *clusterDNS) lookup(name string) ([]netip.Addr, bool) {
	inner, ours := strings.CutSuffix(name, dnsZone)
	if !ours {
		return nil, false
	}
	labels := strings.Split(inner, ".")
	host := ""
	if len(labels) == 3 {
		host, labels = labels[0], labels[1:]
	}
	if len(labels) != 2 {
		return nil, false
	}
	key := labels[1] + "/" + labels[0]
	object, exists, _ := d.services.GetByKey(key)
	if !exists {
		return nil, false
	}
	if service := object.(*core.Service); service.Spec.ClusterIP != core.ClusterIPNone {
		address, err := netip.ParseAddr(service.Spec.ClusterIP)
		if err != nil || host != "" {
			return nil, false
		}
		return []netip.Addr{address}, true
	}
	var addresses []netip.Addr
	slices, _ := d.slices.ByIndex("service", key)
	for _, slice := range slices {
		for _, endpoint := range slice.(*discovery.EndpointSlice).Endpoints {
			if endpoint.Conditions.Ready != nil && !*endpoint.Conditions.Ready {
				continue
			}
			if host != "" && (endpoint.Hostname == nil || *endpoint.Hostname != host) {
				continue
			}
			for _, text := range endpoint.Addresses {
				if address, err := netip.ParseAddr(text); err == nil && address.Is4() {
					addresses = append(addresses, address)
				}
			}
		}
	}
	return addresses, host == "" || len(addresses) > 0
}
