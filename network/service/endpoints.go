package service

import (
	"net/netip"
	"slices"

	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
)

// endpoint is one address and port of a service port, with what decides whether it gets traffic.
type endpoint struct {
	target      netip.AddrPort
	ready       bool // may get new connections (true also for all when publishNotReadyAddresses)
	serving     bool // passes its readiness probe, although it may be terminating
	terminating bool
	local       bool     // on this node
	forNodes    []string // hints
	forZones    []string
}

// place is where this node is, for hints.
type place struct{ node, zone string }

// collect gathers the endpoints of one service port in one family from its slices, each target once, sorted.
func collect(parts []*discovery.EndpointSlice, portName string, protocol v1.Protocol, ipv4 bool, here place) []endpoint {
	want := discovery.AddressTypeIPv6
	if ipv4 {
		want = discovery.AddressTypeIPv4
	}
	var out []endpoint
	for _, s := range parts {
		if s.AddressType != want {
			continue
		}
		for _, port := range s.Ports {
			if port.Port == nil || deref(port.Name, "") != portName || deref(port.Protocol, v1.ProtocolTCP) != protocol {
				continue
			}
			for i := range s.Endpoints {
				if ep, ok := read(&s.Endpoints[i], uint16(*port.Port), here); ok {
					out = append(out, ep)
				}
			}
		}
	}
	slices.SortFunc(out, func(a, b endpoint) int {
		if c := a.target.Compare(b.target); c != 0 {
			return c
		}
		return rank(b) - rank(a) // the better state first: it wins when slices disagree while an endpoint moves between them
	})
	return slices.CompactFunc(out, func(a, b endpoint) bool { return a.target == b.target })
}

func rank(e endpoint) (n int) {
	if e.ready {
		n += 2
	}
	if e.serving {
		n++
	}
	return n
}

func read(e *discovery.Endpoint, port uint16, here place) (endpoint, bool) {
	if len(e.Addresses) == 0 {
		return endpoint{}, false
	}
	ip, err := netip.ParseAddr(e.Addresses[0]) // all addresses of an endpoint are the same backend
	if err != nil {
		return endpoint{}, false
	}
	ready := deref(e.Conditions.Ready, true)
	ep := endpoint{
		target: netip.AddrPortFrom(ip.Unmap(), port), ready: ready,
		serving: deref(e.Conditions.Serving, ready), terminating: deref(e.Conditions.Terminating, false),
		local: e.NodeName != nil && *e.NodeName == here.node,
	}
	if e.Hints != nil {
		for _, h := range e.Hints.ForNodes {
			ep.forNodes = append(ep.forNodes, h.Name)
		}
		for _, h := range e.Hints.ForZones {
			ep.forZones = append(ep.forZones, h.Name)
		}
	}
	return ep, true
}

// choose decides which endpoints get traffic under the policies Cluster and Local: the ready ones, or, when there are none, those that still serve
// while they terminate (KEP-1669). Under Cluster, hints narrow the ready ones down (KEP-2433, KEP-3015).
func choose(all []endpoint, here place) (cluster, local []netip.AddrPort) {
	ready := filter(all, func(e endpoint) bool { return e.ready })
	cluster = targets(hinted(ready, here))
	if len(ready) == 0 {
		cluster = targets(filter(all, leaving))
	}
	mine := filter(all, func(e endpoint) bool { return e.local })
	local = targets(filter(mine, func(e endpoint) bool { return e.ready }))
	if len(local) == 0 {
		local = targets(filter(mine, leaving))
	}
	return cluster, local
}

func leaving(e endpoint) bool { return e.serving && e.terminating }

// hinted returns the endpoints that hints give to this node, or all when hints are missing on any of them or give none: for nodes first, then for zones.
func hinted(ready []endpoint, here place) []endpoint {
	if subset, ok := byHint(ready, here.node, func(e endpoint) []string { return e.forNodes }); ok {
		return subset
	}
	if here.zone != "" {
		if subset, ok := byHint(ready, here.zone, func(e endpoint) []string { return e.forZones }); ok {
			return subset
		}
	}
	return ready
}

func byHint(ready []endpoint, me string, hints func(endpoint) []string) ([]endpoint, bool) {
	for _, e := range ready {
		if len(hints(e)) == 0 {
			return nil, false
		}
	}
	subset := filter(ready, func(e endpoint) bool { return slices.Contains(hints(e), me) })
	return subset, len(subset) > 0
}

func filter(in []endpoint, keep func(endpoint) bool) (out []endpoint) {
	for _, e := range in {
		if keep(e) {
			out = append(out, e)
		}
	}
	return out
}

func targets(in []endpoint) []netip.AddrPort {
	out := make([]netip.AddrPort, 0, len(in))
	for _, e := range in[:min(len(in), maxEndpointsSlot)] {
		out = append(out, e.target)
	}
	return out
}

func deref[T any](p *T, zero T) T {
	if p == nil {
		return zero
	}
	return *p
}
