package service

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// staleFlows collects the UDP fronts whose endpoints changed. UDP has no connections that end: the kernel keeps sending a client's datagrams to
// the endpoint of the first one, or to nobody, for as long as they come. So tracked flows that lead to no present endpoint are deleted.
type staleFlows struct {
	good map[front]map[netip.AddrPort]bool // where flows of the front may lead
	own  []netip.Addr                      // this node's addresses
}

func newStale(own []netip.Addr) *staleFlows {
	return &staleFlows{good: map[front]map[netip.AddrPort]bool{}, own: own}
}

// note compares two plans of one source.
func (s *staleFlows) note(old, next *plan) {
	before, after := udpTargets(old), udpTargets(next)
	for f, targets := range before {
		if !slices.Equal(targets, after[f]) {
			s.set(f, after[f])
		}
	}
	for f, targets := range after {
		if before[f] == nil {
			s.set(f, targets)
		}
	}
}

func (s *staleFlows) set(f front, targets []netip.AddrPort) {
	s.good[f] = map[netip.AddrPort]bool{}
	for _, t := range targets {
		s.good[f][t] = true
	}
}

// udpTargets lists, sorted, all targets of each UDP front.
func udpTargets(p *plan) map[front][]netip.AddrPort {
	out := map[front][]netip.AddrPort{}
	if p == nil {
		return out
	}
	for _, b := range p.bindings {
		if b.front.proto != unix.IPPROTO_UDP {
			continue
		}
		all := []netip.AddrPort{}
		for _, i := range []int{b.external, b.internal} {
			if i >= 0 {
				all = append(all, p.lists[i].targets...)
			}
		}
		slices.SortFunc(all, netip.AddrPort.Compare)
		out[b.front] = slices.Compact(all)
	}
	return out
}

// MatchConntrackFlow implements netlink.CustomConntrackFilter: true for a flow to delete.
func (s *staleFlows) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	if flow.Forward.Protocol != unix.IPPROTO_UDP {
		return false
	}
	dst, _ := netip.AddrFromSlice(flow.Forward.DstIP)
	answers, _ := netip.AddrFromSlice(flow.Reverse.SrcIP)
	dst, answers = dst.Unmap(), answers.Unmap()
	to := netip.AddrPortFrom(answers, flow.Reverse.SrcPort)
	if good, ok := s.good[front{dst, unix.IPPROTO_UDP, flow.Forward.DstPort}]; ok {
		return !good[to]
	}
	if answers == dst && !dst.IsLoopback() && !slices.Contains(s.own, dst) {
		return false // not for this node: only the port is that of a node port
	}
	good, ok := s.good[front{unspecified(dst.Is4()), unix.IPPROTO_UDP, flow.Forward.DstPort}]
	return ok && !good[to]
}

// flushConntrack deletes the flows of the fronts that changed.
func (p *Proxy) flushConntrack(s *staleFlows) error {
	if len(s.good) == 0 {
		return nil
	}
	h, err := routeHandle(p.opt.NetNS)
	if err != nil {
		return err
	}
	defer h.Close()
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		if !s.has(family == unix.AF_INET) {
			continue
		}
		if _, err := h.ConntrackDeleteFilters(netlink.ConntrackTable, family, s); err != nil {
			return fmt.Errorf("services: delete tracked UDP flows of endpoints that are gone: %w", err)
		}
	}
	return nil
}

func (s *staleFlows) has(ipv4 bool) bool {
	for f := range s.good {
		if f.addr.Is4() == ipv4 {
			return true
		}
	}
	return false
}
