package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"knarr/system/pki"
)

// authority opens the cluster's certificates for a command.
func (w *where) authority() (*pki.Authority, error) {
	c, err := w.cluster()
	if err != nil {
		return nil, err
	}
	a, err := pki.Open(TLSDir(c.dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, c.errNone()
	}
	return a, err
}

func newToken() *cobra.Command {
	var w where
	c := &cobra.Command{
		Use:   "token",
		Short: "Print the token that further nodes join with",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			a, err := w.authority()
			if err != nil {
				return err
			}
			t, err := a.JoinToken()
			if err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), t)
			return nil
		},
	}
	w.flags(c)
	c.AddCommand(newTokenRotate(), newTokenForget())
	return c
}

func newTokenRotate() *cobra.Command {
	var w where
	c := &cobra.Command{
		Use:   "rotate",
		Short: "Make a new token; the old one is refused from now on (nodes that joined stay)",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			a, err := w.authority()
			if err != nil {
				return err
			}
			if err := a.RotateJoinToken(); err != nil {
				return err
			}
			t, err := a.JoinToken()
			if err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), t)
			return nil
		},
	}
	w.flags(c)
	return c
}

func newTokenForget() *cobra.Command {
	var w where
	c := &cobra.Command{
		Use:   "forget NODE",
		Short: "Let another machine join under the name of a node that is gone",
		Args:  cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			a, err := w.authority()
			if err != nil {
				return err
			}
			return a.ForgetNode(args[0])
		},
	}
	w.flags(c)
	return c
}

// certificates lists what lies in the cluster's directories.
func (c *cluster) certificates() ([]pki.Certificate, error) {
	nodes, err := c.nodeNames()
	if err != nil {
		return nil, err
	}
	dirs := []string{c.dir, TLSDir(c.dir)}
	for _, n := range nodes {
		dirs = append(dirs, filepath.Join(NodeDir(c.dir, n), "tls"))
	}
	return pki.Expiries(dirs...)
}

func newCert() *cobra.Command {
	var w where
	c := &cobra.Command{
		Use:   "cert",
		Short: "List the cluster's certificates and when they end",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := w.cluster()
			if err != nil {
				return err
			}
			list, err := c.certificates()
			if err != nil {
				return err
			}
			if len(list) == 0 {
				return c.errNone()
			}
			t := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 3, ' ', 0)
			fmt.Fprintln(t, "SUBJECT\tENDS\tRENEWED\tFILE")
			for _, l := range list {
				renewed := "never (authority)"
				if !l.RenewAt.IsZero() {
					renewed = l.RenewAt.Format(time.DateOnly)
				}
				fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", l.Subject, l.NotAfter.Format(time.DateOnly), renewed, l.Name)
			}
			return t.Flush()
		},
	}
	w.flags(c)
	return c
}
