package cli

import (
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	componentcli "k8s.io/component-base/cli"
	kubectlcmd "k8s.io/kubectl/pkg/cmd"
	kubectlutil "k8s.io/kubectl/pkg/cmd/util"
)

func newKubeconfig() *cobra.Command {
	var w where
	c := &cobra.Command{
		Use:   "kubeconfig",
		Short: "Print the path of the admin's kubeconfig",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := w.cluster()
			if err != nil {
				return err
			}
			path := AdminKubeconfig(c.dir)
			if _, err := os.Stat(path); err != nil {
				return c.errNone()
			}
			fmt.Fprintln(cmd.OutOrStdout(), path)
			return nil
		},
	}
	w.flags(c)
	return c
}

// newKubectl only stands in the help: its arguments are kubectl's, so that cobra must not read them.
func newKubectl() *cobra.Command {
	return &cobra.Command{
		Use:   "kubectl [--name NAME] ...",
		Short: "Upstream's kubectl, on the cluster",
		Long: `Upstream's kubectl. It talks to the cluster's admin kubeconfig unless KUBECONFIG or --kubeconfig says otherwise.
A --name NAME before kubectl's own arguments (or KNARR_NAME) chooses the cluster.`,
		DisableFlagParsing: true,
		RunE: func(_ *cobra.Command, args []string) error {
			name := DefaultName
			if env := os.Getenv("KNARR_NAME"); env != "" {
				name = env
			}
			var root string
			name, args = leadingFlag("--name", name, args)
			root, args = leadingFlag("--data-dir", root, args)
			if status := runKubectl(name, root, args, false); status != 0 {
				return exitStatus(status)
			}
			return nil
		},
	}
}

// leadingFlag takes a flag off the front of args.
func leadingFlag(flag, value string, args []string) (string, []string) {
	switch {
	case len(args) > 1 && args[0] == flag:
		return args[1], args[2:]
	case len(args) > 0 && strings.HasPrefix(args[0], flag+"="):
		return strings.TrimPrefix(args[0], flag+"="), args[1:]
	}
	return value, args
}

// runKubectl becomes kubectl. As a kubectl of its own it respects ~/.kube/config, as `knarr kubectl` the cluster comes
// first. An error of kubectl's ends the process, as it does in kubectl.
func runKubectl(name, root string, args []string, own bool) int {
	signal.Reset(os.Interrupt, syscall.SIGTERM) // they end kubectl, whatever main does with them
	if os.Getenv("KUBECONFIG") == "" && !(own && homeKubeconfig()) {
		if c, err := findCluster(name, root); err == nil {
			path := AdminKubeconfig(c.dir)
			if _, err := os.Stat(path); err == nil || !own {
				os.Setenv("KUBECONFIG", path)
			}
		}
	}
	os.Args = append([]string{"kubectl"}, args...) // kubectl looks for plugins in os.Args
	command := kubectlcmd.NewDefaultKubectlCommand()
	if err := componentcli.RunNoErrOutput(command); err != nil {
		kubectlutil.CheckErr(err)
	}
	return 0
}

func homeKubeconfig() bool {
	home, err := os.UserHomeDir()
	if err != nil {
		return false
	}
	_, err = os.Stat(filepath.Join(home, ".kube", "config"))
	return err == nil
}
