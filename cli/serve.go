package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"knarr/internal/pidlock"
)

// Environment of processes that `up` starts.
const (
	// readyEnv is the descriptor on which "READY\n" is said.
	readyEnv = "KNARR_READY_FD"
	// logEnv is the file that standard error goes to, for its rotation.
	logEnv = "KNARR_LOG"
)

const readyWord = "READY\n"

// rangeFlags are the flags that say which addresses a cluster uses.
type rangeFlags struct{ record }

func (r *rangeFlags) flags(c *cobra.Command) {
	f := c.Flags()
	f.IntVar(&r.Port, "port", DefaultPort, "TCP port of the API")
	f.IntVar(&r.KubeletPort, "kubelet-port", DefaultKubeletPort, "TCP port of the nodes' own API")
	f.StringVar(&r.Bind, "bind-address", "0.0.0.0", "address that the API listens on")
	f.StringVar(&r.PodCIDR, "pod-cidr", DefaultPodCIDR, "addresses of pods")
	f.StringVar(&r.ServiceCIDR, "service-cidr", DefaultServiceCIDR, "addresses of services")
	f.StringVar(&r.NodeCIDR, "node-cidr", DefaultNodeCIDR, "addresses of the links to further nodes on this machine")
	f.StringVar(&r.ClusterDNS, "cluster-dns", DefaultClusterDNS, "address of the cluster's DNS, in --service-cidr")
	registryFlag(f, &r.RegistryConfigPath)
	f.StringSliceVar(&r.ServerNames, "tls-san", nil, "further names and addresses of the API, for its certificate")
}

// registryFlag says where a node reads of mirrors.
func registryFlag(f *pflag.FlagSet, dir *string) {
	f.StringVar(dir, "registry-config-path", DefaultRegistryConfigPath, "directory of containerd's hosts.toml files, which name mirrors of registries; read at each pull, may be missing")
}

// absolute is path in a form that holds in another directory, too; nothing stays nothing.
func absolute(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	return filepath.Abs(path)
}

// config turns flags into the server's configuration.
func (r record) config(dir string) (ServerConfig, error) {
	c := ServerConfig{Name: r.Name, Dir: dir, Port: r.Port, KubeletPort: r.KubeletPort, ServerNames: r.ServerNames,
		Domain: DefaultDomain, NodeName: NodeName(r.Name, 0), Ready: func() {}}
	var err error
	if c.RegistryConfigPath, err = absolute(r.RegistryConfigPath); err != nil {
		return c, err
	}
	var errs []error
	addr := func(flag, s string) netip.Addr {
		a, err := netip.ParseAddr(s)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s %q is not an IP address", flag, s))
		}
		return a
	}
	prefix := func(flag, s string) netip.Prefix {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s %q is not a network prefix such as %s", flag, s, DefaultPodCIDR))
		}
		return p
	}
	c.BindAddress = addr("--bind-address", r.Bind)
	c.ClusterDNS = addr("--cluster-dns", r.ClusterDNS)
	c.PodCIDR = prefix("--pod-cidr", r.PodCIDR)
	c.ServiceCIDR = prefix("--service-cidr", r.ServiceCIDR)
	c.NodeCIDR = prefix("--node-cidr", r.NodeCIDR)
	if err := errors.Join(errs...); err != nil {
		return c, usageError{err}
	}
	if err := c.Validate(); err != nil {
		return c, usageError{err}
	}
	return c, nil
}

func newServer(s System) *cobra.Command {
	var w where
	var r rangeFlags
	var advertise, nodeName, nodeIP, shimPath string
	var noAgent bool
	var datastore datastoreFlags
	apiserver := newAPIFlags()
	c := &cobra.Command{
		Use:   "server",
		Short: "Run the server (API, controllers, scheduler and one node) in the foreground",
		Long:  "Run the server (API, controllers, scheduler and one node) in the foreground. Flags that upstream's API server has, too, mean the same here.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := w.cluster()
			if err != nil {
				return usageError{err}
			}
			r.Name = c.name
			config, err := r.config(c.dir)
			if err != nil {
				return err
			}
			config.NoAgent, config.Datastore, config.API = noAgent, datastore.Datastore, apiserver.options
			if config.Token, err = datastore.joinToken(cmd); err != nil {
				return err
			}
			if nodeName != "" {
				config.NodeName = nodeName
			}
			if config.AdvertiseAddress, err = optionalAddr("--advertise-address", advertise); err != nil {
				return err
			}
			if config.NodeIP, err = optionalAddr("--node-ip", nodeIP); err != nil {
				return err
			}
			if err := config.Validate(); err != nil {
				return usageError{err}
			}
			if err := apiserver.check(); err != nil {
				return err
			}
			if config.ShimPath, err = findShim(shimPath); err != nil && !noAgent {
				return err
			}
			return serve(cmd.Context(), c.serverLock(), func(ctx context.Context, ready func()) error {
				config.Ready = func() { c.remember(r.record); ready() }
				return s.RunServer(ctx, config)
			})
		},
	}
	w.flags(c)
	r.flags(c)
	c.Flags().StringVar(&advertise, "advertise-address", "", "address by which nodes and pods reach the API (default: the node's)")
	c.Flags().StringVar(&nodeName, "node-name", "", "name of the server's own node")
	c.Flags().StringVar(&nodeIP, "node-ip", "", "address of the server's own node (default: that of the default route's link)")
	c.Flags().StringVar(&shimPath, "shim", "", "the knarr-shim program (default: beside knarr)")
	c.Flags().BoolVar(&noAgent, "no-agent", false, "run no node in the server")
	datastore.flags(c)
	apiserver.offer(c)
	return c
}

// datastoreFlags are the flags of a server whose objects lie in an external etcd.
type datastoreFlags struct {
	Datastore
	token string
}

func (d *datastoreFlags) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringSliceVar(&d.Endpoints, "datastore-endpoint", nil, "URLs of an external etcd that holds all objects (default: the embedded store)")
	f.StringVar(&d.CAFile, "datastore-cafile", "", "authorities of the etcd's certificates")
	f.StringVar(&d.CertFile, "datastore-certfile", "", "client certificate for the etcd")
	f.StringVar(&d.KeyFile, "datastore-keyfile", "", "key of that certificate")
	f.StringVar(&d.token, "token", "", "token of the cluster whose further server this is; better in the environment (KNARR_TOKEN), where `ps` does not show it")
}

// joinToken is what lets this server join those that made the cluster in the etcd.
func (d *datastoreFlags) joinToken(c *cobra.Command) (string, error) {
	switch {
	case len(d.Endpoints) == 0 && c.Flags().Changed("token"):
		return "", usageError{errors.New("--token joins the servers of one external etcd: give its --datastore-endpoint, too")}
	case len(d.Endpoints) == 0:
		return "", nil
	case d.token == "":
		return os.Getenv("KNARR_TOKEN"), nil
	}
	return d.token, nil
}

func newAgent(s System) *cobra.Command {
	var w where
	var config AgentConfig
	var nodeIP, shimPath string
	c := &cobra.Command{
		Use:   "agent --server URL --token TOKEN",
		Short: "Run a further node in the foreground",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := w.cluster()
			if err != nil {
				return usageError{err}
			}
			config.Name, config.Dir = c.name, c.dir
			if config.NodeName == "" {
				if config.NodeName, err = os.Hostname(); err != nil {
					return err
				}
			}
			if config.NodeIP, err = optionalAddr("--node-ip", nodeIP); err != nil {
				return err
			}
			if config.RegistryConfigPath, err = absolute(config.RegistryConfigPath); err != nil {
				return err
			}
			if err := config.Validate(); err != nil {
				return usageError{err}
			}
			if config.ShimPath, err = findShim(shimPath); err != nil {
				return err
			}
			return serve(cmd.Context(), c.agentLock(config.NodeName), func(ctx context.Context, ready func()) error {
				config.Ready = func() { c.remember(record{Name: c.name, ClusterDNS: DefaultClusterDNS}); ready() }
				return s.RunAgent(ctx, config)
			})
		},
	}
	w.flags(c)
	f := c.Flags()
	f.StringVar(&config.Server, "server", "", "URL of the server's API")
	f.StringVar(&config.Token, "token", os.Getenv("KNARR_TOKEN"), "join token; better in the environment (KNARR_TOKEN), where `ps` does not show it")
	f.Lookup("token").DefValue = ""
	f.StringVar(&config.NodeName, "node-name", "", "name of the node (default: the host's)")
	f.StringVar(&nodeIP, "node-ip", "", "address of the node (default: that of the link to the server)")
	f.IntVar(&config.KubeletPort, "kubelet-port", DefaultKubeletPort, "TCP port of the node's own API")
	registryFlag(f, &config.RegistryConfigPath)
	f.StringVar(&shimPath, "shim", "", "the knarr-shim program (default: beside knarr)")
	return c
}

func optionalAddr(flag, s string) (netip.Addr, error) {
	if s == "" {
		return netip.Addr{}, nil
	}
	a, err := netip.ParseAddr(s)
	if err != nil {
		return a, usageError{fmt.Errorf("%s %q is not an IP address", flag, s)}
	}
	return a, nil
}

// serve holds lock and runs a long-lived part until it ends or the process is told to stop. run is given what to call once
// when the part is ready.
func serve(ctx context.Context, lock string, run func(ctx context.Context, ready func()) error) error {
	if os.Geteuid() != 0 {
		return errNotRoot
	}
	if err := os.MkdirAll(filepath.Dir(lock), 0o700); err != nil {
		return fmt.Errorf("data directory: %w", err)
	}
	l, err := pidlock.Take(lock)
	if errors.Is(err, pidlock.ErrLocked) {
		pid, _ := pidlock.Owner(lock)
		return fmt.Errorf("this cluster's part already runs as process %d (it holds %s)", pid, lock)
	}
	if err != nil {
		return fmt.Errorf("data directory: %w", err)
	}
	defer l.Release()
	if err := boundLog(os.Getenv(logEnv)); err != nil {
		return err
	}
	ready, err := readyPipe()
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	var once sync.Once
	err = run(ctx, func() {
		once.Do(func() {
			daemon.SdNotify(false, daemon.SdNotifyReady) // without a service manager it does nothing
			if ready != nil {
				ready.WriteString(readyWord)
				ready.Close()
			}
		})
	})
	if ctx.Err() != nil && (err == nil || errors.Is(err, context.Canceled)) {
		return nil // told to stop
	}
	if err == nil {
		return errors.New("stopped by itself")
	}
	return err
}

var errNotRoot = errors.New("knarr must run as root: it makes namespaces, mounts, links and cgroups (try sudo)")

// readyPipe returns the pipe to the `up` that started this process, or nil. Programs started from here do not inherit it.
func readyPipe() (*os.File, error) {
	s := os.Getenv(readyEnv)
	if s == "" {
		return nil, nil
	}
	fd, err := strconv.Atoi(s)
	if err != nil || fd < 3 {
		return nil, fmt.Errorf("%s=%q is not a descriptor", readyEnv, s)
	}
	syscall.CloseOnExec(fd)
	os.Unsetenv(readyEnv)
	return os.NewFile(uintptr(fd), "ready"), nil
}

// findShim returns the knarr-shim program: the one named, else that beside this program, else that in PATH.
func findShim(path string) (string, error) {
	if path != "" {
		if _, err := os.Stat(path); err != nil {
			return "", fmt.Errorf("--shim: %w", err)
		}
		return filepath.Abs(path)
	}
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), "knarr-shim")
		if _, err := os.Stat(beside); err == nil {
			return beside, nil
		}
	}
	found, err := exec.LookPath("knarr-shim")
	if err != nil {
		return "", errors.New("the program knarr-shim is neither beside knarr nor in PATH: `make build` makes both (or give --shim)")
	}
	return filepath.Abs(found)
}

// checkPort says who has a TCP port where it is taken.
func checkPort(bind string, port int) error {
	l, err := net.Listen("tcp", net.JoinHostPort(bind, strconv.Itoa(port)))
	if err == nil {
		return l.Close()
	}
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("port %d is in use%s: stop that, or choose another port with --port", port, portOwner(port))
	}
	return fmt.Errorf("port %d: %w", port, err)
}
