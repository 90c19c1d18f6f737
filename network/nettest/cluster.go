package nettest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"

	"knarr/network"
	"knarr/network/nodens"
	"knarr/network/pod"
	"knarr/network/sysctl"
)

// Addresses of the topology.
const (
	OutsideIP  = "198.51.100.1" // the machine's default gateway, in the namespace Outside
	MachineIP  = "198.51.100.2" // node 0
	FarIP      = "203.0.113.9"  // somewhere on the internet: a second address of Outside
	UplinkName = "up0"
)

// ClusterCIDR and ServiceCIDR are the ranges of the test cluster.
var (
	ClusterCIDR = netip.MustParsePrefix("10.42.0.0/16")
	ServiceCIDR = netip.MustParsePrefix("10.43.0.0/16")
)

// Cluster is a machine with an uplink, further nodes in namespaces of it, and their pod networks, on a fake API.
type Cluster struct {
	Outside   string // namespace behind the uplink
	Machine   string // namespace of the machine, which is node 0
	Client    *fake.Clientset
	Informers informers.SharedInformerFactory
	Nodes     []*Node

	t    testing.TB
	ctx  context.Context
	opts nodens.Options
	pods int
	wg   sync.WaitGroup
}

// Node is one node of a Cluster.
type Node struct {
	Name    string
	NetNS   string
	IP      netip.Addr
	PodCIDR netip.Prefix
	Options pod.Options
	Pods    *pod.Network // nil before Start
}

// Pod is a pod of a Cluster.
type Pod struct {
	ID    string
	NetNS string
	IP    netip.Addr
}

// NewCluster makes the machine and further nodes. Informer users register next, then Start is called. objects are in the API from the beginning.
func NewCluster(t testing.TB, furtherNodes int, objects ...runtime.Object) *Cluster {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	c := &Cluster{t: t, ctx: ctx, Outside: NewNS(t, "outside"), Machine: NewNS(t, "machine")}
	t.Cleanup(func() { cancel(); c.wg.Wait(); c.Informers.Shutdown() })
	Connect(t, c.Machine, UplinkName, MachineIP+"/24", c.Outside, "down0", OutsideIP+"/24")
	In(t, c.Outside, func() error { return address("lo", FarIP+"/32") })
	Route(t, c.Machine, "default", OutsideIP)

	c.opts = nodens.Options{
		Cluster: fmt.Sprintf("test%x", rand.Uint32()), Dir: filepath.Join(t.TempDir(), "nodes"), HostNS: c.Machine,
		Sysctl: sysctl.Recorder{Dir: filepath.Join(t.TempDir(), "sysctl"), Owner: "test"},
	}
	c.addNode("node-0", c.Machine, netip.MustParseAddr(MachineIP), netip.Addr{})
	for i := 1; i <= furtherNodes; i++ {
		n, err := nodens.SetUp(c.opts, i)
		require.NoError(t, err)
		c.addNode(fmt.Sprintf("node-%d", i), n.NetNS, n.Address, n.Gateway)
	}
	t.Cleanup(func() { require.NoError(t, nodens.Purge(c.opts)) })
	for _, n := range c.Nodes {
		objects = append(objects, n.Object())
	}
	c.Client = fake.NewClientset(objects...)
	c.Informers = informers.NewSharedInformerFactory(c.Client, 0)
	return c
}

func (c *Cluster) addNode(name, ns string, ip, gateway netip.Addr) {
	i := len(c.Nodes)
	n := &Node{Name: name, NetNS: ns, IP: ip, PodCIDR: netip.MustParsePrefix(fmt.Sprintf("10.42.%d.0/24", i))}
	n.Options = pod.Options{
		NodeName: name, Cluster: c.opts.Cluster, StateDir: filepath.Join(c.t.TempDir(), "pods"), NetNS: ns,
		ClusterCIDRs: []netip.Prefix{ClusterCIDR}, NodeIPs: []netip.Addr{ip}, Gateway: gateway, Sysctl: c.opts.Sysctl,
	}
	c.Nodes = append(c.Nodes, n)
}

// AddMachine adds a node that is a machine of its own, in a namespace that the test has connected. Call it before Start.
func (c *Cluster) AddMachine(name, ns string, ip netip.Addr) {
	c.t.Helper()
	c.addNode(name, ns, ip, netip.Addr{})
	require.NoError(c.t, c.Client.Tracker().Add(c.Nodes[len(c.Nodes)-1].Object()))
}

// Object is the node's Node object.
func (n *Node) Object() *v1.Node {
	return &v1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: n.Name, Labels: map[string]string{v1.LabelHostname: n.Name}},
		Spec:       v1.NodeSpec{PodCIDRs: []string{n.PodCIDR.String()}, PodCIDR: n.PodCIDR.String()},
		Status:     v1.NodeStatus{Addresses: []v1.NodeAddress{{Type: v1.NodeInternalIP, Address: n.IP.String()}}},
	}
}

// Start makes the pod networks, starts the informers, and returns when pods can be made. hostPorts, one per node, may be nil.
func (c *Cluster) Start(hostPorts ...network.HostPorts) {
	c.t.Helper()
	for i, n := range c.Nodes {
		n.Options.Informers = c.Informers
		if i < len(hostPorts) {
			n.Options.HostPorts = hostPorts[i]
		}
		p, err := pod.New(n.Options)
		require.NoError(c.t, err)
		n.Pods = p
	}
	c.Informers.Start(c.ctx.Done())
	for _, n := range c.Nodes {
		c.Go(n.Pods.Run)
	}
	for _, n := range c.Nodes {
		select {
		case <-n.Pods.Ready():
		case <-time.After(10 * time.Second):
			c.t.Fatalf("the pod network of %s is not ready", n.Name)
		}
	}
}

// Go runs a long-lived part until the test ends and reports its error.
func (c *Cluster) Go(run func(context.Context) error) {
	c.wg.Go(func() {
		if err := run(c.ctx); err != nil {
			c.t.Errorf("a part ended: %v", err)
		}
	})
}

// NewPod makes a pod with a server that says name on port 8080, over TCP and UDP.
func (c *Cluster) NewPod(node int, name string, ports ...pod.PortMapping) Pod {
	c.t.Helper()
	c.pods++
	p := Pod{ID: fmt.Sprintf("%s-%d-%x", name, c.pods, rand.Uint32()), NetNS: NewNS(c.t, name)}
	res, err := c.Nodes[node].Pods.SetUp(c.ctx, pod.Request{SandboxID: p.ID, Namespace: "default", Name: name, NetnsPath: p.NetNS, PortMappings: ports})
	require.NoError(c.t, err)
	p.IP = res.IPs[0]
	Serve(c.t, p.NetNS, name, 8080)
	return p
}
