package service

import (
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"

	"knarr/network"
)

// front is what clients address. The unspecified address stands for every address of the node (node ports, host ports).
type front struct {
	addr  netip.Addr
	proto uint8
	port  uint16
}

func (f front) String() string {
	return fmt.Sprintf("%s/%s", netip.AddrPortFrom(f.addr, f.port), protoName(f.proto))
}

// list is one list of endpoints with its slots in order.
type list struct {
	key      listKey
	id       uint32 // key of the list in the maps; unique in the life of the process
	affinity uint32 // seconds that a client stays with its endpoint; 0: no affinity
	targets  []netip.AddrPort
}

// listKey names a list within its service.
type listKey struct {
	port  string // name and protocol of the service port
	ipv4  bool
	local bool
}

// What happens to a packet for a front.
const (
	toReject = -1 // no endpoint anywhere: ICMP port unreachable, or a TCP reset
	toDrop   = -2 // none here, but elsewhere: balancers outside try another node
)

// binding ties a front to a list: an index into plan.lists, or toReject or toDrop. External and internal clients differ under externalTrafficPolicy Local;
// internal are pods of the cluster and the node itself.
type binding struct {
	front    front
	external int
	internal int
	allow    []netip.Prefix // loadBalancerSourceRanges; nil: everybody
}

// plan is what one service, or the host ports of one pod, puts into the table. Plans are immutable.
type plan struct {
	lists    []list
	bindings []binding
	hairpins []netip.Addr // endpoints on this node
	health   *healthCheck
}

// healthCheck is the answer of a healthCheckNodePort.
type healthCheck struct {
	name  types.NamespacedName
	port  uint16
	local int // ready endpoints of the service on this node
}

// planner turns services into plans. It holds what the plans of one node share.
type planner struct {
	here  place
	skip  map[netip.Addr]bool // Options.LocalAddresses
	newID func() uint32
}

// service plans one Service; old is its plan of before (nil: none), whose ids and slots are kept where they can be. A service that is not for
// this data path (headless, ExternalName, another proxy's) has a nil plan.
func (pl *planner) service(svc *v1.Service, parts []*discovery.EndpointSlice, old *plan) *plan {
	if svc == nil || !isOurs(svc) {
		return nil
	}
	b := builder{planner: pl, svc: svc, parts: parts, old: old, p: &plan{}}
	local := map[netip.Addr]bool{}
	for i := range svc.Spec.Ports {
		for _, ipv4 := range families(svc) {
			b.port(&svc.Spec.Ports[i], ipv4, local)
		}
	}
	if needsHealthCheck(svc) {
		b.p.health = &healthCheck{name: types.NamespacedName{Namespace: svc.Namespace, Name: svc.Name}, port: uint16(svc.Spec.HealthCheckNodePort), local: len(local)}
	}
	return b.p
}

func isOurs(svc *v1.Service) bool {
	const otherProxy = "service.kubernetes.io/service-proxy-name" // well-known label: another implementation serves it
	return svc.Spec.Type != v1.ServiceTypeExternalName && svc.Spec.ClusterIP != v1.ClusterIPNone && svc.Spec.ClusterIP != "" && svc.Labels[otherProxy] == ""
}

func needsHealthCheck(svc *v1.Service) bool {
	return svc.Spec.Type == v1.ServiceTypeLoadBalancer && svc.Spec.ExternalTrafficPolicy == v1.ServiceExternalTrafficPolicyLocal && svc.Spec.HealthCheckNodePort != 0
}

// families lists the families of the service, true for IPv4, from its cluster addresses.
func families(svc *v1.Service) (out []bool) {
	for _, s := range svc.Spec.ClusterIPs {
		if ip, err := netip.ParseAddr(s); err == nil && !slices.Contains(out, ip.Is4()) {
			out = append(out, ip.Is4())
		}
	}
	return out
}

// builder holds one planning.
type builder struct {
	*planner
	svc   *v1.Service
	parts []*discovery.EndpointSlice
	old   *plan
	p     *plan
}

// port plans one service port in one family. Addresses of ready endpoints on this node are added to localIPs.
func (b *builder) port(port *v1.ServicePort, ipv4 bool, localIPs map[netip.Addr]bool) {
	eps := collect(b.parts, port.Name, port.Protocol, ipv4, b.here)
	cluster, local := choose(eps, b.here)
	name := port.Name + "/" + string(port.Protocol)
	everywhere := b.list(listKey{name, ipv4, false}, cluster, toReject)
	here := toReject
	if b.usesLocal() {
		none := toReject
		if len(cluster) > 0 {
			none = toDrop
		}
		here = b.list(listKey{name, ipv4, true}, local, none)
	}
	for _, e := range eps {
		if e.local && e.ready {
			localIPs[e.target.Addr()] = true
		}
		if e.local && !slices.Contains(b.p.hairpins, e.target.Addr()) {
			b.p.hairpins = append(b.p.hairpins, e.target.Addr())
		}
	}
	b.bind(port, ipv4, everywhere, here)
}

func (b *builder) usesLocal() bool {
	return b.internalLocal() || b.svc.Spec.ExternalTrafficPolicy == v1.ServiceExternalTrafficPolicyLocal
}

func (b *builder) internalLocal() bool {
	return deref(b.svc.Spec.InternalTrafficPolicy, v1.ServiceInternalTrafficPolicyCluster) == v1.ServiceInternalTrafficPolicyLocal
}

// list adds a list and returns its index, or none when it is empty.
func (b *builder) list(key listKey, want []netip.AddrPort, none int) int {
	if len(want) == 0 {
		return none
	}
	l := list{key: key, targets: want}
	if b.old != nil {
		if i := slices.IndexFunc(b.old.lists, func(o list) bool { return o.key == key }); i >= 0 {
			l.id, l.targets = b.old.lists[i].id, arrange(b.old.lists[i].targets, want)
		}
	}
	if l.id == 0 {
		l.id = b.newID()
	}
	if b.svc.Spec.SessionAffinity == v1.ServiceAffinityClientIP {
		l.affinity = 10800 // seconds: the API's default
		if c := b.svc.Spec.SessionAffinityConfig; c != nil && c.ClientIP != nil && c.ClientIP.TimeoutSeconds != nil {
			l.affinity = uint32(*c.ClientIP.TimeoutSeconds)
		}
	}
	b.p.lists = append(b.p.lists, l)
	return len(b.p.lists) - 1
}

// bind gives the port's addresses in one family their lists.
func (b *builder) bind(port *v1.ServicePort, ipv4 bool, everywhere, here int) {
	proto := protoNumber(port.Protocol)
	external := everywhere
	if b.svc.Spec.ExternalTrafficPolicy == v1.ServiceExternalTrafficPolicyLocal {
		external = here
	}
	inside := everywhere
	if b.internalLocal() {
		inside = here
	}
	add := func(s string, number int32, ext, in int, allow []netip.Prefix) {
		ip, err := netip.ParseAddr(s)
		if err != nil || ip.Unmap().Is4() != ipv4 || b.skip[ip.Unmap()] {
			return
		}
		b.p.bindings = append(b.p.bindings, binding{front{ip.Unmap(), proto, uint16(number)}, ext, in, allow})
	}
	for _, ip := range b.svc.Spec.ClusterIPs {
		add(ip, port.Port, inside, inside, nil)
	}
	for _, ip := range b.svc.Spec.ExternalIPs {
		add(ip, port.Port, external, everywhere, nil)
	}
	if b.svc.Spec.Type == v1.ServiceTypeLoadBalancer {
		allow := sourceRanges(b.svc, ipv4)
		for _, in := range b.svc.Status.LoadBalancer.Ingress {
			if deref(in.IPMode, v1.LoadBalancerIPModeVIP) == v1.LoadBalancerIPModeVIP {
				add(in.IP, port.Port, external, everywhere, allow)
			}
		}
	}
	if port.NodePort != 0 {
		add(unspecified(ipv4).String(), port.NodePort, external, everywhere, nil)
	}
}

// sourceRanges are the loadBalancerSourceRanges of one family. A service with ranges of the other family only gets an empty, non-nil slice: nobody may connect.
func sourceRanges(svc *v1.Service, ipv4 bool) []netip.Prefix {
	if len(svc.Spec.LoadBalancerSourceRanges) == 0 {
		return nil
	}
	out := []netip.Prefix{}
	for _, s := range svc.Spec.LoadBalancerSourceRanges {
		if p, err := netip.ParsePrefix(s); err == nil && p.Addr().Is4() == ipv4 {
			out = append(out, p.Masked())
		}
	}
	return out
}

// hostPorts plans the host ports of one pod.
func (pl *planner) hostPorts(ports []network.HostPort) *plan {
	p := &plan{}
	for i, hp := range ports {
		ipv4 := hp.Target.Addr().Is4()
		addr := hp.HostIP
		if !addr.IsValid() || addr.IsUnspecified() {
			addr = unspecified(ipv4)
		}
		p.lists = append(p.lists, list{key: listKey{port: fmt.Sprint(i), ipv4: ipv4}, id: pl.newID(), targets: []netip.AddrPort{hp.Target}})
		p.bindings = append(p.bindings, binding{front: front{addr, protoNumber(hp.Protocol), hp.HostPort}, external: i, internal: i})
		if !slices.Contains(p.hairpins, hp.Target.Addr()) {
			p.hairpins = append(p.hairpins, hp.Target.Addr())
		}
	}
	return p
}

// arrange puts the wanted targets into slots so that as few as possible move: those that stay keep their slots, new ones fill the holes, and the last
// slots fill holes that are left.
func arrange(old, want []netip.AddrPort) []netip.AddrPort {
	missing := make(map[netip.AddrPort]bool, len(want))
	for _, t := range want {
		missing[t] = true
	}
	out := make([]netip.AddrPort, len(old), max(len(old), len(want)))
	for i, t := range old {
		if missing[t] {
			out[i] = t
			delete(missing, t)
		}
	}
	for _, t := range want { // in the order of want, so that the result is determined
		if !missing[t] {
			continue
		}
		if i := slices.Index(out, netip.AddrPort{}); i >= 0 {
			out[i] = t
		} else {
			out = append(out, t)
		}
	}
	for {
		hole := slices.Index(out, netip.AddrPort{})
		if hole < 0 {
			return out
		}
		out[hole] = out[len(out)-1]
		out = out[:len(out)-1]
	}
}

func unspecified(ipv4 bool) netip.Addr {
	if ipv4 {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

func protoNumber(p v1.Protocol) uint8 {
	switch p {
	case v1.ProtocolUDP:
		return unix.IPPROTO_UDP
	case v1.ProtocolSCTP:
		return unix.IPPROTO_SCTP
	}
	return unix.IPPROTO_TCP
}

func protoName(p uint8) string {
	switch p {
	case unix.IPPROTO_UDP:
		return "UDP"
	case unix.IPPROTO_SCTP:
		return "SCTP"
	}
	return "TCP"
}
