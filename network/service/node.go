package service

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"

	"knarr/network"
	"knarr/network/netns"
	"knarr/network/sysctl"
)

// syncNode reads what depends on Nodes and ServiceCIDRs: the ranges, the route of the service ranges, and this node's zone; when that changed, every
// service is dirty. It returns the sets that changed.
func (p *Proxy) syncNode(dirty map[source]bool) map[setRef][]netip.Prefix {
	all, _ := p.nodes.List(labels.Everything()) // the cache never fails
	var own, inside []netip.Prefix
	for _, n := range all {
		for _, a := range n.Status.Addresses {
			if ip, err := netip.ParseAddr(a.Address); err == nil && a.Type == v1.NodeInternalIP {
				inside = append(inside, netip.PrefixFrom(ip.Unmap(), ip.Unmap().BitLen()))
			}
		}
		if n.Name != p.opt.NodeName {
			continue
		}
		own = append(own, parsePrefixes(n.Spec.PodCIDRs)...)
		if zone := n.Labels[v1.LabelTopologyZone]; zone != p.planner.here.zone {
			p.planner.here.zone = zone
			p.mu.Lock()
			p.markAllLocked()
			for s := range p.dirty {
				dirty[s] = true
			}
			p.dirty, p.dirtyNode = map[source]bool{}, false
			p.mu.Unlock()
		}
	}
	services := p.serviceRanges()
	p.routeServices(services)
	inside = slices.Concat(inside, services, p.opt.ClusterCIDRs, p.opt.MasqueradeSources)
	return p.changedRanges(map[setKind][]netip.Prefix{
		setServices: services, setCluster: p.opt.ClusterCIDRs, setOwnPods: own, setInside: inside,
		setHosted: slices.Concat(own, p.opt.MasqueradeSources),
	})
}

// changedRanges splits the sets by family, keeps them for the next rebuild, and returns those that differ from what is live.
func (p *Proxy) changedRanges(want map[setKind][]netip.Prefix) map[setRef][]netip.Prefix {
	changed, next := map[setRef][]netip.Prefix{}, map[setRef][]netip.Prefix{}
	for kind, prefixes := range want {
		for _, ipv4 := range []bool{true, false} {
			ref := setRef{kind, ipv4}
			for _, pr := range prefixes {
				if pr.Addr().Is4() == ipv4 {
					next[ref] = append(next[ref], pr.Masked())
				}
			}
			slices.SortFunc(next[ref], comparePrefix)
			next[ref] = slices.Compact(next[ref])
			if !slices.Equal(next[ref], p.ranges[ref]) {
				changed[ref] = next[ref]
			}
		}
	}
	p.ranges = next
	return changed
}

func comparePrefix(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return a.Bits() - b.Bits()
}

func parsePrefixes(in []string) (out []netip.Prefix) {
	for _, s := range in {
		if p, err := netip.ParsePrefix(s); err == nil {
			out = append(out, p.Masked())
		}
	}
	return out
}

func (p *Proxy) serviceRanges() []netip.Prefix {
	out := slices.Clone(p.opt.ServiceCIDRs)
	all, _ := p.cidrs.List(labels.Everything()) // the cache never fails
	for _, c := range all {
		out = append(out, parsePrefixes(c.Spec.CIDRs)...)
	}
	return out
}

// prepareNode changes the kernel setting that lets 127.0.0.1:<node port> leave for a pod; the rule in (*ruleset).guard keeps everybody else out.
// Where it may not be changed, everything else works.
func (p *Proxy) prepareNode() {
	if p.opt.NoLoopbackNodePorts {
		return
	}
	if err := p.opt.Sysctl.Set("net/ipv4/conf/all/route_localnet", "1"); err != nil {
		p.log.Warn("node ports do not answer on 127.0.0.1", "err", err)
	}
}

// routeServices gives processes of the node a route to the service ranges, so that their packets get as far as the rules also on a machine without a
// default route. It leads to the loopback link, where a packet that no rule took dies; IPv6 refuses such routes and needs a default route.
func (p *Proxy) routeServices(ranges []netip.Prefix) {
	h, err := routeHandle(p.opt.NetNS)
	if err != nil {
		p.log.Error("service ranges are not routed", "err", err)
		return
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		p.log.Error("service ranges are not routed", "err", err)
		return
	}
	for _, r := range ranges {
		if !r.Addr().Is4() {
			continue
		}
		route := &netlink.Route{
			LinkIndex: lo.Attrs().Index, Scope: netlink.SCOPE_LINK, Protocol: network.RouteProtocol,
			Dst: &net.IPNet{IP: r.Masked().Addr().AsSlice(), Mask: net.CIDRMask(r.Bits(), 32)},
		}
		for _, ip := range p.opt.NodeIPs { // else the kernel may choose 127.0.0.1, now that it may leave
			if ip.Is4() {
				route.Src = ip.AsSlice()
				break
			}
		}
		if err := h.RouteReplace(route); err != nil {
			p.log.Error("service range is not routed", "range", r, "err", err)
		}
	}
}

func routeHandle(nsPath string) (*netlink.Handle, error) {
	ns, err := netns.Open(nsPath)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("services: open a route socket: %w", err)
	}
	return h, nil
}

// reportForeign says what on the machine will drop the cluster's packets.
func (p *Proxy) reportForeign() {
	found, err := p.kernel.foreignDrops()
	if err != nil {
		p.log.Warn("foreign rules could not be looked at", "err", err)
	}
	for _, s := range found {
		p.log.Warn("another program's firewall drops packets between pods", "where", s)
	}
}

// ForeignDrops describes chains of other programs, in the namespace of opt, that drop forwarded packets by default.
func ForeignDrops(opt Options) ([]string, error) {
	k, err := openKernel(opt.NetNS, false)
	if err != nil {
		return nil, err
	}
	defer k.close()
	return k.foreignDrops()
}

func recorder(opt Options) sysctl.Recorder {
	r := opt.Sysctl
	r.NetNS = opt.NetNS
	r.Owner += ".service"
	return r
}

// Purge deletes the table, the routes of the service ranges, and puts kernel settings back, also those of an earlier process. No Proxy
// may run in the namespace any more. Purging twice is no error. opt.Informers is not needed.
func Purge(opt Options) error {
	errs := []error{deleteTable(opt.NetNS), recorder(opt).Restore()}
	h, err := routeHandle(opt.NetNS)
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	filter := &netlink.Route{Protocol: network.RouteProtocol, LinkIndex: lo.Attrs().Index}
	routes, err := netns.Dump(func() ([]netlink.Route, error) {
		return h.RouteListFiltered(netlink.FAMILY_V4, filter, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_OIF)
	})
	errs = append(errs, err)
	for _, r := range routes {
		if r.Type == unix.RTN_UNICAST {
			errs = append(errs, h.RouteDel(&r))
		}
	}
	return errors.Join(errs...)
}

func deleteTable(nsPath string) error {
	k, err := openKernel(nsPath, false)
	if err != nil {
		return err
	}
	defer k.close()
	tables, err := k.conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return fmt.Errorf("services: list tables: %w", err)
	}
	for _, t := range tables {
		if t.Name == TableName {
			k.conn.DelTable(t)
			if err := k.conn.Flush(); err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("services: delete table %s: %w", TableName, err)
			}
		}
	}
	return nil
}
