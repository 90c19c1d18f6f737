package pod

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/labels"

	"knarr/network"
	"knarr/network/netns"
	"knarr/network/sysctl"
)

const (
	vxlanLink     = "knarr-vxlan"
	vxlanID       = 4242 // VXLAN network identifier
	vxlanPort     = 8472 // UDP port, the one Linux had before the standard's 4789, free of NIC offload surprises
	vxlanOverhead = 50   // bytes: outer Ethernet, IPv4, UDP and VXLAN headers
)

// peer is another node: where its pods are and how it is reached.
type peer struct {
	name   string
	ranges []netip.Prefix
	ips    []netip.Addr
}

// hop is the decision how the ranges of a peer are reached in one family.
type hop struct {
	dst   netip.Prefix
	via   netip.Addr
	vxlan bool // via is the peer's address under the tunnel
}

// routingChanged says whether an update of a Node can change routes: heartbeats do not.
func routingChanged(a, b *v1.Node) bool {
	return !slices.Equal(a.Spec.PodCIDRs, b.Spec.PodCIDRs) || a.Spec.PodCIDR != b.Spec.PodCIDR || !equality.Semantic.DeepEqual(a.Status.Addresses, b.Status.Addresses)
}

// nodeRanges are the pod ranges of a Node, without those that cannot be read.
func nodeRanges(node *v1.Node) []netip.Prefix {
	cidrs := node.Spec.PodCIDRs
	if len(cidrs) == 0 && node.Spec.PodCIDR != "" {
		cidrs = []string{node.Spec.PodCIDR}
	}
	var out []netip.Prefix
	for _, c := range cidrs {
		if p, err := netip.ParsePrefix(c); err == nil {
			out = append(out, p.Masked())
		}
	}
	return out
}

func internalIPs(node *v1.Node) []netip.Addr {
	var out []netip.Addr
	for _, a := range node.Status.Addresses {
		if ip, err := netip.ParseAddr(a.Address); err == nil && a.Type == v1.NodeInternalIP {
			out = append(out, ip.Unmap())
		}
	}
	return out
}

func (n *Network) ownRanges() []netip.Prefix {
	node, err := n.nodes.Get(n.opt.NodeName)
	if err != nil {
		return nil
	}
	return nodeRanges(node)
}

// plan decides, without side effects, how each peer's ranges are reached. onLink says whether an address is on a link of this node.
func plan(peers []peer, gateway netip.Addr, onLink func(netip.Addr) bool) []hop {
	var hops []hop
	for _, p := range peers {
		for _, r := range p.ranges {
			i := slices.IndexFunc(p.ips, func(ip netip.Addr) bool { return ip.Is4() == r.Addr().Is4() })
			switch {
			case gateway.IsValid() && gateway.Is4() == r.Addr().Is4():
				hops = append(hops, hop{dst: r, via: gateway})
			case i < 0: // no address in this family: not reachable
			case onLink(p.ips[i]):
				hops = append(hops, hop{dst: r, via: p.ips[i]})
			default:
				hops = append(hops, hop{dst: r, via: p.ips[i], vxlan: true})
			}
		}
	}
	return hops
}

// syncRoutes installs the routes to all peers and removes those of peers that are gone.
func (n *Network) syncRoutes(h *netlink.Handle) error {
	nodes, err := n.nodes.List(labels.Everything())
	if err != nil {
		return err
	}
	var peers []peer
	for _, node := range nodes {
		if node.Name != n.opt.NodeName {
			peers = append(peers, peer{node.Name, nodeRanges(node), internalIPs(node)})
		}
	}
	hops := plan(peers, n.opt.Gateway, func(ip netip.Addr) bool { return onLink(h, ip) })
	var errs []error
	want := map[netip.Prefix]bool{}
	tunnel := false
	for _, hp := range hops {
		want[hp.dst] = true
		tunnel = tunnel || hp.vxlan
		errs = append(errs, n.installHop(h, hp))
	}
	errs = append(errs, n.removeStale(h, want))
	if !tunnel {
		errs = append(errs, deleteLink(h, vxlanLink))
	}
	return errors.Join(errs...)
}

func (n *Network) installHop(h *netlink.Handle, hp hop) error {
	route := &netlink.Route{Dst: ipNet(hp.dst), Gw: hp.via.AsSlice(), Protocol: network.RouteProtocol}
	if hp.vxlan {
		link, err := n.tunnelTo(h, hp)
		if err != nil {
			return err
		}
		route.LinkIndex, route.Gw, route.Flags = link.Attrs().Index, hp.dst.Addr().AsSlice(), int(netlink.FLAG_ONLINK)
		route.MTU = link.Attrs().MTU
	}
	for _, r := range n.ranges {
		if r.Addr().Is4() == hp.dst.Addr().Is4() {
			route.Src = NodeAddress(r).AsSlice()
		}
	}
	if err := h.RouteReplace(route); err != nil {
		return fmt.Errorf("pod network: route %s through %s: %w", hp.dst, hp.via, err)
	}
	return nil
}

// tunnelTo makes the VXLAN link where it is missing and teaches it the way to one peer. The peer's hardware address and tunnel address follow from
// its InternalIP and range, so that nodes need to exchange nothing.
func (n *Network) tunnelTo(h *netlink.Handle, hp hop) (netlink.Link, error) {
	link, err := h.LinkByName(vxlanLink)
	if isNotFound(err) {
		link, err = n.makeTunnel(h)
	}
	if err != nil {
		return nil, fmt.Errorf("pod network: link %s: %w", vxlanLink, err)
	}
	mac := podMAC(hp.via)
	if err := h.NeighSet(permanentNeighbour(link, hp.dst.Addr(), mac)); err != nil {
		return nil, fmt.Errorf("pod network: neighbour %s on %s: %w", hp.dst.Addr(), vxlanLink, err)
	}
	fdb := &netlink.Neigh{LinkIndex: link.Attrs().Index, Family: unix.AF_BRIDGE, State: netlink.NUD_PERMANENT, Flags: netlink.NTF_SELF, IP: hp.via.AsSlice(), HardwareAddr: mac}
	if err := h.NeighSet(fdb); err != nil {
		return nil, fmt.Errorf("pod network: forwarding entry for %s on %s: %w", hp.via, vxlanLink, err)
	}
	return link, nil
}

func (n *Network) makeTunnel(h *netlink.Handle) (netlink.Link, error) {
	if len(n.opt.NodeIPs) == 0 {
		return nil, errors.New("this node has no address for it")
	}
	own := n.opt.NodeIPs[0]
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = vxlanLink, n.mtu-vxlanOverhead, podMAC(own)
	if own.Is6() {
		attrs.MTU -= 20 // bytes: the outer header is IPv6
	}
	vx := &netlink.Vxlan{LinkAttrs: attrs, VxlanId: vxlanID, Port: vxlanPort, SrcAddr: own.AsSlice(), Learning: false}
	if err := h.LinkAdd(vx); err != nil {
		return nil, err
	}
	if err := quietIPv6(h, vx); err != nil {
		return nil, err
	}
	if err := h.LinkSetUp(vx); err != nil {
		return nil, err
	}
	return h.LinkByName(vxlanLink)
}

// removeStale deletes our routes to ranges of other nodes that are not wanted any more. Pods' host routes are not gateway routes and stay.
func (n *Network) removeStale(h *netlink.Handle, want map[netip.Prefix]bool) error {
	routes, err := ourRoutes(h)
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range routes {
		dst, ok := prefixOf(r.Dst)
		if r.Gw == nil || !ok || want[dst] || !overlapsAny(dst, n.opt.ClusterCIDRs) {
			continue
		}
		errs = append(errs, h.RouteDel(&r))
	}
	return errors.Join(errs...)
}

// ourRoutes are the routes that carry our protocol number, in both families.
func ourRoutes(h *netlink.Handle) ([]netlink.Route, error) {
	routes, err := netns.Dump(func() ([]netlink.Route, error) {
		return h.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Protocol: network.RouteProtocol}, netlink.RT_FILTER_PROTOCOL)
	})
	if err != nil {
		return nil, fmt.Errorf("pod network: list routes: %w", err)
	}
	return routes, nil
}

// checkCollisions reports routes and addresses of the machine, made by somebody else, that lie in the cluster's pod ranges.
func (n *Network) checkCollisions(h *netlink.Handle) error {
	routes, err := netns.Dump(func() ([]netlink.Route, error) { return h.RouteList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("pod network: list routes: %w", err)
	}
	for _, r := range routes {
		dst, ok := prefixOf(r.Dst)
		if !ok || dst.Bits() == 0 || r.Protocol == network.RouteProtocol || !overlapsAny(dst, n.opt.ClusterCIDRs) {
			continue
		}
		name := "?"
		if l, err := h.LinkByIndex(r.LinkIndex); err == nil {
			name = l.Attrs().Name
		}
		return fmt.Errorf("pod network: the machine already routes %s to link %s, which lies in the cluster's pod range %v: choose another range or remove that route", dst, name, n.opt.ClusterCIDRs)
	}
	return nil
}

// onLink says whether ip is a neighbour on one of the node's links: the route to it has no gateway.
func onLink(h *netlink.Handle, ip netip.Addr) bool {
	routes, err := h.RouteGet(ip.AsSlice())
	return err == nil && len(routes) > 0 && routes[0].Gw == nil && routes[0].Type != unix.RTN_LOCAL
}

// uplinkMTU is the MTU of the link of the default route, in bytes; without one that of the first link that is up, else defaultMTU.
func uplinkMTU(h *netlink.Handle) int {
	routes, err := netns.Dump(func() ([]netlink.Route, error) { return h.RouteList(nil, netlink.FAMILY_ALL) })
	if err == nil {
		for _, r := range routes {
			if dst, ok := prefixOf(r.Dst); ok && dst.Bits() == 0 {
				if l, err := h.LinkByIndex(r.LinkIndex); err == nil {
					return l.Attrs().MTU
				}
			}
		}
	}
	return defaultMTU
}

// Purge deletes everything this package made on the node, also in an earlier process: links by their alias, routes by their protocol number and range, the
// node's own addresses, the address files; kernel settings are put back. Without it everything stays, so that the next agent takes over.
// It needs Cluster, StateDir, NetNS and Sysctl of opt; the ranges are those of the last start unless ClusterCIDRs says others. Nothing of the node may
// run any more. Purging twice is no error.
func Purge(opt Options) error {
	h, err := openHandle(opt.NetNS)
	if err != nil {
		return err
	}
	defer h.Close()
	if len(opt.ClusterCIDRs) == 0 {
		if opt.ClusterCIDRs, err = readRanges(opt.StateDir); err != nil {
			return err
		}
	}
	errs := []error{deleteLink(h, vxlanLink)}
	links, err := netns.Dump(h.LinkList)
	errs = append(errs, err)
	for _, l := range links {
		if strings.HasPrefix(l.Attrs().Alias, aliasPrefix(opt.Cluster)) {
			errs = append(errs, deleteLink(h, l.Attrs().Name))
		}
	}
	errs = append(errs, purgeRoutes(h, opt), purgeAddresses(h, opt))
	if err := os.RemoveAll(opt.StateDir); err != nil {
		errs = append(errs, fmt.Errorf("pod network: %w", err))
	}
	return errors.Join(append(errs, recorder(opt).Restore())...)
}

// rangesFile, in the state directory, holds the ranges that were given to the kernel, one to a line.
const rangesFile = "ranges"

func writeRanges(dir string, ranges []netip.Prefix) error {
	var b strings.Builder
	for _, r := range ranges {
		fmt.Fprintln(&b, r)
	}
	if err := os.WriteFile(filepath.Join(dir, rangesFile), []byte(b.String()), 0o600); err != nil {
		return fmt.Errorf("pod network: keep the ranges: %w", err)
	}
	return nil
}

// readRanges is empty where the pod network has never been started.
func readRanges(dir string) (out []netip.Prefix, err error) {
	b, err := os.ReadFile(filepath.Join(dir, rangesFile))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("pod network: %w", err)
	}
	for _, line := range strings.Fields(string(b)) {
		if p, err := netip.ParsePrefix(line); err == nil {
			out = append(out, p)
		}
	}
	return out, nil
}

// recorder is the recorder of kernel settings under a name of this package.
func recorder(opt Options) sysctl.Recorder {
	r := opt.Sysctl
	r.NetNS = opt.NetNS
	r.Owner += ".pod"
	return r
}

func purgeRoutes(h *netlink.Handle, opt Options) error {
	routes, err := ourRoutes(h)
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range routes {
		if dst, ok := prefixOf(r.Dst); ok && overlapsAny(dst, opt.ClusterCIDRs) {
			if err := h.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
				errs = append(errs, fmt.Errorf("pod network: delete route %s: %w", dst, err))
			}
		}
	}
	return errors.Join(errs...)
}

// purgeAddresses removes the node's own addresses in the pod ranges from the loopback link.
func purgeAddresses(h *netlink.Handle, opt Options) error {
	lo, err := h.LinkByName("lo")
	if err != nil {
		return err
	}
	addrs, err := netns.Dump(func() ([]netlink.Addr, error) { return h.AddrList(lo, netlink.FAMILY_ALL) })
	if err != nil {
		return err
	}
	var errs []error
	for _, a := range addrs {
		if p, ok := prefixOf(a.IPNet); ok && overlapsAny(p, opt.ClusterCIDRs) {
			errs = append(errs, h.AddrDel(lo, &a))
		}
	}
	return errors.Join(errs...)
}

// unreachable is a route that answers packets for p with ICMP where no more specific route exists.
func unreachable(p netip.Prefix) *netlink.Route {
	r := &netlink.Route{Dst: ipNet(p.Masked()), Type: unix.RTN_UNREACHABLE, Protocol: network.RouteProtocol}
	if p.Addr().Is6() {
		r.LinkIndex = 1 // the kernel hangs IPv6 reject routes on the loopback link
	}
	return r
}

// prefixOf converts n; ok is false for nil and for addresses that are neither IPv4 nor IPv6.
func prefixOf(n *net.IPNet) (p netip.Prefix, ok bool) {
	if n == nil {
		return p, false
	}
	ip, ok := netip.AddrFromSlice(n.IP)
	ones, bits := n.Mask.Size()
	if !ok || bits == 0 {
		return p, false
	}
	if bits == 32 {
		ip = ip.Unmap()
	}
	return netip.PrefixFrom(ip, ones), true
}

func overlapsAny(p netip.Prefix, ranges []netip.Prefix) bool {
	return slices.ContainsFunc(ranges, p.Overlaps)
}
