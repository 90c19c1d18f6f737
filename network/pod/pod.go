// Package pod is the pod network of one node.
//
// A pod has a veth pair: its end is eth0 with a /32 (and /128) address, the node's end has a host route to that address; there is no bridge. The pod's
// default route leads to a link-local gateway whose hardware address is a permanent neighbour entry, and the node knows the pod's: no ARP
// and no neighbour discovery is ever sent. The node owns the first address of its range (10.42.0.1), on the loopback link: it is the source of
// what the node itself sends to pods, so that pods can answer on machines with no other address.
//
// The whole range of the cluster and that of the node are "unreachable" routes under the more specific ones of pods and nodes: a packet for an
// address that nobody has is answered with ICMP here and never leaves by the default route.
//
// Routes to other nodes' ranges follow the Node objects: through the node's InternalIP where it is on a shared link, through the machine that hosts
// us where we are a namespace of it (Options.Gateway), over VXLAN (link knarr-vxlan, made when the first such node appears) otherwise.
//
// What survives a crash: one file per sandbox with its addresses, link aliases "knarr pod <cluster> <sandbox>", routes with network.RouteProtocol.
package pod

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/client-go/informers"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"

	"knarr/network"
	"knarr/network/netns"
	"knarr/network/sysctl"
)

// Options says what the pod network of a node is made of. All fields are read-only after New.
type Options struct {
	NodeName string // name of this node's Node object
	Cluster  string // name of the cluster, in link aliases; no spaces
	StateDir string // directory of the address files, made where missing

	NetNS string // path of the node's network namespace; "" is that of the process

	ClusterCIDRs []netip.Prefix // pod ranges of the whole cluster, at most one per family
	PodCIDRs     []netip.Prefix // this node's ranges; nil: taken from the Node object when it has them

	NodeIPs []netip.Addr // this node's addresses, the underlay of VXLAN; nil without VXLAN
	Gateway netip.Addr   // set on a node that is a namespace of a machine: other nodes are reached through it
	MTU     int          // bytes; 0: that of the uplink (the default route's link), 1500 without one

	Informers informers.SharedInformerFactory // Nodes; nil: no routes to other nodes, PodCIDRs required
	HostPorts network.HostPorts               // nil: pods with host ports are refused
	Sysctl    sysctl.Recorder                 // its NetNS is overwritten, its Owner gets the suffix .pod
	Log       *slog.Logger                    // nil: slog.Default
}

// PortMapping is a host port of a pod.
type PortMapping struct {
	Protocol      v1.Protocol `json:"protocol,omitempty"` // "" is TCP
	ContainerPort uint16      `json:"containerPort"`
	HostPort      uint16      `json:"hostPort"` // 0: no host port, the mapping is ignored
	HostIP        string      `json:"hostIP,omitempty"`
}

// Request names a pod sandbox. TearDown needs SandboxID only.
type Request struct {
	SandboxID    string
	Namespace    string
	Name         string
	UID          string
	NetnsPath    string // where the sandbox's network namespace is pinned
	PortMappings []PortMapping
}

// Result is what a sandbox has after SetUp.
type Result struct {
	IPs       []netip.Addr // one per range, the primary family first
	Interface string       // name of the link inside the pod
	MTU       int          // bytes
}

// Network is the pod network of one node. Its methods may be called concurrently, also for one sandbox.
type Network struct {
	opt   Options
	log   *slog.Logger
	ipam  *ipam
	nodes corelisters.NodeLister // nil without informers
	wake  chan struct{}          // one pending change of Nodes
	ready chan struct{}          // closed when the node's ranges are known and its routes are there
	locks keyLocks

	mu      sync.Mutex
	started bool
	ranges  []netip.Prefix
	mtu     int
}

// New reads the address files, announces their host ports, and registers for Nodes. It touches no link or route: Run does.
func New(opt Options) (*Network, error) {
	if opt.Informers == nil && len(opt.PodCIDRs) == 0 {
		return nil, errors.New("pod network: neither pod ranges nor an informer to learn them from")
	}
	if opt.Log == nil {
		opt.Log = slog.Default()
	}
	opt.Sysctl = recorder(opt)
	files, err := openIPAM(opt.StateDir)
	if err != nil {
		return nil, err
	}
	n := &Network{opt: opt, log: opt.Log.With("part", "pod-network"), ipam: files, wake: make(chan struct{}, 1), ready: make(chan struct{})}
	for _, rec := range files.all() {
		if err := n.setHostPorts(context.Background(), rec); err != nil {
			return nil, err
		}
	}
	if opt.Informers != nil {
		if err := n.watchNodes(opt.Informers); err != nil {
			return nil, err
		}
	}
	return n, nil
}

func (n *Network) watchNodes(f informers.SharedInformerFactory) error {
	inf := f.Core().V1().Nodes()
	n.nodes = inf.Lister()
	poke := func() {
		select {
		case n.wake <- struct{}{}:
		default:
		}
	}
	_, err := inf.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { poke() },
		UpdateFunc: func(a, b any) {
			if routingChanged(a.(*v1.Node), b.(*v1.Node)) {
				poke()
			}
		},
		DeleteFunc: func(any) { poke() },
	})
	if err != nil {
		return fmt.Errorf("pod network: watch nodes: %w", err)
	}
	return nil
}

// Run keeps the node's ranges and the routes to other nodes right until ctx ends. It returns an error at once when the ranges collide with routes
// of the machine. Ending it leaves everything in place: see Purge.
func (n *Network) Run(ctx context.Context) error {
	h, err := n.handle()
	if err != nil {
		return err
	}
	defer h.Close()
	if err := n.checkCollisions(h); err != nil {
		return err
	}
	for {
		if err := n.sync(h); err != nil {
			n.log.Error("routes are not complete; the next change of a node tries again", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-n.wake:
		}
	}
}

// Ready is closed when the node's ranges are known and pods can be set up.
func (n *Network) Ready() <-chan struct{} { return n.ready }

// sync brings links and routes to what the Node objects say.
func (n *Network) sync(h *netlink.Handle) error {
	if err := n.start(h); err != nil {
		return err
	}
	if n.nodes == nil {
		return nil
	}
	return n.syncRoutes(h)
}

// start learns the ranges and prepares the node, once.
func (n *Network) start(h *netlink.Handle) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.started {
		return nil
	}
	ranges := n.opt.PodCIDRs
	if len(ranges) == 0 {
		if ranges = n.ownRanges(); len(ranges) == 0 {
			return nil // the Node has none yet; its next change comes here again
		}
	}
	if err := n.prepareNode(h, ranges); err != nil {
		return err
	}
	n.mtu = n.opt.MTU
	if n.mtu == 0 {
		n.mtu = uplinkMTU(h)
	}
	n.ranges, n.started = ranges, true
	n.ipam.setRanges(ranges)
	close(n.ready)
	return nil
}

// prepareNode turns forwarding on and installs the node's own address and the unreachable routes.
func (n *Network) prepareNode(h *netlink.Handle, ranges []netip.Prefix) error {
	all := append(slices.Clone(n.opt.ClusterCIDRs), ranges...)
	if err := writeRanges(n.opt.StateDir, all); err != nil { // first: Purge finds by it what follows
		return err
	}
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("pod network: find the loopback link: %w", err)
	}
	if err := h.LinkSetUp(lo); err != nil {
		return fmt.Errorf("pod network: bring the loopback link up: %w", err)
	}
	for _, r := range ranges {
		key := "net/ipv4/ip_forward"
		if r.Addr().Is6() {
			key = "net/ipv6/conf/all/forwarding"
		}
		if err := n.opt.Sysctl.Set(key, "1"); err != nil {
			return err
		}
		if err := h.AddrReplace(lo, hostAddr(NodeAddress(r))); err != nil {
			return fmt.Errorf("pod network: give the node %s: %w", NodeAddress(r), err)
		}
	}
	for _, r := range all {
		if err := h.RouteReplace(unreachable(r)); err != nil {
			return fmt.Errorf("pod network: make unassigned addresses of %s unreachable: %w", r, err)
		}
	}
	return nil
}

// SetUp gives the sandbox its link and addresses, and its host ports. It waits for the node's ranges, at most until ctx ends. Calling it again for the same
// sandbox repairs what is missing and gives the same addresses. After an error nothing is left.
func (n *Network) SetUp(ctx context.Context, req Request) (Result, error) {
	select {
	case <-n.ready:
	default:
		select {
		case <-n.ready:
		case <-ctx.Done():
			return Result{}, fmt.Errorf("pod network: node %s has no pod range yet: %w", n.opt.NodeName, context.Cause(ctx))
		}
	}
	defer n.locks.lock(req.SandboxID)()
	rec, err := n.ipam.allocate(record{
		SandboxID: req.SandboxID, Namespace: req.Namespace, Name: req.Name, UID: req.UID,
		HostLink: linkName(req.SandboxID), Ports: req.PortMappings,
	})
	if err != nil {
		return Result{}, err
	}
	err = n.connect(rec, req.NetnsPath)
	if err == nil {
		err = n.setHostPorts(ctx, rec)
	}
	if err != nil {
		err = fmt.Errorf("pod network: set up %s/%s: %w", req.Namespace, req.Name, err)
		return Result{}, errors.Join(err, n.tearDownLocked(context.WithoutCancel(ctx), req.SandboxID))
	}
	return Result{IPs: rec.IPs, Interface: podLink, MTU: n.mtu}, nil
}

// TearDown takes the sandbox's link, addresses and host ports away. A sandbox that has none is no error.
func (n *Network) TearDown(ctx context.Context, req Request) error {
	defer n.locks.lock(req.SandboxID)()
	return n.tearDownLocked(ctx, req.SandboxID)
}

func (n *Network) tearDownLocked(ctx context.Context, sandboxID string) error {
	if rec, ok := n.ipam.get(sandboxID); ok && n.opt.HostPorts != nil && len(rec.Ports) > 0 {
		if err := n.opt.HostPorts.RemoveHostPorts(ctx, sandboxID); err != nil {
			return fmt.Errorf("pod network: take the host ports of sandbox %s away: %w", sandboxID, err)
		}
	}
	h, err := n.handle()
	if err != nil {
		return err
	}
	defer h.Close()
	if err := deleteLink(h, linkName(sandboxID)); err != nil {
		return err
	}
	return n.ipam.release(sandboxID)
}

// IPs returns the addresses of a sandbox; ok says whether it has any.
func (n *Network) IPs(sandboxID string) (ips []netip.Addr, ok bool) {
	rec, ok := n.ipam.get(sandboxID)
	return rec.IPs, ok
}

// Reconcile tears down every sandbox that is not in live: call it after a restart, when the runtime knows which sandboxes exist.
func (n *Network) Reconcile(ctx context.Context, live []string) error {
	keep := map[string]bool{}
	for _, id := range live {
		keep[id] = true
	}
	stale := map[string]bool{}
	for _, rec := range n.ipam.all() {
		stale[rec.SandboxID] = !keep[rec.SandboxID]
	}
	h, err := n.handle()
	if err != nil {
		return err
	}
	defer h.Close()
	links, err := netns.Dump(h.LinkList)
	if err != nil {
		return fmt.Errorf("pod network: list links: %w", err)
	}
	for _, l := range links { // a link whose file was never written or is lost
		if id, ok := strings.CutPrefix(l.Attrs().Alias, aliasPrefix(n.opt.Cluster)); ok {
			stale[id] = !keep[id]
		}
	}
	var errs []error
	for id, gone := range stale {
		if gone {
			errs = append(errs, n.TearDown(ctx, Request{SandboxID: id}))
		}
	}
	return errors.Join(errs...)
}

func (n *Network) setHostPorts(ctx context.Context, rec record) error {
	var ports []network.HostPort
	for _, m := range rec.Ports {
		if m.HostPort == 0 {
			continue
		}
		var hostIP netip.Addr
		if m.HostIP != "" {
			ip, err := netip.ParseAddr(m.HostIP)
			if err != nil {
				return fmt.Errorf("host address of port %d: %w", m.HostPort, err)
			}
			hostIP = ip.Unmap()
		}
		for _, ip := range rec.IPs {
			if hostIP.IsValid() && hostIP.Is4() != ip.Is4() {
				continue
			}
			ports = append(ports, network.HostPort{Protocol: m.Protocol, HostIP: hostIP, HostPort: m.HostPort, Target: netip.AddrPortFrom(ip, m.ContainerPort)})
		}
	}
	if len(ports) == 0 {
		return nil
	}
	if n.opt.HostPorts == nil {
		return errors.New("this node's network has no host ports")
	}
	return n.opt.HostPorts.SetHostPorts(ctx, rec.SandboxID, ports)
}

// handle opens a route socket in the node's namespace. The caller closes it.
func (n *Network) handle() (*netlink.Handle, error) { return openHandle(n.opt.NetNS) }

func openHandle(path string) (*netlink.Handle, error) {
	ns, err := netns.Open(path)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("pod network: open a route socket: %w", err)
	}
	return h, nil
}

func aliasPrefix(cluster string) string { return "knarr pod " + cluster + " " }

// linkName is the node's end of the veth of a sandbox: "kn" and 12 hex digits (a link name has at most 15 bytes).
func linkName(sandboxID string) string {
	sum := sha256.Sum256([]byte(sandboxID))
	return "kn" + hex.EncodeToString(sum[:6])
}

// keyLocks serialises work per key. The zero value is ready.
type keyLocks struct {
	mu   sync.Mutex
	held map[string]*keyLock
}

type keyLock struct {
	sync.Mutex
	users int // holders and waiters; guarded by keyLocks.mu
}

// lock blocks until the key is free; the returned function frees it.
func (k *keyLocks) lock(key string) (unlock func()) {
	k.mu.Lock()
	if k.held == nil {
		k.held = map[string]*keyLock{}
	}
	l := k.held[key]
	if l == nil {
		l = &keyLock{}
		k.held[key] = l
	}
	l.users++
	k.mu.Unlock()
	l.Lock()
	return func() {
		l.Unlock()
		k.mu.Lock()
		defer k.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(k.held, key)
		}
	}
}
