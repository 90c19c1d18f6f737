package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"k8s.io/component-base/version"
)

// Execute runs the command line args (without the program's name) and returns the exit status: 0, or 1 after an error was
// printed, or 2 where the command line itself was wrong. A program that is called as "kubectl" is kubectl.
func Execute(ctx context.Context, args []string, s System) int {
	if filepath.Base(os.Args[0]) == "kubectl" {
		return runKubectl(DefaultName, "", args, true)
	}
	root := newRoot(s)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	var status exitStatus
	switch {
	case err == nil:
		return 0
	case errors.As(err, &status):
		return int(status)
	}
	fmt.Fprintln(os.Stderr, "knarr: "+strings.TrimRight(err.Error(), "\n"))
	var usage usageError
	if errors.As(err, &usage) {
		return 2
	}
	return 1
}

// exitStatus ends the program with a status where everything has been said.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// usageError is a wrong command line.
type usageError struct{ error }

// where says which cluster a command is about.
type where struct {
	name string
	root string
}

func (w *where) flags(c *cobra.Command) {
	name := DefaultName
	if env := os.Getenv("KNARR_NAME"); env != "" {
		name = env
	}
	c.Flags().StringVar(&w.name, "name", name, "name of the cluster")
	c.Flags().StringVar(&w.root, "data-dir", "", "directory that holds the clusters' directories (default: that of the running cluster, else "+DefaultRoot+")")
}

func (w *where) cluster() (*cluster, error) { return findCluster(w.name, w.root) }

// group is what a command does that only has commands below it.
func group(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return c.Help()
	}
	return usageError{fmt.Errorf("unknown command %q (see `%s --help`)", args[0], c.CommandPath())}
}

func newRoot(s System) *cobra.Command {
	root := &cobra.Command{
		Use:   "knarr",
		Short: "A whole Kubernetes in one program",
		Long: `knarr is Kubernetes in one program: ` + "`knarr up`" + ` starts a cluster on this machine, and kubectl, Helm and every
client library work with it as with any other.`,
		Version:       version.Get().GitVersion,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs,
		RunE:          group,
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w (see `%s --help`)", err, c.CommandPath())}
	})
	root.CompletionOptions.HiddenDefaultCmd = true
	root.AddCommand(newUp(), newDown(), newStatus(), newKubeconfig(), newKubectl(), newImage(), newToken(), newCert(), newSecretsEncrypt(),
		newServer(s), newAgent(s))
	return root
}
