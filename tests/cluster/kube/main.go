// One static binary that is etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kubectl or fakelet, by the name it is called by.
// Nothing is downloaded but Go modules, and the components share most packages, so one compile and one link make them all.
// Each component is still a process of its own: a test can kill the API server and keep etcd.
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/etcdmain"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectl "k8s.io/kubectl/pkg/cmd"
	kubectlutil "k8s.io/kubectl/pkg/cmd/util"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	manager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
)

func main() {
	commands := map[string]func() *cobra.Command{
		"kube-apiserver":          apiserver.NewAPIServerCommand,
		"kube-controller-manager": manager.NewControllerManagerCommand,
		"kube-scheduler":          func() *cobra.Command { return scheduler.NewSchedulerCommand() },
	}
	switch name := filepath.Base(os.Args[0]); name {
	case "etcd":
		etcdmain.Main(os.Args)
	case "kubectl":
		if err := cli.RunNoErrOutput(kubectl.NewDefaultKubectlCommand()); err != nil {
			kubectlutil.CheckErr(err)
		}
	case "fakelet":
		if err := runFakelet(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, "fakelet:", err)
			os.Exit(1)
		}
	default:
		command, known := commands[name]
		if !known {
			fmt.Fprintln(os.Stderr, "call it etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kubectl or fakelet")
			os.Exit(2)
		}
		os.Exit(cli.Run(command()))
	}
}
