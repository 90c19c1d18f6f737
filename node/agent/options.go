package agent

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	internalapi "k8s.io/cri-api/pkg/apis"
	streaming "k8s.io/cri-streaming/pkg/streaming"
)

// DefaultMaxPods is how many pods a node accepts when Options.MaxPods is zero.
const DefaultMaxPods = 110

// Options says everything an Agent needs. New checks it; fields without
// "optional" must be set.
type Options struct {
	// NodeName is the name of the Node object, a DNS subdomain.
	NodeName string
	// RootDir is the absolute directory of the agent's state:
	// pods/<uid>/{volumes,containers,etc-hosts}, plugins and checkpoints.
	// It is created with mode 0750.
	RootDir string
	// PodLogsDir holds <ns>_<name>_<uid>/<container>/<n>.log.
	// Optional: RootDir/log/pods.
	PodLogsDir string
	// NodeIPs are the node's own addresses, one per family, the primary first.
	NodeIPs []net.IP
	// Client talks to the API as this node.
	Client kubernetes.Interface
	// Informers gives services (and nothing else); the agent asks for the
	// informers it needs in New, the owner starts the factory after that.
	Informers informers.SharedInformerFactory
	// Pods is the informer of this node's pods (spec.nodeName = NodeName).
	// Optional: the agent runs a filtered list/watch over Client. Given ones
	// are started by their owner.
	Pods cache.SharedIndexInformer
	// Runtime runs sandboxes and containers.
	Runtime internalapi.RuntimeService
	// Images pulls, lists and removes images.
	Images internalapi.ImageManagerService
	// Streaming executes exec, attach and port-forward in the runtime.
	// Optional: these requests are then answered with 501.
	Streaming streaming.Runtime

	// ClusterDNS are the resolvers of pods with dnsPolicy ClusterFirst.
	ClusterDNS []net.IP
	// ClusterDomain is the DNS zone of the cluster. Optional: cluster.local.
	ClusterDomain string
	// ResolvConf is the host file that pods with dnsPolicy Default inherit.
	// Optional: /etc/resolv.conf.
	ResolvConf string
	// CgroupRoot is the parent of all pod cgroups in each controller, as an
	// absolute path below the cgroup mounts, such as /knarr-default/node-0.
	CgroupRoot string

	// ServingTLS serves the agent's HTTPS API; ClientCAs are taken from its
	// ClientCAs pool. Optional: no API is served.
	ServingTLS *tls.Config
	// ListenAddress is host:port of the HTTPS API. Port 0 takes a free one.
	// Optional: the first node address, port 10250.
	ListenAddress string
	// Listen opens the listener of the HTTPS API, for agents whose node has a
	// network namespace of its own. Optional: net.Listen.
	Listen func(network, address string) (net.Listener, error)

	// NetworkReady tells why pods cannot get a network yet; nil means ready.
	// After a change the owner calls Agent.NetworkChanged. Optional: always ready.
	NetworkReady func() error
	// OnPodCIDR is called, from one goroutine, with node.spec.podCIDRs as soon
	// as they are known and whenever they change. It must not call the agent,
	// but for NetworkChanged. Optional.
	OnPodCIDR func(cidrs []string)

	// Labels and Taints are put on the Node when it registers. Optional.
	Labels map[string]string
	Taints []v1.Taint
	// MaxPods bounds the pods of the node. Zero means DefaultMaxPods.
	MaxPods int
	// Reserved is taken off capacity to give allocatable. Optional: nothing.
	Reserved v1.ResourceList
	// StaticPodDir is a directory of pod manifests to run. Optional.
	StaticPodDir string
	// Recorder writes events. Optional: an own broadcaster over Client.
	Recorder record.EventRecorderLogger
}

// validate fills in defaults and reports everything that is wrong at once.
func (o *Options) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf("agent: "+format, args...)) }
	for _, msg := range validation.IsDNS1123Subdomain(o.NodeName) {
		bad("NodeName %q: %s", o.NodeName, msg)
	}
	if !filepath.IsAbs(o.RootDir) {
		bad("RootDir %q must be an absolute path", o.RootDir)
	}
	if len(o.NodeIPs) == 0 || len(o.NodeIPs) > 2 {
		bad("NodeIPs must hold one address, or one per IP family; got %d", len(o.NodeIPs))
	}
	if o.Client == nil || o.Informers == nil {
		bad("Client and Informers are required")
	}
	if o.Runtime == nil || o.Images == nil {
		bad("Runtime and Images are required")
	}
	if !strings.HasPrefix(o.CgroupRoot, "/") || filepath.Clean(o.CgroupRoot) == "/" {
		bad("CgroupRoot %q must be an absolute path below the cgroup root, such as /knarr-default/node-0", o.CgroupRoot)
	}
	if o.MaxPods < 0 {
		bad("MaxPods %d must not be negative", o.MaxPods)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	o.fillDefaults()
	for _, dir := range []string{o.RootDir, o.podsDir(), o.PodLogsDir} {
		if err := os.MkdirAll(dir, 0o750); err != nil {
			return fmt.Errorf("agent: state directory: %w", err)
		}
	}
	return nil
}

func (o *Options) fillDefaults() {
	if o.PodLogsDir == "" {
		o.PodLogsDir = filepath.Join(o.RootDir, "log", "pods")
	}
	if o.ClusterDomain == "" {
		o.ClusterDomain = "cluster.local"
	}
	if o.ResolvConf == "" {
		o.ResolvConf = "/etc/resolv.conf"
	}
	if o.ListenAddress == "" {
		o.ListenAddress = net.JoinHostPort(o.NodeIPs[0].String(), "10250")
	}
	if o.Listen == nil {
		o.Listen = net.Listen
	}
	if o.NetworkReady == nil {
		o.NetworkReady = func() error { return nil }
	}
	if o.OnPodCIDR == nil {
		o.OnPodCIDR = func([]string) {}
	}
	if o.MaxPods == 0 {
		o.MaxPods = DefaultMaxPods
	}
}

func (o *Options) podsDir() string { return filepath.Join(o.RootDir, "pods") }
