// Package loadbalancer gives services of type LoadBalancer the addresses of the nodes, as k3s does: a controller that writes
// status.loadBalancer.ingress. The data path of every node (package service) treats these addresses as addresses of the service.
//
// Inputs: Services, Nodes, EndpointSlices. Output: status.loadBalancer of Services whose loadBalancerClass is unset or Class. An address and port can
// belong to one service only: of two services that want the same port, the older one gets the addresses and the other stays pending, with an event.
package loadbalancer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"time"

	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/util/workqueue"

	"knarr/network"
)

// Class is the loadBalancerClass of services that want node addresses explicitly.
const Class = "knarr.dev/node"

const (
	gather   = 20 * time.Millisecond // how long changes are gathered before a pass
	retryMin = 50 * time.Millisecond // pause after a failed pass, doubled each time
	retryMax = 30 * time.Second
)

// Options of the controller.
type Options struct {
	// ReservedPorts are TCP ports of the nodes that no service gets, because processes of the cluster listen there (API server, kubelet API).
	ReservedPorts []int32
	Recorder      record.EventRecorder // nil: no events
	Log           *slog.Logger         // nil: slog.Default
}

// Controller writes the addresses. Make it with New, then start the informers, then Run.
type Controller struct {
	opt      Options
	log      *slog.Logger
	client   kubernetes.Interface
	services corelisters.ServiceLister
	nodes    corelisters.NodeLister
	slices   cache.Indexer
	checkers []cache.DoneChecker
	queue    workqueue.TypedRateLimitingInterface[string]
	told     map[types.UID]string // why a service has no address, as it was said; only Run's goroutine
}

// New registers with the informers of f.
func New(client kubernetes.Interface, f informers.SharedInformerFactory, opt Options) (*Controller, error) {
	if opt.Log == nil {
		opt.Log = slog.Default()
	}
	services, nodes, parts := f.Core().V1().Services(), f.Core().V1().Nodes(), f.Discovery().V1().EndpointSlices().Informer()
	c := &Controller{
		opt: opt, log: opt.Log.With("part", "load-balancer"), client: client, told: map[types.UID]string{},
		services: services.Lister(), nodes: nodes.Lister(), slices: parts.GetIndexer(),
		queue: workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](retryMin, retryMax)),
	}
	if err := network.AddSlicesByService(parts); err != nil {
		return nil, fmt.Errorf("load balancer: %w", err)
	}
	for inf, relevant := range map[cache.SharedIndexInformer]func(any) bool{
		services.Informer(): func(o any) bool {
			s := o.(*v1.Service)
			return s.Spec.Type == v1.ServiceTypeLoadBalancer || len(s.Status.LoadBalancer.Ingress) > 0
		},
		nodes.Informer(): func(any) bool { return true },
		parts:            c.matters,
	} {
		reg, err := inf.AddEventHandler(c.handler(relevant))
		if err != nil {
			return nil, fmt.Errorf("load balancer: %w", err)
		}
		c.checkers = append(c.checkers, reg.HasSyncedChecker())
	}
	return c, nil
}

// Run is New and (*Controller).Run with default options; call it before the informers start.
func Run(ctx context.Context, client kubernetes.Interface, f informers.SharedInformerFactory) error {
	c, err := New(client, f, Options{})
	if err != nil {
		return err
	}
	return c.Run(ctx)
}

// handler asks for a pass when something relevant changes. Heartbeats of nodes change nothing.
func (c *Controller) handler(relevant func(any) bool) cache.ResourceEventHandler {
	poke := func(o any) {
		if gone, ok := o.(cache.DeletedFinalStateUnknown); ok {
			o = gone.Obj
		}
		if relevant(o) {
			c.queue.AddAfter("", gather)
		}
	}
	return cache.ResourceEventHandlerFuncs{
		AddFunc: poke, DeleteFunc: poke,
		UpdateFunc: func(old, new any) {
			if a, ok := old.(*v1.Node); ok && usable(a) == usable(new.(*v1.Node)) && slices.Equal(a.Status.Addresses, new.(*v1.Node).Status.Addresses) {
				return
			}
			poke(old)
			poke(new)
		},
	}
}

// matters says whether the slice is one of a service whose addresses follow its endpoints.
func (c *Controller) matters(o any) bool {
	s := o.(*discovery.EndpointSlice)
	svc, err := c.services.Services(s.Namespace).Get(s.Labels[discovery.LabelServiceName])
	return err == nil && followsEndpoints(svc)
}

func followsEndpoints(svc *v1.Service) bool {
	return svc.Spec.Type == v1.ServiceTypeLoadBalancer && svc.Spec.ExternalTrafficPolicy == v1.ServiceExternalTrafficPolicyLocal
}

// Run writes addresses until ctx ends.
func (c *Controller) Run(ctx context.Context) error {
	defer context.AfterFunc(ctx, c.queue.ShutDown)()
	if !cache.WaitFor(ctx, "", c.checkers...) {
		return nil
	}
	c.queue.Add("")
	for {
		key, end := c.queue.Get()
		if end {
			return nil
		}
		if err := c.pass(ctx); err != nil && ctx.Err() == nil {
			c.log.Warn("addresses of services could not be written", "err", err)
			c.queue.AddRateLimited(key)
		} else {
			c.queue.Forget(key)
		}
		c.queue.Done(key)
	}
}

// pass compares what all services should have with what they have.
func (c *Controller) pass(ctx context.Context) error {
	all, err := c.services.List(labels.Everything())
	if err != nil {
		return err
	}
	nodes, err := c.nodes.List(labels.Everything())
	if err != nil {
		return err
	}
	want := plan(all, nodes, c.opt.ReservedPorts, c.endpointNodes)
	var errs []error
	for _, svc := range all {
		p, ours := want[types.NamespacedName{Namespace: svc.Namespace, Name: svc.Name}]
		if !ours {
			continue
		}
		c.tell(svc, p.refused)
		if !same(svc.Status.LoadBalancer.Ingress, p.addresses) {
			errs = append(errs, c.write(ctx, svc, p.addresses))
		}
	}
	return errors.Join(errs...)
}

// tell says once why a service has no address.
func (c *Controller) tell(svc *v1.Service, why string) {
	if c.told[svc.UID] == why {
		return
	}
	if why == "" {
		delete(c.told, svc.UID)
		return
	}
	c.told[svc.UID] = why
	c.log.Warn("a service gets no address", "service", svc.Namespace+"/"+svc.Name, "why", why)
	if c.opt.Recorder != nil {
		c.opt.Recorder.Event(svc, v1.EventTypeWarning, "PortUnavailable", why)
	}
}

func (c *Controller) write(ctx context.Context, svc *v1.Service, addresses []netip.Addr) error {
	svc = svc.DeepCopy() // the cached one is shared
	svc.Status.LoadBalancer.Ingress = nil
	for _, ip := range addresses {
		mode := v1.LoadBalancerIPModeVIP
		svc.Status.LoadBalancer.Ingress = append(svc.Status.LoadBalancer.Ingress, v1.LoadBalancerIngress{IP: ip.String(), IPMode: &mode})
	}
	_, err := c.client.CoreV1().Services(svc.Namespace).UpdateStatus(ctx, svc, metav1.UpdateOptions{})
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil // its next event brings it here again
	}
	if err != nil {
		return fmt.Errorf("load balancer: write the addresses of %s/%s: %w", svc.Namespace, svc.Name, err)
	}
	return nil
}

// endpointNodes are the nodes with ready endpoints of a service.
func (c *Controller) endpointNodes(svc *v1.Service) map[string]bool {
	out := map[string]bool{}
	found, _ := c.slices.ByIndex(network.SlicesByService, svc.Namespace+"/"+svc.Name) // the index exists
	for _, o := range found {
		for _, e := range o.(*discovery.EndpointSlice).Endpoints {
			if e.NodeName != nil && (e.Conditions.Ready == nil || *e.Conditions.Ready) {
				out[*e.NodeName] = true
			}
		}
	}
	return out
}

// assignment is what one service should have.
type assignment struct {
	addresses []netip.Addr
	refused   string // why it has none although there are nodes; "" otherwise
}

type portKey struct {
	protocol v1.Protocol
	port     int32
}

// plan decides the addresses of all services of type LoadBalancer that are ours, and of services that have left that type: none. It has no side effects.
func plan(all []*v1.Service, nodes []*v1.Node, reserved []int32, endpointNodes func(*v1.Service) map[string]bool) map[types.NamespacedName]assignment {
	out := map[types.NamespacedName]assignment{}
	taken := map[portKey]string{}
	for _, p := range reserved {
		taken[portKey{v1.ProtocolTCP, p}] = "the cluster itself"
	}
	ordered := slices.Clone(all)
	slices.SortFunc(ordered, older)
	for _, svc := range ordered {
		name := types.NamespacedName{Namespace: svc.Namespace, Name: svc.Name}
		switch {
		case svc.Spec.Type != v1.ServiceTypeLoadBalancer:
			if len(svc.Status.LoadBalancer.Ingress) > 0 {
				out[name] = assignment{}
			}
		case svc.Spec.LoadBalancerClass != nil && *svc.Spec.LoadBalancerClass != Class:
		default:
			if owner, port := conflict(svc, taken); owner != "" {
				out[name] = assignment{refused: fmt.Sprintf("port %d/%s of the nodes belongs to %s: choose another port", port.port, port.protocol, owner)}
				continue
			}
			for _, p := range svc.Spec.Ports {
				taken[portKey{p.Protocol, p.Port}] = name.String()
			}
			out[name] = assignment{addresses: addresses(svc, nodes, endpointNodes)}
		}
	}
	return out
}

func conflict(svc *v1.Service, taken map[portKey]string) (owner string, port portKey) {
	for _, p := range svc.Spec.Ports {
		key := portKey{p.Protocol, p.Port}
		if owner, ok := taken[key]; ok {
			return owner, key
		}
	}
	return "", port
}

// older sorts services by age, then by name.
func older(a, b *v1.Service) int {
	if c := a.CreationTimestamp.Compare(b.CreationTimestamp.Time); c != 0 {
		return c
	}
	if a.Namespace+"/"+a.Name < b.Namespace+"/"+b.Name {
		return -1
	}
	return 1
}

// addresses are those of the usable nodes, in the families of the service; under the external policy Local only of nodes with endpoints.
func addresses(svc *v1.Service, nodes []*v1.Node, endpointNodes func(*v1.Service) map[string]bool) []netip.Addr {
	var only map[string]bool
	if followsEndpoints(svc) {
		only = endpointNodes(svc)
	}
	set := map[netip.Addr]bool{}
	for _, n := range nodes {
		if !usable(n) || only != nil && !only[n.Name] {
			continue
		}
		for _, a := range n.Status.Addresses {
			ip, err := netip.ParseAddr(a.Address)
			if err == nil && a.Type == v1.NodeInternalIP && hasFamily(svc, ip.Unmap().Is4()) {
				set[ip.Unmap()] = true
			}
		}
	}
	out := slices.Collect(maps.Keys(set))
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

func hasFamily(svc *v1.Service, ipv4 bool) bool {
	if len(svc.Spec.IPFamilies) == 0 {
		return ipv4
	}
	want := v1.IPv6Protocol
	if ipv4 {
		want = v1.IPv4Protocol
	}
	return slices.Contains(svc.Spec.IPFamilies, want)
}

// usable nodes are ready, stay, and do not exclude themselves.
func usable(n *v1.Node) bool {
	if n.DeletionTimestamp != nil {
		return false
	}
	if _, excluded := n.Labels[v1.LabelNodeExcludeBalancers]; excluded {
		return false
	}
	return slices.ContainsFunc(n.Status.Conditions, func(c v1.NodeCondition) bool {
		return c.Type == v1.NodeReady && c.Status == v1.ConditionTrue
	})
}

func same(have []v1.LoadBalancerIngress, want []netip.Addr) bool {
	return slices.EqualFunc(have, want, func(h v1.LoadBalancerIngress, w netip.Addr) bool { return h.IP == w.String() })
}
