// Package nodens gives further nodes of one machine a network namespace each.
//
// A node's namespace is joined to the machine by a veth pair with a small subnet (10.41.<index>.0/30): .1 is the machine, .2 the node. The node's default
// route leads to the machine, which forwards between nodes; the pod ranges behind a node are routed by package pod on either side. What nodes send to
// the outside is masqueraded by the machine's own agent: give Range to service.Options.MasqueradeSources.
//
// State is what the kernel holds: the namespace pinned at <Dir>/<index>, the link with the alias "knarr node <cluster> <index>". So set-up repairs a partly
// dead cluster, and tear-down works by name after a crash. No default route and no internet is needed.
package nodens

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	vns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"knarr/network/netns"
	"knarr/network/sysctl"
)

const (
	nodeLink   = "eth0"
	defaultMTU = 1500 // bytes, on a machine without a default route
	maxIndex   = 255  // highest index of a node
)

// DefaultRange holds the subnets of the links between the machine and its nodes.
var DefaultRange = netip.MustParsePrefix("10.41.0.0/16")

// Options says where the nodes of a cluster are. The same options find them again later.
type Options struct {
	Cluster string          // name of the cluster; no spaces
	Dir     string          // where namespaces are pinned, such as /run/knarr/<cluster>/netns
	Range   netip.Prefix    // subnets of the links; the zero value is DefaultRange
	HostNS  string          // path of the machine's namespace; "" is that of the process
	Sysctl  sysctl.Recorder // its NetNS is overwritten, its Owner gets the suffix .nodens
}

// Node is one node's namespace.
type Node struct {
	Index    int        // 1 to 255; the machine itself is node 0
	NetNS    string     // path of the pinned namespace
	HostLink string     // the machine's end of the link
	Address  netip.Addr // the node's address: its InternalIP
	Gateway  netip.Addr // the machine's address on the link; for pod.Options.Gateway
}

// linkRange is Options.Range with its default.
func (o Options) linkRange() netip.Prefix {
	if !o.Range.IsValid() {
		return DefaultRange
	}
	return o.Range.Masked()
}

func (o Options) alias(index int) string {
	return fmt.Sprintf("knarr node %s %d", o.Cluster, index)
}

func (o Options) recorder() sysctl.Recorder {
	r := o.Sysctl
	r.NetNS = o.HostNS
	r.Owner += ".nodens"
	return r
}

// Describe computes what node index has, without looking whether it is there.
func Describe(o Options, index int) (Node, error) {
	r := o.linkRange()
	if index < 1 || index > maxIndex {
		return Node{}, fmt.Errorf("node namespaces: index %d is not between 1 and %d", index, maxIndex)
	}
	step := 256
	if r.Bits() > 16 {
		step = 4
	}
	base := r.Addr().As4()
	sum := uint32(base[0])<<24 | uint32(base[1])<<16 | uint32(base[2])<<8 | uint32(base[3])
	sum += uint32(index * step)
	at := func(n uint32) netip.Addr {
		return netip.AddrFrom4([4]byte{byte((sum + n) >> 24), byte((sum + n) >> 16), byte((sum + n) >> 8), byte(sum + n)})
	}
	if !r.Contains(at(3)) {
		return Node{}, fmt.Errorf("node namespaces: the link range %s is too small for node %d", r, index)
	}
	hash := sha256.Sum256([]byte(o.Cluster))
	return Node{
		Index: index, NetNS: filepath.Join(o.Dir, strconv.Itoa(index)),
		HostLink: fmt.Sprintf("knode%d-%s", index, hex.EncodeToString(hash[:3])),
		Address:  at(2), Gateway: at(1),
	}, nil
}

// subnet is the link's /30.
func (n Node) subnet() netip.Prefix { return netip.PrefixFrom(n.Gateway, 30).Masked() }

// SetUp makes what is missing of the namespace and link of node index, and turns forwarding on. After an error nothing of this node is left.
func SetUp(o Options, index int) (Node, error) {
	if !o.linkRange().Addr().Is4() {
		return Node{}, fmt.Errorf("node namespaces: the link range %s is not IPv4", o.linkRange())
	}
	n, err := Describe(o, index)
	if err != nil {
		return n, err
	}
	h, err := handleAt(o.HostNS)
	if err != nil {
		return n, err
	}
	defer h.Close()
	if err := checkCollision(h, o, n); err != nil {
		return n, err
	}
	if err := setUp(h, o, n); err != nil {
		return n, errors.Join(fmt.Errorf("node namespaces: set up node %d: %w", index, err), TearDown(o, index))
	}
	return n, nil
}

func setUp(h *netlink.Handle, o Options, n Node) error {
	if err := o.recorder().Set("net/ipv4/ip_forward", "1"); err != nil {
		return err
	}
	if err := netns.Create(n.NetNS, nil); err != nil {
		return err
	}
	ns, err := netns.Open(n.NetNS)
	if err != nil {
		return err
	}
	defer ns.Close()
	nh, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer nh.Close()
	host, err := makeLink(h, nh, o, n, ns)
	if err != nil {
		return err
	}
	if err := configure(h, host, n.Gateway); err != nil {
		return err
	}
	if err := configureNode(nh, n); err != nil {
		return err
	}
	hostNS, err := netns.Open(o.HostNS)
	if err != nil {
		return err
	}
	defer hostNS.Close()
	return netns.WaitUp(hostNS, h, host.Attrs().Index)
}

// makeLink makes the veth, or keeps the one that is there when both ends are.
func makeLink(h, nh *netlink.Handle, o Options, n Node, ns vns.NsHandle) (netlink.Link, error) {
	if host, err := h.LinkByName(n.HostLink); err == nil {
		if peer, err := nh.LinkByName(nodeLink); err == nil && peer.Attrs().ParentIndex == host.Attrs().Index {
			return host, nil
		}
		if err := h.LinkDel(host); err != nil {
			return nil, fmt.Errorf("delete the half link %s: %w", n.HostLink, err)
		}
	}
	mtu := uplinkMTU(h)
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = n.HostLink, mtu
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerMTU, veth.PeerNamespace = nodeLink, uint32(mtu), netlink.NsFd(int(ns))
	if err := h.LinkAdd(veth); err != nil {
		return nil, fmt.Errorf("make link %s: %w", n.HostLink, err)
	}
	if err := h.LinkSetAlias(veth, o.alias(n.Index)); err != nil {
		return nil, fmt.Errorf("name link %s: %w", n.HostLink, err)
	}
	return veth, nil
}

// configure gives a link its address of a /30 and brings it up.
func configure(h *netlink.Handle, link netlink.Link, ip netip.Addr) error {
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(30, 32)}}
	if err := h.AddrReplace(link, addr); err != nil {
		return fmt.Errorf("give %s the address %s: %w", link.Attrs().Name, ip, err)
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring %s up: %w", link.Attrs().Name, err)
	}
	return nil
}

func configureNode(nh *netlink.Handle, n Node) error {
	lo, err := nh.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := nh.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring the loopback link up: %w", err)
	}
	link, err := nh.LinkByName(nodeLink)
	if err != nil {
		return err
	}
	if err := configure(nh, link, n.Address); err != nil {
		return err
	}
	all := &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}
	if err := nh.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: all, Gw: n.Gateway.AsSlice()}); err != nil {
		return fmt.Errorf("set the node's default route: %w", err)
	}
	return nil
}

// checkCollision reports a route or address of the machine, not ours, that overlaps the node's subnet.
func checkCollision(h *netlink.Handle, o Options, n Node) error {
	routes, err := netns.Dump(func() ([]netlink.Route, error) { return h.RouteList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return fmt.Errorf("node namespaces: list routes: %w", err)
	}
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		ip, _ := netip.AddrFromSlice(r.Dst.IP)
		ones, _ := r.Dst.Mask.Size()
		dst := netip.PrefixFrom(ip.Unmap(), ones)
		if ones == 0 || !dst.Overlaps(n.subnet()) {
			continue
		}
		name := "?"
		if l, err := h.LinkByIndex(r.LinkIndex); err == nil {
			name = l.Attrs().Name
			if l.Attrs().Alias == o.alias(n.Index) {
				continue
			}
		}
		return fmt.Errorf("node namespaces: node %d needs %s, but the machine already routes %s to link %s: choose another link range", n.Index, n.subnet(), dst, name)
	}
	return nil
}

// TearDown deletes the link and the namespace of node index. Processes inside keep a namespace without links until they end. What is not there is no error.
func TearDown(o Options, index int) error {
	n, err := Describe(o, index)
	if err != nil {
		return err
	}
	h, err := handleAt(o.HostNS)
	if err != nil {
		return err
	}
	defer h.Close()
	errs := []error{netns.Delete(n.NetNS)}
	link, err := h.LinkByName(n.HostLink)
	var missing netlink.LinkNotFoundError
	switch {
	case errors.As(err, &missing):
	case err != nil:
		errs = append(errs, fmt.Errorf("node namespaces: find link %s: %w", n.HostLink, err))
	default:
		if err := h.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, fmt.Errorf("node namespaces: delete link %s: %w", n.HostLink, err))
		}
	}
	return errors.Join(errs...)
}

// List returns the indexes of the nodes of which anything is there, link or namespace, in order.
func List(o Options) ([]int, error) {
	var found []int
	entries, err := os.ReadDir(o.Dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("node namespaces: %w", err)
	}
	for _, e := range entries {
		if i, err := strconv.Atoi(e.Name()); err == nil {
			found = append(found, i)
		}
	}
	h, err := handleAt(o.HostNS)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	links, err := netns.Dump(h.LinkList)
	if err != nil {
		return nil, fmt.Errorf("node namespaces: list links: %w", err)
	}
	prefix := strings.TrimSuffix(o.alias(0), "0")
	for _, l := range links {
		if s, ok := strings.CutPrefix(l.Attrs().Alias, prefix); ok {
			if i, err := strconv.Atoi(s); err == nil {
				found = append(found, i)
			}
		}
	}
	slices.Sort(found)
	return slices.Compact(found), nil
}

// Purge tears all nodes of the cluster down and puts the machine's settings back. Purging twice is no error.
func Purge(o Options) error {
	nodes, err := List(o)
	errs := []error{err}
	for _, i := range nodes {
		errs = append(errs, TearDown(o, i))
	}
	if err := os.Remove(o.Dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, fmt.Errorf("node namespaces: %w", err))
	}
	return errors.Join(append(errs, o.recorder().Restore())...)
}

func handleAt(path string) (*netlink.Handle, error) {
	ns, err := netns.Open(path)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("node namespaces: open a route socket: %w", err)
	}
	return h, nil
}

// uplinkMTU is the MTU of the default route's link, in bytes.
func uplinkMTU(h *netlink.Handle) int {
	routes, err := netns.Dump(func() ([]netlink.Route, error) { return h.RouteList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return defaultMTU
	}
	for _, r := range routes {
		ones := 0
		if r.Dst != nil {
			ones, _ = r.Dst.Mask.Size()
		}
		if ones != 0 {
			continue
		}
		if l, err := h.LinkByIndex(r.LinkIndex); err == nil {
			return l.Attrs().MTU
		}
	}
	return defaultMTU
}
