package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
)

// Indexes of the nodes.
const (
	byAddress = "tunnel-address"
	byRange   = "tunnel-range"
)

// Nodes finds nodes by their name, address and pod range.
type Nodes struct {
	indexer cache.Indexer
	cluster netip.Prefix
}

// NodeIndexers are the indexes that NewNodes needs. Pod ranges outside of the cluster's are nobody's.
func NodeIndexers(cluster netip.Prefix) cache.Indexers {
	return cache.Indexers{
		byAddress: func(obj any) ([]string, error) { return texts(addresses(obj.(*corev1.Node))), nil },
		byRange:   func(obj any) ([]string, error) { return texts(Ranges(obj.(*corev1.Node), cluster)), nil },
	}
}

func texts[T fmt.Stringer](list []T) []string {
	out := make([]string, len(list))
	for i, x := range list {
		out[i] = x.String()
	}
	return out
}

// NewNodes finds nodes among those of an indexer of Nodes, which has NodeIndexers for the same cluster's pod range.
func NewNodes(indexer cache.Indexer, cluster netip.Prefix) Nodes {
	return Nodes{indexer: indexer, cluster: cluster}
}

func (n Nodes) named(name string) *corev1.Node {
	obj, ok, err := n.indexer.GetByKey(name)
	if err != nil || !ok {
		return nil
	}
	return obj.(*corev1.Node)
}

// at gives the one node that has the address itself or in its pod range. Where several have the address, it is the one whose
// API has the port; beyond that, there is no telling.
func (n Nodes) at(ip netip.Addr, port uint16) *corev1.Node {
	if found, err := n.indexer.ByIndex(byAddress, ip.String()); err == nil && len(found) > 0 {
		if len(found) > 1 {
			found = slices.DeleteFunc(found, func(x any) bool { return apiPort(x.(*corev1.Node)) != port })
		}
		return only(found)
	}
	for bits := ip.BitLen(); bits >= n.cluster.Bits(); bits-- {
		p, err := ip.Prefix(bits)
		if err != nil {
			return nil
		}
		if found, err := n.indexer.ByIndex(byRange, p.String()); err == nil && len(found) > 0 {
			return only(found)
		}
	}
	return nil
}

func apiPort(node *corev1.Node) uint16 {
	return uint16(node.Status.DaemonEndpoints.KubeletEndpoint.Port)
}

func only(found []any) *corev1.Node {
	if len(found) != 1 {
		return nil
	}
	return found[0].(*corev1.Node)
}

// Pods tells which pods share their node's network.
type Pods struct{ Lister corelisters.PodLister }

func (p Pods) namesHostPort(node string, port uint16) bool {
	list, err := p.Lister.List(labels.Everything())
	return err == nil && slices.ContainsFunc(list, func(x *corev1.Pod) bool { return x.Spec.NodeName == node && NamesHostPort(x, port) })
}

// kind tells targets apart that need different routes.
type kind int

const (
	toNode kind = iota
	toPod
	kinds
)

// target is an address of a node or of one of its pods.
type target struct {
	node *corev1.Node
	own  []netip.Addr // the node's addresses
	kind kind
	addr netip.AddrPort
	// permitted says whether a tunnel may lead there.
	permitted bool
}

// locate finds out whose an address is. Its host is an IP address, or a node's name: that says which node is meant also
// where nodes behind different firewalls have the same address.
func (h *Hub) locate(address string) (target, bool) {
	host, service, err := net.SplitHostPort(address)
	if err != nil {
		return target{}, false
	}
	port, err := strconv.ParseUint(service, 10, 16)
	if err != nil {
		return target{}, false
	}
	node := h.o.Nodes.named(host)
	ip, notIP := netip.ParseAddr(host)
	if node == nil && notIP == nil {
		ip = ip.Unmap()
		node = h.o.Nodes.at(ip, uint16(port))
	}
	if node == nil {
		return target{}, false
	}
	own := addresses(node)
	if notIP != nil {
		if len(own) == 0 {
			return target{}, false
		}
		ip = own[0]
	}
	t := target{node: node, own: own, kind: toPod, addr: netip.AddrPortFrom(ip, uint16(port))}
	if slices.Contains(own, ip) {
		t.kind = toNode
	}
	t.permitted = h.reach(node, own).Permits(t.addr)
	return t, true
}

func (h *Hub) reach(node *corev1.Node, own []netip.Addr) Reach {
	return Reach{
		Addresses: own,
		Port:      apiPort(node),
		Ranges:    Ranges(node, h.o.Nodes.cluster),
		HostPort:  func(port uint16) bool { return h.o.Pods.namesHostPort(node.Name, port) },
	}
}

// DialContext connects to an address. Where it is that of a node that keeps a tunnel, or of a pod of such a node, the
// connection goes the way that works: directly, after a short head start through the tunnel. What was found out is
// remembered as long as the tunnel lasts.
func (h *Hub) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	to, ok := h.locate(address)
	if !ok {
		return h.o.Dialer.DialContext(ctx, network, address)
	}
	t, came := h.of(to.node.Name)
	if !to.permitted {
		t, came = nil, nil
	}
	r := &race{hub: h, network: network, to: to, tunnel: t, came: came, results: make(chan attempt)}
	if t != nil && h.isFirst(t, to) {
		c, err := t.dial(ctx, to.addr)
		if refused := (*Refusal)(nil); err == nil || errors.As(err, &refused) || ctx.Err() != nil {
			return c, err
		}
		r.failures, r.tunnel = []error{err}, nil // full, or broken and not yet found dead
	}
	return r.run(ctx)
}

// isFirst says whether direct dialling has no prospect. A node whose connection comes from another address than its own is
// behind address translation: its own address is nothing here, or another machine's.
func (h *Hub) isFirst(t *tunnel, to target) bool {
	return t.first[to.kind].Load() || !slices.Contains(to.own, t.remote) || to.kind == toPod && !h.o.PodRoutes
}

// race is one dial with two ways: the first to succeed wins.
type race struct {
	hub     *Hub
	network string
	to      target
	tunnel  *tunnel         // nil: none yet
	came    <-chan struct{} // nil: no tunnel is of use
	results chan attempt

	running  int
	entered  bool // through the tunnel
	failures []error
}

type attempt struct {
	conn    net.Conn
	err     error
	through bool // the tunnel
}

func (r *race) run(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wait := time.NewTimer(r.hub.headStart)
	defer wait.Stop()
	r.start(ctx, false)
	for r.running > 0 {
		select {
		case <-ctx.Done(): // the caller's: an attempt that ends with it may tell nobody
			return nil, ctx.Err()
		case <-wait.C:
			r.enter(ctx)
		case <-r.came:
			if r.tunnel, r.came = r.hub.of(r.to.node.Name); r.tunnel != nil {
				r.enter(ctx)
			}
		case a := <-r.results:
			r.running--
			if a.err == nil {
				if a.through {
					r.tunnel.first[r.to.kind].Store(true)
				}
				return a.conn, nil
			}
			r.failures = append(r.failures, a.err)
			r.enter(ctx)
		}
	}
	return nil, r.failure()
}

// enter tries the tunnel too, once.
func (r *race) enter(ctx context.Context) {
	if r.tunnel != nil && !r.entered {
		r.entered, r.came = true, nil
		r.start(ctx, true)
	}
}

func (r *race) start(ctx context.Context, through bool) {
	r.running++
	t := r.tunnel
	go func() {
		a := attempt{through: through}
		if through {
			a.conn, a.err = t.dial(ctx, r.to.addr)
		} else {
			a.conn, a.err = r.hub.o.Dialer.DialContext(ctx, r.network, r.to.addr.String())
		}
		select {
		case r.results <- a:
		case <-ctx.Done(): // the other one won
			if a.err == nil {
				a.conn.Close()
			}
		}
	}()
}

func (r *race) failure() error {
	err := errors.Join(r.failures...)
	switch {
	case len(r.failures) > 1:
		return err
	case !r.to.permitted:
		return fmt.Errorf("node %q cannot be reached directly, and tunnels lead only to a node's API and pods: %w", r.to.node.Name, err)
	}
	return fmt.Errorf("node %q cannot be reached directly, and its agent keeps no tunnel to this server: %w", r.to.node.Name, err)
}
