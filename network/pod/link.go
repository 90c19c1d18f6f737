package pod

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"knarr/network"
	"knarr/network/netns"
)

const (
	podLink    = "eth0" // the pod's end of the veth
	defaultMTU = 1500   // bytes, on a machine without an uplink
)

// The gateway that pods see. Nobody owns the addresses: the pod has a permanent neighbour entry with the hardware address of the node's end.
var (
	gateway4 = netip.MustParseAddr("169.254.1.1")
	gateway6 = netip.MustParseAddr("fe80::1")
	// hostMAC is the hardware address of the node's end of every veth (locally administered; the links share no segment).
	hostMAC = net.HardwareAddr{0x0e, 0x6b, 0x6e, 0x61, 0x72, 0x72}
)

// podMAC derives the pod's hardware address from its address, so that neither side needs to ask the other.
func podMAC(ip netip.Addr) net.HardwareAddr {
	b := ip.AsSlice()
	return append(net.HardwareAddr{0x0a, 0x58}, b[len(b)-4:]...)
}

// connect makes the veth of rec and configures both ends. A link of an earlier try is kept when it leads into the same namespace, else made anew.
func (n *Network) connect(rec record, netnsPath string) error {
	pod, err := netns.Open(netnsPath)
	if err != nil {
		return err
	}
	defer pod.Close()
	ph, err := netlink.NewHandleAt(pod, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open a route socket in the pod: %w", err)
	}
	defer ph.Close()
	h, err := n.handle()
	if err != nil {
		return err
	}
	defer h.Close()

	host, peer, err := n.makeVeth(h, ph, rec, int(pod))
	if err != nil {
		return err
	}
	if err := configurePod(ph, peer, rec.IPs); err != nil {
		return err
	}
	if err := n.configureHost(h, host, rec.IPs); err != nil {
		return err
	}
	return netns.WaitUp(pod, ph, peer.Attrs().Index)
}

func (n *Network) makeVeth(h, ph *netlink.Handle, rec record, podFD int) (host, peer netlink.Link, err error) {
	if host, err = h.LinkByName(rec.HostLink); err == nil {
		if peer, err = ph.LinkByName(podLink); err == nil && peer.Attrs().ParentIndex == host.Attrs().Index {
			return host, peer, nil
		}
		if err := h.LinkDel(host); err != nil {
			return nil, nil, fmt.Errorf("delete the link of an earlier try: %w", err)
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = rec.HostLink, n.mtu, hostMAC
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerMTU, veth.PeerHardwareAddr = podLink, uint32(n.mtu), podMAC(rec.IPs[0])
	veth.PeerNamespace = netlink.NsFd(podFD)
	if err := h.LinkAdd(veth); err != nil {
		return nil, nil, fmt.Errorf("make the link %s: %w", rec.HostLink, err)
	}
	if err := h.LinkSetAlias(veth, aliasPrefix(n.opt.Cluster)+rec.SandboxID); err != nil {
		return nil, nil, fmt.Errorf("name the link %s: %w", rec.HostLink, err)
	}
	if peer, err = ph.LinkByName(podLink); err != nil {
		return nil, nil, fmt.Errorf("find the pod's link: %w", err)
	}
	return veth, peer, nil
}

// configurePod gives the pod's end its addresses and the default route. Everything is a replace: it may run twice.
func configurePod(ph *netlink.Handle, link netlink.Link, ips []netip.Addr) error {
	lo, err := ph.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find the pod's loopback link: %w", err)
	}
	if err := ph.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring the pod's loopback link up: %w", err)
	}
	if err := quietIPv6(ph, link); err != nil {
		return err
	}
	if err := ph.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring the pod's link up: %w", err)
	}
	for _, ip := range ips {
		if err := ph.AddrReplace(link, hostAddr(ip)); err != nil {
			return fmt.Errorf("give the pod %s: %w", ip, err)
		}
		gw := gateway4
		if ip.Is6() {
			gw = gateway6
		}
		if err := ph.NeighSet(permanentNeighbour(link, gw, hostMAC)); err != nil {
			return fmt.Errorf("set the pod's gateway neighbour: %w", err)
		}
		route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(anyOf(ip)), Gw: gw.AsSlice(), Flags: int(netlink.FLAG_ONLINK)}
		if err := ph.RouteReplace(route); err != nil {
			return fmt.Errorf("set the pod's default route: %w", err)
		}
	}
	return nil
}

// configureHost brings the node's end up and routes the pod's addresses to it.
func (n *Network) configureHost(h *netlink.Handle, link netlink.Link, ips []netip.Addr) error {
	if err := quietIPv6(h, link); err != nil {
		return err
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring %s up: %w", link.Attrs().Name, err)
	}
	for _, ip := range ips {
		if err := h.NeighSet(permanentNeighbour(link, ip, podMAC(ips[0]))); err != nil {
			return fmt.Errorf("set the pod's neighbour entry: %w", err)
		}
		route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(netip.PrefixFrom(ip, ip.BitLen())), Scope: netlink.SCOPE_LINK, Protocol: network.RouteProtocol}
		if src, ok := n.nodeAddressFor(ip); ok {
			route.Src = src.AsSlice()
		}
		if ip.Is6() {
			route.Scope = netlink.SCOPE_UNIVERSE
		}
		if err := h.RouteReplace(route); err != nil {
			return fmt.Errorf("route %s to %s: %w", ip, link.Attrs().Name, err)
		}
	}
	return nil
}

// nodeAddressFor is the node's own address in the range of ip; none for an address of a range that the node has lost.
func (n *Network) nodeAddressFor(ip netip.Addr) (netip.Addr, bool) {
	for _, r := range n.ranges {
		if r.Contains(ip) {
			return NodeAddress(r), true
		}
	}
	return netip.Addr{}, false
}

// quietIPv6 keeps the kernel from giving the link a link-local address: no duplicate address detection delays the pod, and no router
// solicitation is sent. A kernel without IPv6 is fine.
func quietIPv6(h *netlink.Handle, link netlink.Link) error {
	const none = 1 // IN6_ADDR_GEN_MODE_NONE
	err := h.LinkSetIP6AddrGenMode(link, none)
	if err == nil || errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	return fmt.Errorf("switch automatic IPv6 addresses of %s off: %w", link.Attrs().Name, err)
}

// deleteLink deletes a link, and with it its peer, routes and neighbours. A link that is not there is no error.
func deleteLink(h *netlink.Handle, name string) error {
	link, err := h.LinkByName(name)
	if isNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("pod network: find link %s: %w", name, err)
	}
	if err := h.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("pod network: delete link %s: %w", name, err)
	}
	return nil
}

func isNotFound(err error) bool {
	var nf netlink.LinkNotFoundError
	return errors.As(err, &nf)
}

func permanentNeighbour(link netlink.Link, ip netip.Addr, mac net.HardwareAddr) *netlink.Neigh {
	return &netlink.Neigh{LinkIndex: link.Attrs().Index, Family: family(ip), State: netlink.NUD_PERMANENT, IP: ip.AsSlice(), HardwareAddr: mac}
}

// hostAddr is ip with a full-length prefix; duplicate address detection is off.
func hostAddr(ip netip.Addr) *netlink.Addr {
	a := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(ip, ip.BitLen()))}
	if ip.Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	return a
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// anyOf is the default route's destination in the family of ip.
func anyOf(ip netip.Addr) netip.Prefix {
	if ip.Is6() {
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
}

func family(ip netip.Addr) int {
	if ip.Is6() {
		return unix.AF_INET6
	}
	return unix.AF_INET
}
