package dns

import (
	"net/netip"
	"slices"
	"strings"

	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/validation"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"

	"knarr/network"
)

// records answers what the cluster's objects say about a name. It only reads caches; objects are shared and never changed.
type records struct {
	services   corelisters.ServiceLister
	namespaces corelisters.NamespaceLister
	byIP       cache.Indexer // Services, with the index servicesByIP
	slices     cache.Indexer // EndpointSlices, with the indexes network.SlicesByService and slicesByIP
}

const (
	servicesByIP = "knarr.network/clusterip" // from a cluster address to Services
	slicesByIP   = "knarr.network/address"   // from an endpoint's address to EndpointSlices
)

func indexServiceIPs(o any) ([]string, error) {
	s, ok := o.(*v1.Service)
	if !ok || headless(s) {
		return nil, nil
	}
	return s.Spec.ClusterIPs, nil
}

func indexSliceIPs(o any) ([]string, error) {
	s, ok := o.(*discovery.EndpointSlice)
	if !ok {
		return nil, nil
	}
	var out []string
	for _, e := range s.Endpoints {
		out = append(out, e.Addresses...)
	}
	return out, nil
}

func headless(s *v1.Service) bool { return s.Spec.ClusterIP == v1.ClusterIPNone }

// host is an address with the name that it has in the answer to a question.
type host struct {
	name string // relative to the zone
	ip   netip.Addr
	port uint16 // for SRV
}

// result is what the objects say: the name does not exist, or it exists with these data, which may be none.
type result struct {
	exists bool
	hosts  []host // A, AAAA and SRV
	cname  string // absolute target of an ExternalName service
}

var (
	notFound = result{}
	noData   = result{exists: true} // an empty non-terminal, or a name with other types only
)

// lookup answers for a name relative to the zone, in lower case, by its labels. srv says that the question is for SRV records.
func (r *records) lookup(labels []string, srv bool) result {
	if len(labels) == 0 {
		return noData
	}
	last := len(labels) - 1
	switch labels[last] {
	case "svc":
		return r.underSvc(labels[:last], srv)
	case "pod":
		return r.underPod(labels[:last])
	}
	return notFound
}

// underSvc answers [[endpoint.] | [_port._protocol.]] service.namespace.
func (r *records) underSvc(labels []string, srv bool) result {
	n := len(labels)
	switch {
	case n == 0:
		return noData
	case n == 1:
		return r.namespace(labels[0])
	}
	namespace, name, rest := labels[n-1], labels[n-2], labels[:n-2]
	svc, err := r.services.Services(namespace).Get(name)
	if err != nil {
		return notFound
	}
	switch len(rest) {
	case 0:
		return r.service(svc, "", "", srv)
	case 1:
		if proto, ok := strings.CutPrefix(rest[0], "_"); ok {
			return existsIf(hasProtocol(svc, proto))
		}
		return r.endpoint(svc, rest[0])
	case 2:
		portName, ok1 := strings.CutPrefix(rest[0], "_")
		proto, ok2 := strings.CutPrefix(rest[1], "_")
		if ok1 && ok2 {
			return r.service(svc, portName, proto, srv)
		}
	}
	return notFound
}

func existsIf(ok bool) result { return result{exists: ok} }

func hasProtocol(svc *v1.Service, proto string) bool {
	return slices.ContainsFunc(svc.Spec.Ports, func(p v1.ServicePort) bool { return protocolName(p.Protocol) == proto })
}

func protocolName(p v1.Protocol) string {
	if p == "" {
		return "tcp"
	}
	return strings.ToLower(string(p))
}

func (r *records) namespace(name string) result {
	_, err := r.namespaces.Get(name)
	return existsIf(err == nil)
}

// service answers for a whole service, or for one of its ports (SRV only); an empty port name means all ports.
func (r *records) service(svc *v1.Service, portName, proto string, srv bool) result {
	base := svc.Name + "." + svc.Namespace + ".svc"
	if svc.Spec.Type == v1.ServiceTypeExternalName {
		return result{exists: true, cname: strings.TrimSuffix(svc.Spec.ExternalName, ".") + "."}
	}
	if headless(svc) {
		return r.headless(svc, base, portName, proto, srv)
	}
	out := existsIf(proto == "")
	for _, s := range svc.Spec.ClusterIPs {
		ip, err := netip.ParseAddr(s)
		if err != nil {
			continue
		}
		if !srv && proto == "" {
			out.hosts = append(out.hosts, host{name: base, ip: ip})
			continue
		}
		for _, p := range svc.Spec.Ports {
			if proto == "" || p.Name == portName && protocolName(p.Protocol) == proto {
				out.exists = true
				out.hosts = append(out.hosts, host{name: base, ip: ip, port: uint16(p.Port)})
			}
		}
	}
	return out
}

// headless answers with the endpoints that are ready; slices of a service with publishNotReadyAddresses say ready for all.
func (r *records) headless(svc *v1.Service, base, portName, proto string, srv bool) result {
	out := existsIf(proto == "")
	r.eachEndpoint(svc, func(s *discovery.EndpointSlice, e *discovery.Endpoint, ip netip.Addr) {
		if !srv && proto == "" {
			out.hosts = append(out.hosts, host{name: base, ip: ip})
			return
		}
		for _, p := range s.Ports {
			if p.Port == nil || proto != "" && (deref(p.Name) != portName || protocolName(deref(p.Protocol)) != proto) {
				continue
			}
			out.exists = true
			out.hosts = append(out.hosts, host{name: endpointName(e, ip) + "." + base, ip: ip, port: uint16(*p.Port)})
		}
	})
	return out.unique()
}

// endpoint answers for one endpoint of a headless service, by its hostname or its address with dashes.
func (r *records) endpoint(svc *v1.Service, name string) result {
	out := notFound
	if !headless(svc) {
		return out
	}
	r.eachEndpoint(svc, func(_ *discovery.EndpointSlice, e *discovery.Endpoint, ip netip.Addr) {
		if endpointName(e, ip) == name {
			out.exists = true
			out.hosts = append(out.hosts, host{name: name, ip: ip})
		}
	})
	return out.unique()
}

// unique drops double hosts, which endpoints in two slices give.
func (o result) unique() result {
	seen := map[host]bool{}
	o.hosts = slices.DeleteFunc(o.hosts, func(h host) bool {
		double := seen[h]
		seen[h] = true
		return double
	})
	return o
}

func (r *records) eachEndpoint(svc *v1.Service, fn func(*discovery.EndpointSlice, *discovery.Endpoint, netip.Addr)) {
	found, _ := r.slices.ByIndex(network.SlicesByService, svc.Namespace+"/"+svc.Name) // the index exists
	for _, o := range found {
		s := o.(*discovery.EndpointSlice)
		for i := range s.Endpoints {
			e := &s.Endpoints[i]
			if e.Conditions.Ready != nil && !*e.Conditions.Ready {
				continue
			}
			for _, a := range e.Addresses {
				if ip, err := netip.ParseAddr(a); err == nil {
					fn(s, e, ip.Unmap())
				}
			}
		}
	}
}

// endpointName is an endpoint's label below its service: its hostname, else its address with dashes.
func endpointName(e *discovery.Endpoint, ip netip.Addr) string {
	if e.Hostname != nil && *e.Hostname != "" {
		return strings.ToLower(*e.Hostname)
	}
	if ip.Is4() {
		return strings.ReplaceAll(ip.String(), ".", "-")
	}
	s := strings.ReplaceAll(ip.String(), ":", "-")
	if strings.HasPrefix(s, "-") { // a label may not begin or end with a dash
		s = "0" + s
	}
	if strings.HasSuffix(s, "-") {
		s += "0"
	}
	return s
}

// underPod answers a-b-c-d.namespace with the address that the name itself holds, as CoreDNS does by default.
func (r *records) underPod(labels []string) result {
	switch len(labels) {
	case 0:
		return noData
	case 1:
		return r.namespace(labels[0])
	case 2:
		if !r.namespace(labels[1]).exists || len(validation.NameIsDNSLabel(labels[0], false)) > 0 {
			return notFound
		}
		for _, sep := range []string{".", ":"} {
			if ip, err := netip.ParseAddr(strings.ReplaceAll(labels[0], "-", sep)); err == nil {
				return result{exists: true, hosts: []host{{name: labels[0], ip: ip}}}
			}
		}
	}
	return notFound
}

// reverse names an address: services with this cluster address, and endpoints of headless services. Names are relative to the zone.
func (r *records) reverse(ip netip.Addr) (names []string) {
	found, _ := r.byIP.ByIndex(servicesByIP, ip.String()) // the index exists
	for _, o := range found {
		s := o.(*v1.Service)
		names = append(names, s.Name+"."+s.Namespace+".svc")
	}
	found, _ = r.slices.ByIndex(slicesByIP, ip.String()) // the index exists
	for _, o := range found {
		s := o.(*discovery.EndpointSlice)
		svc, err := r.services.Services(s.Namespace).Get(s.Labels[discovery.LabelServiceName])
		if err != nil || !headless(svc) {
			continue
		}
		for i := range s.Endpoints {
			if e := &s.Endpoints[i]; slices.Contains(e.Addresses, ip.String()) && (e.Conditions.Ready == nil || *e.Conditions.Ready) {
				names = append(names, endpointName(e, ip)+"."+svc.Name+"."+svc.Namespace+".svc")
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

func deref[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}
