package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strconv"

	"knarr/apiserver/options"
	"knarr/system/pki"
)

// Defaults of the command line's contract.
const (
	DefaultName        = "default"
	DefaultRoot        = "/var/lib/knarr"
	DefaultPort        = 6443
	DefaultKubeletPort = 10250
	DefaultPodCIDR     = "10.42.0.0/16"
	DefaultServiceCIDR = "10.43.0.0/16"
	DefaultNodeCIDR    = "10.41.0.0/16"
	DefaultClusterDNS  = "10.43.0.10"
	DefaultDomain      = "cluster.local"
	// DefaultRegistryConfigPath is containerd's.
	DefaultRegistryConfigPath = "/etc/containerd/certs.d"

	// MaxNodes bounds the nodes of one cluster on one machine.
	MaxNodes = 64
	// maxNameLength leaves room for "<name>-<index>" in node names and for prefixes in names of namespaces and cgroups.
	maxNameLength = 40
)

// System is what the commands need from the parts of knarr that they start. The wiring package implements it; the
// commands know no part by itself.
type System interface {
	// RunServer runs API server, controllers, scheduler and the agent of the server's own node until ctx ends.
	// It calls config.Ready once, when the API answers and all bootstrap objects exist (its own node may still become
	// Ready later). Containers keep running when it returns.
	RunServer(ctx context.Context, config ServerConfig) error
	// RunAgent runs the agent of one further node until ctx ends. It calls config.Ready once, when the node is
	// registered. Containers keep running when it returns.
	RunAgent(ctx context.Context, config AgentConfig) error
}

// ServerConfig is the whole, validated configuration of `knarr server`.
type ServerConfig struct {
	// Name is the cluster's name; names of cgroups, namespaces and links on the host contain it.
	Name string
	// Dir is the cluster's own directory (0700): server/, nodes/, admin.kubeconfig.
	Dir string
	// BindAddress is where the API listens; the unspecified address means all.
	BindAddress netip.Addr
	// Port is the API's TCP port.
	Port int
	// AdvertiseAddress is what `kubernetes.default` and other nodes use for the API; the zero value means the node's address.
	AdvertiseAddress netip.Addr
	// ServerNames are further names and addresses for the API's certificate.
	ServerNames []string
	PodCIDR     netip.Prefix
	ServiceCIDR netip.Prefix
	// NodeCIDR holds the links between the machine and its further nodes (network/nodens).
	NodeCIDR   netip.Prefix
	ClusterDNS netip.Addr
	// Domain is the DNS domain of services.
	Domain string
	// Datastore is an external etcd; the zero value means the embedded store in Dir.
	Datastore Datastore
	// Token is the join token of the servers that made the cluster in an external etcd; empty where this server is its first, or has joined.
	Token string
	// API are the settings that upstream's API server has, too; nil means the defaults.
	API *options.Options
	// NoAgent leaves out the agent of the server's own node.
	NoAgent bool
	// NodeName, NodeIP, KubeletPort, ShimPath, RegistryConfigPath: as in AgentConfig, for the server's own node.
	NodeName           string
	NodeIP             netip.Addr
	KubeletPort        int
	ShimPath           string
	RegistryConfigPath string
	// Ready is told once that the API serves; never nil.
	Ready func()
}

// Datastore says where an external etcd is, whose cluster then holds all objects: several servers may share one.
type Datastore struct {
	// Endpoints are the URLs of its members; none means that there is no external etcd.
	Endpoints []string
	// CAFile, CertFile and KeyFile are PEM files for TLS; empty means the system's authorities and no client certificate.
	CAFile, CertFile, KeyFile string
}

// AgentConfig is the whole, validated configuration of `knarr agent`.
type AgentConfig struct {
	// Name is the cluster's name.
	Name string
	// Dir is the cluster's directory on this machine; the agent keeps its things in Dir/nodes/<NodeName>.
	Dir string
	// Server is the API's URL, for example https://10.42.255.1:6443.
	Server string
	// Token is a join token of system/pki.
	Token string
	// NodeName is the name that the node registers under.
	NodeName string
	// NodeIP is the node's address; the zero value means that of the link which leads to the server.
	NodeIP netip.Addr
	// KubeletPort is the TCP port of the node's streaming API.
	KubeletPort int
	// ShimPath is the knarr-shim program; empty means beside the running program, then in PATH.
	ShimPath string
	// RegistryConfigPath is the directory of containerd's hosts.toml files, which name the mirrors of registries. It may be missing.
	RegistryConfigPath string
	// Ready is told once that the node is registered; never nil.
	Ready func()
}

// NodeDir is the directory of one node's state.
func NodeDir(clusterDir, node string) string { return filepath.Join(clusterDir, "nodes", node) }

// ServerDir is the directory of the server's state.
func ServerDir(clusterDir string) string { return filepath.Join(clusterDir, "server") }

// TLSDir is where the cluster's keys and certificates lie.
func TLSDir(clusterDir string) string { return filepath.Join(clusterDir, "server", "tls") }

// AdminKubeconfig is the path of the admin's kubeconfig.
func AdminKubeconfig(clusterDir string) string { return filepath.Join(clusterDir, "admin.kubeconfig") }

// AgentSocket is the unix socket of a node's agent, which serves the image commands.
func AgentSocket(clusterDir, node string) string {
	return filepath.Join(NodeDir(clusterDir, node), "agent.sock")
}

// NodeName is the name of the cluster's node number index on this machine; the server's own is number 0.
func NodeName(cluster string, index int) string {
	if cluster == DefaultName {
		cluster = "knarr"
	}
	return cluster + "-" + strconv.Itoa(index)
}

var namePattern = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`)

func validateName(what, name string) error {
	if len(name) > maxNameLength || !namePattern.MatchString(name) {
		return fmt.Errorf("%s %q is not valid: use up to %d lower-case letters, digits and '-', starting and ending with a letter or digit",
			what, name, maxNameLength)
	}
	return nil
}

func validatePort(what string, port int) error {
	if port < 1 || port > 65535 {
		return fmt.Errorf("%s %d is not a TCP port (1 to 65535)", what, port)
	}
	return nil
}

func validateRegistries(dir string) error {
	if !filepath.IsAbs(dir) {
		return fmt.Errorf("--registry-config-path %q is not an absolute path of a directory", dir)
	}
	if info, err := os.Stat(dir); err == nil && !info.IsDir() {
		return fmt.Errorf("--registry-config-path %s is not a directory: it holds one for each registry, such as %s", dir, filepath.Join(dir, "docker.io", "hosts.toml"))
	}
	return nil
}

// Validate reports everything that is wrong with the configuration.
func (c ServerConfig) Validate() error {
	errs := []error{
		validateName("cluster name", c.Name),
		validatePort("--port", c.Port),
		validateCIDRs(c.PodCIDR, c.ServiceCIDR, c.NodeCIDR, c.ClusterDNS),
	}
	if !filepath.IsAbs(c.Dir) {
		errs = append(errs, fmt.Errorf("data directory %q is not an absolute path", c.Dir))
	}
	if c.Token != "" {
		_, err := pki.ParseToken(c.Token)
		errs = append(errs, err)
	}
	if !c.NoAgent {
		errs = append(errs, validateName("node name", c.NodeName), validatePort("--kubelet-port", c.KubeletPort), validateRegistries(c.RegistryConfigPath))
		if c.KubeletPort == c.Port {
			errs = append(errs, fmt.Errorf("--port and --kubelet-port are both %d", c.Port))
		}
	}
	return errors.Join(errs...)
}

func validateCIDRs(pods, services, nodes netip.Prefix, dns netip.Addr) error {
	switch {
	case !pods.IsValid() || pods.Masked() != pods:
		return fmt.Errorf("--pod-cidr %s is not a network prefix such as %s", pods, DefaultPodCIDR)
	case !services.IsValid() || services.Masked() != services:
		return fmt.Errorf("--service-cidr %s is not a network prefix such as %s", services, DefaultServiceCIDR)
	case pods.Overlaps(services):
		return fmt.Errorf("--pod-cidr %s and --service-cidr %s overlap: pods and services need ranges of their own", pods, services)
	case !nodes.IsValid() || nodes.Masked() != nodes:
		return fmt.Errorf("--node-cidr %s is not a network prefix such as %s", nodes, DefaultNodeCIDR)
	case nodes.Overlaps(pods) || nodes.Overlaps(services):
		return fmt.Errorf("--node-cidr %s overlaps --pod-cidr or --service-cidr", nodes)
	case !services.Contains(dns):
		return fmt.Errorf("--cluster-dns %s lies outside of --service-cidr %s", dns, services)
	}
	return nil
}

// Validate reports everything that is wrong with the configuration.
func (c AgentConfig) Validate() error {
	errs := []error{
		validateName("cluster name", c.Name),
		validateName("node name", c.NodeName),
		validatePort("--kubelet-port", c.KubeletPort),
		validateRegistries(c.RegistryConfigPath),
	}
	if !filepath.IsAbs(c.Dir) {
		errs = append(errs, fmt.Errorf("data directory %q is not an absolute path", c.Dir))
	}
	if u, err := url.Parse(c.Server); err != nil || u.Scheme != "https" || u.Host == "" {
		errs = append(errs, fmt.Errorf("--server %q is not a URL such as https://HOST:%d", c.Server, DefaultPort))
	}
	if c.Token == "" {
		errs = append(errs, errors.New("--token is missing: `knarr token` on the server prints it"))
	}
	return errors.Join(errs...)
}

// serverURL is the address of a local API.
func serverURL(host string, port int) string {
	return "https://" + net.JoinHostPort(host, strconv.Itoa(port))
}

// NodeTLSDir is where a node that joined keeps its identity (pki.JoinOptions.Dir).
func NodeTLSDir(clusterDir, node string) string {
	return filepath.Join(NodeDir(clusterDir, node), "tls")
}

// PodNetworkDir is where a node keeps the addresses of its pods (pod.Options.StateDir).
func PodNetworkDir(clusterDir, node string) string {
	return filepath.Join(NodeDir(clusterDir, node), "network")
}

// NodeRuntimeDir is where a node's runtime remembers sandboxes and containers. It means nothing once they are gone.
func NodeRuntimeDir(clusterDir, node string) string {
	return filepath.Join(NodeDir(clusterDir, node), "state")
}
