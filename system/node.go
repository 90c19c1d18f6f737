package system

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"knarr/cli"
	"knarr/network/dns"
	"knarr/network/pod"
	"knarr/network/service"
	"knarr/network/sysctl"
	"knarr/node/agent"
	"knarr/node/image"
	"knarr/node/imageapi"
	noderuntime "knarr/node/runtime"
)

// sharedContentDir is where the nodes of one machine share image blobs, in the cluster's directory.
const sharedContentDir = "content"

// clusterInfo is what the server tells every node that joins.
type clusterInfo struct {
	PodCIDR     netip.Prefix `json:"podCIDR"`
	ServiceCIDR netip.Prefix `json:"serviceCIDR"`
	// NodeCIDR holds the links between the server's machine and its further nodes.
	NodeCIDR   netip.Prefix `json:"nodeCIDR"`
	ClusterDNS netip.Addr   `json:"clusterDNS"`
	Domain     string       `json:"domain"`
}

// nodeConfig is what the agent role needs, in the server's process or in one of its own.
type nodeConfig struct {
	cluster     clusterInfo
	clusterName string
	dir         string // the cluster's
	name        string
	ip          netip.Addr
	gateway     netip.Addr // set for a node that is a namespace of the server's machine
	port        int
	shim        string
	registries  string // see image.Options.RegistryConfigPath
	client      *rest.Config
	informers   informers.SharedInformerFactory
	pods        cache.SharedIndexInformer // nil: the agent watches its own
	serving     *tls.Config
	registered  func()
	log         *slog.Logger
}

// node is the agent role's parts, in the order in which they are made.
type node struct {
	config  nodeConfig
	images  *image.Store
	proxy   *service.Proxy
	network *pod.Network
	dns     *dns.Server
	runtime *noderuntime.Runtime
	agent   *agent.Agent
}

// newNode makes the parts; nothing of the cluster runs yet, but containers of an earlier life are found again.
func newNode(ctx context.Context, c nodeConfig) (*node, error) {
	n := &node{config: c}
	dir := cli.NodeDir(c.dir, c.name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("the node's directory is not usable: %w", err)
	}
	var err error
	n.images, err = image.Open(ctx, image.Options{Root: filepath.Join(dir, "images"), SharedContent: filepath.Join(c.dir, sharedContentDir),
		RegistryConfigPath: c.registries, ImportedWhenUnreachable: true})
	if err != nil {
		return nil, err
	}
	if err := n.connect(); err != nil {
		return nil, errors.Join(err, n.images.Close())
	}
	n.runtime, err = noderuntime.Open(ctx, noderuntime.Options{
		StateDir:     filepath.Join(dir, "state"),
		CgroupParent: n.cgroup(),
		Images:       n.images,
		Network:      podNetwork{n.network},
		ShimPath:     c.shim,
		Log:          c.log,
	})
	if err != nil {
		return nil, errors.Join(err, n.images.Close())
	}
	if n.agent, err = n.newAgent(dir); err != nil {
		return nil, errors.Join(err, n.close(ctx))
	}
	return n, nil
}

func (n *node) cgroup() string { return "/knarr-" + n.config.clusterName + "/" + n.config.name }

// connect makes the pod network and the service proxy.
func (n *node) connect() error {
	c := &n.config
	settings := sysctl.Recorder{}
	masquerade := []netip.Prefix(nil)
	if !c.gateway.IsValid() {
		settings = sysctl.Recorder{Dir: sysctl.DefaultDir, Owner: c.clusterName}
		masquerade = []netip.Prefix{c.cluster.NodeCIDR}
	}
	var err error
	n.proxy, err = service.New(service.Options{
		NodeName:          c.name,
		NodeIPs:           []netip.Addr{c.ip},
		ClusterCIDRs:      []netip.Prefix{c.cluster.PodCIDR},
		ServiceCIDRs:      []netip.Prefix{c.cluster.ServiceCIDR},
		MasqueradeSources: masquerade,
		LocalAddresses:    []netip.Addr{c.cluster.ClusterDNS},
		Informers:         c.informers,
		Sysctl:            settings,
		Log:               c.log,
	})
	if err != nil {
		return err
	}
	n.network, err = pod.New(pod.Options{
		NodeName:     c.name,
		Cluster:      c.clusterName,
		StateDir:     cli.PodNetworkDir(c.dir, c.name),
		ClusterCIDRs: []netip.Prefix{c.cluster.PodCIDR},
		NodeIPs:      []netip.Addr{c.ip},
		Gateway:      c.gateway,
		Informers:    c.informers,
		HostPorts:    n.proxy,
		Sysctl:       settings,
		Log:          c.log,
	})
	if err != nil {
		return err
	}
	n.dns, err = dns.New(dns.Options{
		Zone:      c.cluster.Domain,
		Addresses: []netip.Addr{c.cluster.ClusterDNS},
		Ranges:    []netip.Prefix{c.cluster.ServiceCIDR, c.cluster.PodCIDR},
		Informers: c.informers,
		Log:       c.log,
	})
	return err
}

func (n *node) newAgent(dir string) (*agent.Agent, error) {
	c := &n.config
	client, err := kubernetes.NewForConfig(c.client)
	if err != nil {
		return nil, err
	}
	return agent.New(agent.Options{
		NodeName:      c.name,
		RootDir:       dir,
		NodeIPs:       []net.IP{c.ip.AsSlice()},
		Client:        client,
		Informers:     c.informers,
		Pods:          c.pods,
		Runtime:       n.runtime,
		Images:        n.images.CRI(),
		Streaming:     n.runtime.Streams(),
		ClusterDNS:    []net.IP{c.cluster.ClusterDNS.AsSlice()},
		ClusterDomain: c.cluster.Domain,
		CgroupRoot:    n.cgroup(),
		ServingTLS:    c.serving,
		ListenAddress: net.JoinHostPort(c.ip.String(), strconv.Itoa(c.port)),
		NetworkReady:  n.networkReady,
	})
}

var errNoRange = errors.New("the node has no range of pod addresses yet")

func (n *node) networkReady() error {
	select {
	case <-n.network.Ready():
		return nil
	default:
		return errNoRange
	}
}

// start runs the parts: network first, then services, the image socket and the pods.
func (n *node) start(g *group) error {
	if err := n.onRegistered(); err != nil {
		return err
	}
	g.run("pod network", n.network.Run)
	g.run("services", n.proxy.Run)
	g.run("DNS", n.dns.Run)
	g.background(func(ctx context.Context) {
		select {
		case <-ctx.Done():
		case <-n.network.Ready():
			n.agent.NetworkChanged()
			n.forgetDead(ctx)
		}
	})
	g.run("image socket", func(ctx context.Context) error {
		return imageapi.Serve(ctx, cli.AgentSocket(n.config.dir, n.config.name), n.images)
	})
	g.run("agent", n.agent.Run)
	return nil
}

// forgetDead takes back the links and addresses of sandboxes that went while no agent ran.
func (n *node) forgetDead(ctx context.Context) {
	sandboxes, err := n.runtime.ListPodSandbox(ctx, nil)
	if err != nil {
		return
	}
	live := make([]string, len(sandboxes))
	for i, s := range sandboxes {
		live[i] = s.Id
	}
	if err := n.network.Reconcile(ctx, live); err != nil {
		n.config.log.Error("links and addresses of dead pods are left", "err", err)
	}
}

// onRegistered calls config.registered when the node's object is there.
func (n *node) onRegistered() error {
	once := sync.OnceFunc(n.config.registered)
	seen := func(obj any) {
		if node, ok := obj.(*corev1.Node); ok && node.Name == n.config.name {
			once()
		}
	}
	_, err := n.config.informers.Core().V1().Nodes().Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: seen, UpdateFunc: func(_, obj any) { seen(obj) },
	})
	return err
}

// closeTimeout bounds how long a stopping node waits for its runtime.
const closeTimeout = 10 * time.Second

// close lets go of images and runtime; containers go on under their shim.
func (n *node) close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
	defer cancel()
	return errors.Join(n.runtime.Close(ctx), n.images.Close())
}

// podNetwork adapts the pod network to the runtime's interface.
type podNetwork struct{ network *pod.Network }

// SetUp implements noderuntime.Network.
func (p podNetwork) SetUp(ctx context.Context, req noderuntime.NetworkRequest) (noderuntime.NetworkStatus, error) {
	result, err := p.network.SetUp(ctx, request(req))
	return noderuntime.NetworkStatus{IPs: result.IPs}, err
}

// TearDown implements noderuntime.Network.
func (p podNetwork) TearDown(ctx context.Context, req noderuntime.NetworkRequest) error {
	return p.network.TearDown(ctx, request(req))
}

func request(req noderuntime.NetworkRequest) pod.Request {
	out := pod.Request{SandboxID: req.SandboxID, Namespace: req.Namespace, Name: req.Name, UID: req.UID, NetnsPath: req.NetnsPath}
	for _, m := range req.PortMappings {
		out.PortMappings = append(out.PortMappings, pod.PortMapping{
			Protocol:      corev1.Protocol(m.Protocol.String()),
			ContainerPort: uint16(m.ContainerPort),
			HostPort:      uint16(m.HostPort),
			HostIP:        m.HostIp,
		})
	}
	return out
}
