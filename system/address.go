package system

import (
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"

	"knarr/network/netns"
)

// hostAddress is the address of the link that leads outside. A machine without a default route gives the first global
// address of any link, and one without any link loopback: knarr also works on a laptop in a plane.
func hostAddress() netip.Addr {
	if a := defaultRouteAddress(); a.IsValid() {
		return a
	}
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		return loopback()
	}
	for _, a := range addresses {
		if n, ok := a.(*net.IPNet); ok {
			if a := usable(n.IP); a.IsValid() {
				return a
			}
		}
	}
	return loopback()
}

func loopback() netip.Addr { return netip.AddrFrom4([4]byte{127, 0, 0, 1}) }

// usable gives an IPv4 address that other machines may know, else the zero value.
func usable(ip net.IP) netip.Addr {
	if ip.To4() == nil || !ip.IsGlobalUnicast() {
		return netip.Addr{}
	}
	a, _ := netip.AddrFromSlice(ip.To4())
	return a
}

func defaultRouteAddress() netip.Addr {
	routes, err := netns.Dump(func() ([]netlink.Route, error) { return netlink.RouteList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return netip.Addr{}
	}
	for _, r := range routes {
		if r.Dst != nil && !r.Dst.IP.IsUnspecified() {
			continue
		}
		if a := usable(r.Src); a.IsValid() {
			return a
		}
		if a := linkAddress(r.LinkIndex); a.IsValid() {
			return a
		}
	}
	return netip.Addr{}
}

func linkAddress(index int) netip.Addr {
	link, err := netlink.LinkByIndex(index)
	if err != nil {
		return netip.Addr{}
	}
	addresses, err := netns.Dump(func() ([]netlink.Addr, error) { return netlink.AddrList(link, netlink.FAMILY_V4) })
	if err != nil {
		return netip.Addr{}
	}
	for _, a := range addresses {
		if a := usable(a.IP); a.IsValid() {
			return a
		}
	}
	return netip.Addr{}
}
