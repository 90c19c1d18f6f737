package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"knarr/network/dns"
	"knarr/network/nodens"
	"knarr/network/pod"
	"knarr/network/service"
	"knarr/network/sysctl"
)

// Bounds of stopping.
const (
	// stopTimeout is how long a part of ours may take to end after SIGTERM.
	stopTimeout = 10 * time.Second
	// defaultGrace is what the processes of containers get.
	defaultGrace = 3 * time.Second
)

func newDown() *cobra.Command {
	var w where
	var purge bool
	var grace time.Duration
	c := &cobra.Command{
		Use:   "down",
		Short: "Stop the cluster; containers, rules, links, mounts and cgroups are gone then",
		Long: `Stop the cluster and take away everything that it made on this machine: processes, containers, firewall rules, links,
network namespaces, mounts and cgroups. Its data stays, so that the next ` + "`knarr up`" + ` goes on; with --purge the data goes too.
It works by what is there, also when parts of the cluster are dead.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if os.Geteuid() != 0 {
				return errNotRoot
			}
			c, err := w.cluster()
			if err != nil {
				return usageError{err}
			}
			l, err := c.hold()
			if err != nil {
				return err
			}
			p := newProgress(cmd.ErrOrStderr())
			known := exists(c.dir) || len(c.cgroups()) > 0 || exists(c.netDir())
			err = c.tearDownGrace(cmd.Context(), purge, grace, p)
			p.done()
			l.Remove()
			c.unmark()
			switch {
			case err != nil:
				return err
			case !known:
				return c.errNone()
			case purge:
				fmt.Fprintf(cmd.OutOrStdout(), "cluster %s is gone, with its data\n", c.name)
			default:
				fmt.Fprintf(cmd.OutOrStdout(), "cluster %s is down; its data is in %s (--purge removes it)\n", c.name, c.dir)
			}
			return nil
		},
	}
	w.flags(c)
	c.Flags().BoolVar(&purge, "purge", false, "remove the cluster's data too")
	c.Flags().DurationVar(&grace, "grace", defaultGrace, "how long containers may take to end")
	return c
}

func (c *cluster) tearDown(purge bool, p *progress) error {
	return c.tearDownGrace(context.Background(), purge, defaultGrace, p)
}

// tearDownGrace takes away everything that the cluster has on this machine, from the top down: who makes new things ends
// first. A step that fails does not keep the later ones from being done.
func (c *cluster) tearDownGrace(ctx context.Context, purge bool, grace time.Duration, p *progress) error {
	r, err := c.load()
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !purge {
		return err
	}
	nodes, err := c.nodeNames()
	if err != nil {
		return err
	}
	procs, err := c.processes()
	if err != nil {
		return err
	}
	var errs []error
	step := func(what string, f func() error) {
		p.now("%s", what)
		if err := f(); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", what, err))
		}
	}
	step("stopping agents and server", func() error { return stopProcesses(ctx, pids(procs, false), stopTimeout) })
	step("stopping containers", func() error { return c.stopContainers(ctx, grace) })
	step("stopping shims", func() error {
		procs, err := c.processes() // again: who has ended since may have started one
		if err != nil {
			return err
		}
		return stopProcesses(ctx, pids(procs, true), stopTimeout)
	})
	step("removing the network", func() error { return c.removeNetwork(r, nodes) })
	step("removing mounts", func() error { return errors.Join(unmountBelow(c.dir), unmountBelow(c.netDir())) })
	step("removing cgroups", func() error { return removeCgroups(ctx, c.cgroups()) })
	step("forgetting containers", func() error { return c.forgetContainers(nodes) })
	os.RemoveAll(c.netDir())
	os.Remove(filepath.Dir(c.netDir()))
	os.Remove(sysctl.DefaultDir)
	os.Remove(filepath.Join(c.run, c.name))
	if purge {
		step("removing data", c.removeData)
	}
	return errors.Join(errs...)
}

// pids picks the shims, or all others.
func pids(procs []process, shims bool) []int {
	var out []int
	for _, p := range procs {
		if (p.Name == "shim") == shims {
			out = append(out, p.PID)
		}
	}
	return out
}

// removeNetwork takes away what the network packages made in this machine's own namespace; further nodes' namespaces go
// as a whole.
func (c *cluster) removeNetwork(r record, nodes []string) error {
	o := c.netOptions(r.NodeCIDR)
	inside, err := nodens.List(o)
	errs := []error{err}
	apart := map[string]bool{}
	for _, i := range inside {
		apart[NodeName(c.name, i)] = true
	}
	other, err := c.neighbour()
	errs = append(errs, err)
	for _, n := range nodes {
		if apart[n] {
			continue
		}
		settings := sysctl.Recorder{Dir: sysctl.DefaultDir, Owner: c.name}
		errs = append(errs, pod.Purge(pod.Options{NodeName: n, Cluster: c.name, StateDir: PodNetworkDir(c.dir, n), ClusterCIDRs: prefixes(r.PodCIDR), Sysctl: settings}))
		if other == "" { // the table of rules is the machine's, whichever cluster runs
			errs = append(errs, service.Purge(service.Options{NodeName: n, ServiceCIDRs: prefixes(r.ServiceCIDR), Sysctl: settings}))
			if address, err := netip.ParseAddr(r.ClusterDNS); err == nil {
				errs = append(errs, dns.Purge(dns.Options{Addresses: []netip.Addr{address}}))
			}
		}
	}
	return errors.Join(append(errs, nodens.Purge(o))...)
}

// forgetContainers removes what the nodes remember of sandboxes and containers, which are gone: the next `up` makes new
// ones, as after a restart of the machine. Data, images and logs stay.
func (c *cluster) forgetContainers(nodes []string) error {
	var errs []error
	for _, n := range nodes {
		os.Remove(AgentSocket(c.dir, n))
		for _, dir := range []string{NodeRuntimeDir(c.dir, n), PodNetworkDir(c.dir, n)} {
			errs = append(errs, removeTree(dir))
		}
	}
	return errors.Join(errs...)
}

// prefixes is the list of one recorded range, empty where none was.
func prefixes(s string) []netip.Prefix {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return nil
	}
	return []netip.Prefix{p}
}

// removeData deletes the cluster's directory.
func (c *cluster) removeData() error {
	if err := removeTree(c.dir); err != nil {
		return err
	}
	if filepath.Dir(c.dir) == DefaultRoot {
		os.Remove(DefaultRoot) // where it is empty
	}
	return nil
}

// removeTree deletes a directory. Whatever is still mounted below it may be a directory of somebody else, and stays.
func removeTree(dir string) error {
	left, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	if len(left) > 0 {
		return fmt.Errorf("%s is still mounted: unmount it and try again", left[0])
	}
	return os.RemoveAll(dir)
}
