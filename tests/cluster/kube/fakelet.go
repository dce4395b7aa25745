package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"hash/fnv"
	"os"
	"strconv"
	"time"

	coordination "k8s.io/api/coordination/v1"
	core "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/util/workqueue"
)

// fakelet plays the kubelet of every node with the label fake-node=true: the node is Ready and heartbeats, a pod bound to it runs
// and is Ready after --start-delay, a deleted pod goes away. Annotations let a test have faults:
//
//	on a pod:  fake-node/ready: never     Running, but not Ready
//	           fake-node/exit: "137"      its first container ends with this code
//	on a node: fake-node/silent: "true"   power cut: no heartbeats, nothing on it changes any more
//
// It is built from packages that the API server needs anyway, so it adds nothing to the build.
const (
	nodeLabel        = "fake-node"
	readyAnnotation  = "fake-node/ready"
	exitAnnotation   = "fake-node/exit"
	silentAnnotation = "fake-node/silent"
	heartbeat        = 15 * time.Second // a third of the controller manager's grace period in cluster.py
	workers          = 16
)

type fakelet struct {
	client kubernetes.Interface
	nodes  cache.Store
	pods   cache.Store
	queue  workqueue.TypedRateLimitingInterface[string] // "node/NAME", "pod/NAMESPACE/NAME"
	delay  time.Duration
}

func runFakelet(args []string) error {
	flags := flag.NewFlagSet("fakelet", flag.ContinueOnError)
	kubeconfig := flags.String("kubeconfig", os.Getenv("KUBECONFIG"), "who to be")
	delay := flags.Duration("start-delay", 0, "from bound to Ready")
	if err := flags.Parse(args); err != nil {
		return err
	}
	config, err := clientcmd.BuildConfigFromFlags("", *kubeconfig)
	if err != nil {
		return err
	}
	config.QPS = -1
	config.ContentType = "application/vnd.kubernetes.protobuf"
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	factory := informers.NewSharedInformerFactory(client, 0)
	nodes, pods := factory.Core().V1().Nodes().Informer(), factory.Core().V1().Pods().Informer()
	f := &fakelet{client: client, nodes: nodes.GetStore(), pods: pods.GetStore(), delay: *delay,
		queue: workqueue.NewTypedRateLimitingQueue(workqueue.DefaultTypedControllerRateLimiter[string]())}
	enqueue := func(kind string) cache.ResourceEventHandlerFuncs {
		add := func(object any) {
			if key, err := cache.MetaNamespaceKeyFunc(object); err == nil {
				f.queue.Add(kind + key)
			}
		}
		return cache.ResourceEventHandlerFuncs{AddFunc: add, UpdateFunc: func(_, object any) { add(object) }}
	}
	if _, err := nodes.AddEventHandler(enqueue("node/")); err != nil {
		return err
	}
	if _, err := nodes.AddEventHandler(cache.ResourceEventHandlerFuncs{UpdateFunc: f.comesBack}); err != nil {
		return err
	}
	if _, err := pods.AddEventHandler(enqueue("pod/")); err != nil {
		return err
	}
	ctx := context.Background()
	factory.Start(ctx.Done())
	factory.WaitForCacheSync(ctx.Done())
	for range workers {
		go f.work(ctx)
	}
	for range time.Tick(heartbeat) {
		for _, node := range f.nodes.ListKeys() {
			f.queue.Add("node/" + node)
		}
	}
	return nil
}

func (f *fakelet) work(ctx context.Context) {
	for {
		key, quit := f.queue.Get()
		if quit {
			return
		}
		var err error
		if kind, name := key[:3], key[4:]; kind == "pod" {
			err = f.pod(ctx, key, name)
		} else {
			err = f.node(ctx, key[len("node/"):])
		}
		if err != nil && !errors.IsNotFound(err) {
			fmt.Fprintln(os.Stderr, key, err)
			f.queue.AddRateLimited(key)
		} else {
			f.queue.Forget(key)
		}
		f.queue.Done(key)
	}
}

// lively says whether this is a node of ours that has power.
func (f *fakelet) lively(name string) (*core.Node, bool) {
	object, exists, _ := f.nodes.GetByKey(name)
	if !exists {
		return nil, false
	}
	node := object.(*core.Node)
	return node, node.Labels[nodeLabel] == "true" && node.Annotations[silentAnnotation] != "true"
}

// comesBack does what happened to a node's pods while it had no power, as a kubelet that starts does.
func (f *fakelet) comesBack(old, now any) {
	node := now.(*core.Node)
	if old.(*core.Node).Annotations[silentAnnotation] != "true" || node.Annotations[silentAnnotation] == "true" {
		return
	}
	for _, object := range f.pods.List() {
		if pod := object.(*core.Pod); pod.Spec.NodeName == node.Name {
			f.queue.Add("pod/" + pod.Namespace + "/" + pod.Name)
		}
	}
}

func (f *fakelet) node(ctx context.Context, name string) error {
	node, lively := f.lively(name)
	if !lively {
		return nil
	}
	ready := false
	for _, c := range node.Status.Conditions {
		ready = ready || (c.Type == core.NodeReady && c.Status == core.ConditionTrue)
	}
	if !ready {
		now := meta.Now()
		condition := core.NodeCondition{Type: core.NodeReady, Status: core.ConditionTrue, Reason: "FakeletReady",
			LastHeartbeatTime: now, LastTransitionTime: now}
		if err := f.patchStatus(ctx, "", name, core.NodeStatus{Conditions: []core.NodeCondition{condition}}); err != nil {
			return err
		}
	}
	leases := f.client.CoordinationV1().Leases(core.NamespaceNodeLease)
	now, seconds := meta.NowMicro(), int32(40)
	spec := coordination.LeaseSpec{HolderIdentity: &name, LeaseDurationSeconds: &seconds, RenewTime: &now}
	patch, _ := json.Marshal(map[string]any{"spec": spec})
	_, err := leases.Patch(ctx, name, types.MergePatchType, patch, meta.PatchOptions{})
	if errors.IsNotFound(err) {
		_, err = leases.Create(ctx, &coordination.Lease{ObjectMeta: meta.ObjectMeta{Name: name}, Spec: spec}, meta.CreateOptions{})
	}
	return err
}

func (f *fakelet) pod(ctx context.Context, queued, key string) error {
	object, exists, _ := f.pods.GetByKey(key)
	if !exists {
		return nil
	}
	pod := object.(*core.Pod)
	if _, lively := f.lively(pod.Spec.NodeName); !lively {
		return nil
	}
	if pod.DeletionTimestamp != nil {
		now := int64(0)
		return f.client.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, meta.DeleteOptions{GracePeriodSeconds: &now})
	}
	if wait := f.delay - time.Since(scheduled(pod)); wait > 0 {
		f.queue.AddAfter(queued, wait)
		return nil
	}
	want := statusOf(pod)
	if pod.Status.Phase == want.Phase && podReady(pod.Status) == podReady(want) {
		return nil
	}
	return f.patchStatus(ctx, pod.Namespace, pod.Name, want)
}

// scheduled is when the scheduler bound the pod; a pod that was created bound has no such condition.
func scheduled(pod *core.Pod) time.Time {
	for _, c := range pod.Status.Conditions {
		if c.Type == core.PodScheduled {
			return c.LastTransitionTime.Time
		}
	}
	return pod.CreationTimestamp.Time
}

func podReady(status core.PodStatus) bool {
	for _, c := range status.Conditions {
		if c.Type == core.PodReady {
			return c.Status == core.ConditionTrue
		}
	}
	return false
}

func statusOf(pod *core.Pod) core.PodStatus {
	now := meta.Now()
	status := core.PodStatus{Phase: core.PodRunning, StartTime: &now, HostIP: "127.0.0.1"}
	hash := fnv.New32a()
	hash.Write([]byte(pod.UID))
	status.PodIP = fmt.Sprintf("10.245.%d.%d", hash.Sum32()>>8&255, hash.Sum32()&255)
	status.PodIPs = []core.PodIP{{IP: status.PodIP}}
	exit, failed := pod.Annotations[exitAnnotation]
	ready := !failed && pod.Annotations[readyAnnotation] != "never"
	for i, container := range pod.Spec.Containers {
		s := core.ContainerStatus{Name: container.Name, Image: container.Image, Ready: ready, Started: &ready}
		if failed && i == 0 {
			code, _ := strconv.Atoi(exit)
			s.State.Terminated = &core.ContainerStateTerminated{ExitCode: int32(code), Reason: "Error", StartedAt: now, FinishedAt: now}
			status.Phase = core.PodFailed
		} else {
			s.State.Running = &core.ContainerStateRunning{StartedAt: now}
		}
		status.ContainerStatuses = append(status.ContainerStatuses, s)
	}
	truth := map[bool]core.ConditionStatus{true: core.ConditionTrue, false: core.ConditionFalse}
	for _, t := range []core.PodConditionType{core.PodInitialized, core.ContainersReady, core.PodReady} {
		status.Conditions = append(status.Conditions,
			core.PodCondition{Type: t, Status: truth[ready || t == core.PodInitialized], LastTransitionTime: now})
	}
	return status
}

// patchStatus of a pod, or of a node when namespace is empty. Strategic: conditions of others stay.
func (f *fakelet) patchStatus(ctx context.Context, namespace, name string, status any) error {
	patch, err := json.Marshal(map[string]any{"status": status})
	if err != nil {
		return err
	}
	if namespace == "" {
		_, err = f.client.CoreV1().Nodes().Patch(ctx, name, types.StrategicMergePatchType, patch, meta.PatchOptions{}, "status")
	} else {
		_, err = f.client.CoreV1().Pods(namespace).Patch(ctx, name, types.StrategicMergePatchType, patch, meta.PatchOptions{}, "status")
	}
	return err
}
