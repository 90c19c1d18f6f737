package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	watchtools "k8s.io/client-go/tools/watch"

	"knarr/network/nodens"
	"knarr/network/sysctl"
	"knarr/system/pki"
)

// defaultUpTimeout bounds how long `up` waits for the cluster.
const defaultUpTimeout = 2 * time.Minute

// upFlags are the flags of `up`.
type upFlags struct {
	where
	rangeFlags
	nodes   int
	timeout time.Duration
	set     func(flag string) bool // whether the user gave it
}

func newUp() *cobra.Command {
	var u upFlags
	c := &cobra.Command{
		Use:   "up",
		Short: "Start a cluster in the background and return when every node is Ready",
		Long: `Start a cluster in the background and return when every node is Ready.

The flags of upstream's API server are taken, too (` + "`knarr server --help`" + ` lists them). They are remembered: a later start has
them without being told.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			u.set = cmd.Flags().Changed
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return u.run(ctx, cmd)
		},
	}
	u.where.flags(c)
	u.rangeFlags.flags(c)
	passedOn(c, &u.APIFlags)
	c.Flags().IntVar(&u.nodes, "nodes", 1, "nodes on this machine: the server's own, and each further one in a network namespace of its own")
	c.Flags().DurationVar(&u.timeout, "timeout", defaultUpTimeout, "how long to wait for the cluster")
	return c
}

// starter is one run of `up`.
type starter struct {
	*cluster
	record
	progress *progress
	fresh    bool // the cluster's directory did not exist before
	cold     bool // no process of the cluster was alive before
	children []*child
	madeNS   []int // node namespaces that this run made
}

func (u *upFlags) run(ctx context.Context, cmd *cobra.Command) error {
	if os.Geteuid() != 0 {
		return errNotRoot
	}
	c, err := u.cluster()
	if err != nil {
		return usageError{err}
	}
	r, fresh, err := u.merge(c)
	if err != nil {
		return err
	}
	if _, err := r.config(c.dir); err != nil {
		return err
	}
	if err := checkArgs(r.APIFlags); err != nil {
		return err
	}
	if _, err := findShim(""); err != nil {
		return err
	}
	l, err := c.hold()
	if err != nil {
		return err
	}
	s := &starter{cluster: c, record: r, progress: newProgress(cmd.ErrOrStderr()), fresh: fresh}
	defer func() {
		s.progress.done()
		l.Remove()
		os.Remove(c.run) // where nothing runs, nothing stays
		os.Remove(filepath.Dir(c.run))
	}()
	ctx, cancel := context.WithTimeoutCause(ctx, u.timeout, fmt.Errorf("not within --timeout %v", u.timeout))
	defer cancel()
	begin := time.Now()
	if err := s.start(ctx); err != nil {
		s.progress.now("cleaning up after the failed start")
		return errors.Join(err, s.undo())
	}
	fmt.Fprintf(cmd.OutOrStdout(), "cluster %s is ready after %.1f s: %d nodes, kubeconfig %s\n",
		c.name, time.Since(begin).Seconds(), r.Nodes, AdminKubeconfig(c.dir))
	return nil
}

// merge joins the flags with what the cluster was made with. What cannot change later is an error.
func (u *upFlags) merge(c *cluster) (r record, fresh bool, err error) {
	r = u.record
	r.Name, r.Nodes = c.name, u.nodes
	if r.RegistryConfigPath, err = absolute(r.RegistryConfigPath); err != nil {
		return r, false, err
	}
	if r.Nodes < 1 || r.Nodes > MaxNodes {
		return r, false, usageError{fmt.Errorf("--nodes %d: 1 to %d are possible", r.Nodes, MaxNodes)}
	}
	old, err := c.load()
	if errors.Is(err, fs.ErrNotExist) {
		return r, !exists(c.dir), nil
	}
	if err != nil {
		return r, false, err
	}
	for _, f := range []struct {
		flag   string
		is, to *string
		fixed  bool
	}{
		{"bind-address", &old.Bind, &r.Bind, false}, {"pod-cidr", &old.PodCIDR, &r.PodCIDR, true},
		{"service-cidr", &old.ServiceCIDR, &r.ServiceCIDR, true}, {"node-cidr", &old.NodeCIDR, &r.NodeCIDR, true},
		{"cluster-dns", &old.ClusterDNS, &r.ClusterDNS, true}, {"registry-config-path", &old.RegistryConfigPath, &r.RegistryConfigPath, false},
	} {
		if u.set(f.flag) && f.fixed && *f.is != *f.to {
			return r, false, usageError{fmt.Errorf("cluster %q was made with --%s %s: that cannot change (`knarr down --purge` first)", c.name, f.flag, *f.is)}
		}
		if !u.set(f.flag) && *f.is != "" {
			*f.to = *f.is
		}
	}
	for _, f := range []struct {
		flag   string
		is, to *int
	}{{"port", &old.Port, &r.Port}, {"kubelet-port", &old.KubeletPort, &r.KubeletPort}, {"nodes", &old.Nodes, &r.Nodes}} {
		if !u.set(f.flag) {
			*f.to = *f.is
		}
	}
	r.APIFlags = mergeArgs(old.APIFlags, r.APIFlags)
	if !u.set("tls-san") {
		r.ServerNames = old.ServerNames
	}
	return r, false, nil
}

// start brings up what is missing, in order: directory, node namespaces, server, agents, Ready.
func (s *starter) start(ctx context.Context) error {
	alive, err := s.alive()
	if err != nil {
		return err
	}
	s.cold = len(alive) == 0
	server := alive["server "+NodeName(s.name, 0)]
	if server {
		if err := s.notHealthy(ctx, alive); err != nil {
			return err
		}
	} else if err := s.checkMachine(); err != nil {
		return err
	}
	if err := s.prepareDir(); err != nil {
		return err
	}
	nodes, err := s.nodeNamespaces()
	if err != nil {
		return err
	}
	if !server {
		s.progress.now("starting the server")
		c, err := spawn("the server", "", s.serverLog(), s.serverArgs(), nil)
		if err != nil {
			return err
		}
		s.children = append(s.children, c)
		if err := c.wait(ctx); err != nil {
			return err
		}
	}
	a, err := pki.Open(TLSDir(s.dir))
	if err != nil {
		return err
	}
	if err := a.WriteAdminKubeconfig(AdminKubeconfig(s.dir), s.kubeContext(), serverURL(s.adminHost(), s.Port)); err != nil {
		return err
	}
	token, err := a.JoinToken()
	if err != nil {
		return err
	}
	for _, n := range nodes {
		if alive["agent "+NodeName(s.name, n.Index)] {
			continue
		}
		if err := s.startAgent(n, token); err != nil {
			return err
		}
	}
	return s.waitNodes(ctx)
}

func (s *starter) alive() (map[string]bool, error) {
	procs, err := s.processes()
	if err != nil {
		return nil, err
	}
	alive := map[string]bool{}
	for _, p := range procs {
		if p.Name != "shim" {
			alive[p.Name+" "+p.Node] = true
		}
	}
	return alive, nil
}

// errHealthy tells that there was nothing to do.
type errHealthy struct{ name string }

func (e errHealthy) Error() string {
	return fmt.Sprintf("cluster %q is up already: `knarr status` shows it, `knarr down` stops it", e.name)
}

// notHealthy is nil where something of a running cluster is missing.
func (s *starter) notHealthy(ctx context.Context, alive map[string]bool) error {
	for i := 1; i < s.Nodes; i++ {
		if !alive["agent "+NodeName(s.name, i)] {
			return nil
		}
	}
	st, err := s.status(ctx)
	if err != nil {
		return err
	}
	if st.Ready {
		return errHealthy{s.name}
	}
	return nil
}

// checkMachine says what keeps a server from running here.
func (s *starter) checkMachine() error {
	other, err := s.neighbour()
	if err != nil {
		return err
	}
	if other != "" {
		return fmt.Errorf("cluster %q runs on this machine, and a machine's packet rules belong to one cluster at a time: `knarr down --name %s` first", other, other)
	}
	if err := checkPort(s.Bind, s.Port); err != nil {
		return err
	}
	if err := checkPort("", s.KubeletPort); err != nil {
		return errors.New(strings.Replace(err.Error(), "--port", "--kubelet-port", 1))
	}
	return nil
}

// prepareDir makes the cluster's directory and records how the cluster is made.
func (s *starter) prepareDir() error {
	for _, dir := range []string{filepath.Dir(s.dir), s.dir, ServerDir(s.dir), filepath.Join(s.dir, "nodes")} {
		mode := fs.FileMode(0o700)
		if dir == filepath.Dir(s.dir) {
			mode = 0o755
		}
		if err := os.MkdirAll(dir, mode); err != nil {
			return fmt.Errorf("the data directory is not writable: %w (choose another one with --data-dir)", err)
		}
	}
	if err := s.save(s.record); err != nil {
		return fmt.Errorf("the data directory is not writable: %w (choose another one with --data-dir)", err)
	}
	return s.mark()
}

// netOptions say where this cluster's node namespaces are.
func (c *cluster) netOptions(nodeCIDR string) nodens.Options {
	r, _ := netip.ParsePrefix(nodeCIDR) // the zero value is the default
	return nodens.Options{Cluster: c.name, Dir: filepath.Join(c.netDir(), "netns"), Range: r,
		Sysctl: sysctl.Recorder{Dir: sysctl.DefaultDir, Owner: c.name}}
}

// netDir pins the cluster's network namespaces; a reboot clears it.
func (c *cluster) netDir() string { return filepath.Join(filepath.Dir(c.run), "net", c.name) }

func (s *starter) nodeNamespaces() ([]nodens.Node, error) {
	o := s.netOptions(s.NodeCIDR)
	before, err := nodens.List(o)
	if err != nil {
		return nil, err
	}
	had := map[int]bool{}
	for _, i := range before {
		had[i] = true
	}
	var out []nodens.Node
	for i := 1; i < s.Nodes; i++ {
		s.progress.now("making the network of node %s", NodeName(s.name, i))
		n, err := nodens.SetUp(o, i)
		if err != nil {
			return nil, err
		}
		if !had[i] {
			s.madeNS = append(s.madeNS, i)
		}
		out = append(out, n)
	}
	return out, nil
}

func (s *starter) serverArgs() []string {
	args := []string{"server", "--name", s.name, "--data-dir", filepath.Dir(s.dir), "--port", strconv.Itoa(s.Port),
		"--kubelet-port", strconv.Itoa(s.KubeletPort), "--bind-address", s.Bind, "--pod-cidr", s.PodCIDR,
		"--service-cidr", s.ServiceCIDR, "--node-cidr", s.NodeCIDR, "--cluster-dns", s.ClusterDNS,
		"--registry-config-path", s.RegistryConfigPath}
	if len(s.ServerNames) > 0 {
		args = append(args, "--tls-san", strings.Join(s.ServerNames, ","))
	}
	return append(args, s.APIFlags...)
}

// adminHost is the host of the admin's kubeconfig.
func (s *starter) adminHost() string {
	if a, err := netip.ParseAddr(s.Bind); err == nil && !a.IsUnspecified() {
		return s.Bind
	}
	return "127.0.0.1"
}

// kubeContext is the name of the context in the kubeconfig.
func (s *starter) kubeContext() string {
	if s.name == DefaultName {
		return "knarr"
	}
	return "knarr-" + s.name
}

func (s *starter) startAgent(n nodens.Node, token pki.Token) error {
	name := NodeName(s.name, n.Index)
	s.progress.now("starting node %s", name)
	c, err := spawn("node "+name, n.NetNS, s.agentLog(name), []string{"agent", "--name", s.name, "--data-dir", filepath.Dir(s.dir),
		"--server", serverURL(n.Gateway.String(), s.Port), "--node-name", name, "--node-ip", n.Address.String(),
		"--kubelet-port", strconv.Itoa(s.KubeletPort), "--registry-config-path", s.RegistryConfigPath}, []string{"KNARR_TOKEN=" + token.String()})
	if err != nil {
		return err
	}
	s.children = append(s.children, c)
	return nil
}

// waitNodes returns when every node is Ready, or with the reason why one cannot be.
func (s *starter) waitNodes(ctx context.Context) error {
	client, err := s.client()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	for _, c := range s.children {
		go func() {
			select {
			case <-c.exited:
				cancel(c.failure())
			case <-ctx.Done():
			}
		}()
	}
	waiting := map[string]string{}
	for i := range s.Nodes {
		waiting[NodeName(s.name, i)] = "it has not registered"
	}
	s.progress.now("waiting for %d nodes to be Ready", len(waiting))
	lw := nodeListWatch(ctx, client)
	_, err = watchtools.UntilWithSync(ctx, lw, &corev1.Node{}, nil, func(e watch.Event) (bool, error) {
		n, ok := e.Object.(*corev1.Node)
		if !ok || e.Type == watch.Error {
			return false, nil
		}
		if _, ours := waiting[n.Name]; ours || !nodeStatusOf(n).Ready {
			if st := nodeStatusOf(n); st.Ready {
				delete(waiting, n.Name)
			} else if ours {
				waiting[n.Name] = st.Reason
			}
		}
		return len(waiting) == 0, nil
	})
	if err == nil {
		return s.waitChildren(ctx) // the node of an agent that was killed a moment ago is Ready still
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	var lines []string
	for n, why := range waiting {
		lines = append(lines, fmt.Sprintf("node %s is not Ready: %s", n, why))
	}
	return fmt.Errorf("%w\n%s", err, strings.Join(lines, "\n"))
}

// waitChildren returns when all that this run started is ready: an agent is when its node is registered.
func (s *starter) waitChildren(ctx context.Context) error {
	for _, c := range s.children {
		if err := c.wait(ctx); err != nil {
			return err
		}
	}
	return nil
}

func nodeListWatch(ctx context.Context, client kubernetes.Interface) cache.ListerWatcher {
	return &cache.ListWatch{
		ListWithContextFunc: func(_ context.Context, o metav1.ListOptions) (runtime.Object, error) {
			return client.CoreV1().Nodes().List(ctx, o)
		},
		WatchFuncWithContext: func(_ context.Context, o metav1.ListOptions) (watch.Interface, error) {
			return client.CoreV1().Nodes().Watch(ctx, o)
		},
	}
}

// undo leaves things as they were before this run: where nothing of the cluster was alive all of it goes, else only what
// this run started.
func (s *starter) undo() error {
	if s.cold {
		return s.tearDown(s.fresh, s.progress)
	}
	for _, c := range s.children {
		c.kill()
	}
	var errs []error
	for _, i := range s.madeNS {
		errs = append(errs, nodens.TearDown(s.netOptions(s.NodeCIDR), i))
	}
	return errors.Join(errs...)
}
