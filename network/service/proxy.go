package service

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/labels"
	corelisters "k8s.io/client-go/listers/core/v1"
	netlisters "k8s.io/client-go/listers/networking/v1"
	"k8s.io/client-go/tools/cache"

	"knarr/network"
)

// source is who contributes a plan: a Service, or the host ports of a pod (owner in name, namespace empty).
type source struct{ namespace, name string }

// Proxy keeps the table in step with Services, EndpointSlices, Nodes, ServiceCIDRs and host ports. Make it with New, then start the informers, then Run.
type Proxy struct {
	opt      Options
	log      *slog.Logger
	services corelisters.ServiceLister
	nodes    corelisters.NodeLister
	cidrs    netlisters.ServiceCIDRLister
	slices   cache.Indexer
	checkers []cache.DoneChecker
	wake     chan struct{} // one pending change
	synced   atomic.Bool

	mu        sync.Mutex
	running   bool // Run makes passes
	dirty     map[source]bool
	dirtyNode bool // Nodes or ServiceCIDRs changed
	suspect   bool // another process changed the ruleset
	hostPorts map[string][]network.HostPort
	waiters   []chan error // told about the next pass

	state // only Run's goroutine
}

// state is what is live, or will be after the next rebuild.
type state struct {
	kernel   *kernel
	planner  planner
	lastID   uint32
	plans    map[source]*plan
	owners   map[front]source
	waiting  map[front]map[source]bool // who else wants a front
	freed    []source                  // those of waiting who can have one now: the pass at work plans them again
	hairpins map[netip.Addr]int        // plans that have the endpoint
	ranges   map[setRef][]netip.Prefix
	broken   bool // the table does not hold what plans say
	health   *healthServers
}

// New registers with the informers. It touches nothing in the kernel: Run does.
func New(opt Options) (*Proxy, error) {
	if err := opt.validate(); err != nil {
		return nil, err
	}
	if opt.Log == nil {
		opt.Log = slog.Default()
	}
	opt.Sysctl = recorder(opt)
	p := &Proxy{
		opt: opt, log: opt.Log.With("part", "services"), wake: make(chan struct{}, 1),
		dirty: map[source]bool{}, hostPorts: map[string][]network.HostPort{},
		state: state{
			plans: map[source]*plan{}, owners: map[front]source{}, waiting: map[front]map[source]bool{},
			hairpins: map[netip.Addr]int{}, broken: true, planner: planner{skip: map[netip.Addr]bool{}},
		},
	}
	p.planner.newID = func() uint32 { p.lastID++; return p.lastID }
	p.planner.here.node = opt.NodeName
	for _, ip := range opt.LocalAddresses {
		p.planner.skip[ip] = true
	}
	if err := p.register(); err != nil {
		return nil, fmt.Errorf("services: register with the informers: %w", err)
	}
	return p, nil
}

// register adds the handlers. Only Services, EndpointSlices and Nodes are waited for: ServiceCIDRs add to Options.ServiceCIDRs when they come.
func (p *Proxy) register() error {
	f := p.opt.Informers
	services, nodes, cidrs := f.Core().V1().Services(), f.Core().V1().Nodes(), f.Networking().V1().ServiceCIDRs()
	parts := f.Discovery().V1().EndpointSlices().Informer()
	p.services, p.nodes, p.cidrs, p.slices = services.Lister(), nodes.Lister(), cidrs.Lister(), parts.GetIndexer()
	if err := network.AddSlicesByService(parts); err != nil {
		return err
	}
	onNode := func(any) { p.change(func() { p.dirtyNode = true }) }
	handlers := []struct {
		informer cache.SharedIndexInformer
		changed  func(any)
		wait     bool
	}{
		{services.Informer(), func(o any) { s := o.(*v1.Service); p.mark(source{s.Namespace, s.Name}) }, true},
		{parts, func(o any) {
			s := o.(*discovery.EndpointSlice)
			p.mark(source{s.Namespace, s.Labels[discovery.LabelServiceName]})
		}, true},
		{nodes.Informer(), onNode, true},
		{cidrs.Informer(), onNode, false},
	}
	for _, h := range handlers {
		reg, err := h.informer.AddEventHandler(handler(h.changed))
		if err != nil {
			return err
		}
		if h.wait {
			p.checkers = append(p.checkers, reg.HasSyncedChecker())
		}
	}
	return nil
}

// handler calls changed with the new and, where they may belong to different services, the old object. Heartbeats of nodes change nothing.
func handler(changed func(any)) cache.ResourceEventHandler {
	return cache.ResourceEventHandlerFuncs{
		AddFunc: changed,
		UpdateFunc: func(old, new any) {
			if a, ok := old.(*v1.Node); ok && !nodeChanged(a, new.(*v1.Node)) {
				return
			}
			changed(old)
			changed(new)
		},
		DeleteFunc: func(o any) {
			if gone, ok := o.(cache.DeletedFinalStateUnknown); ok {
				o = gone.Obj
			}
			changed(o)
		},
	}
}

func nodeChanged(a, b *v1.Node) bool {
	return !slices.Equal(a.Spec.PodCIDRs, b.Spec.PodCIDRs) || !slices.Equal(a.Status.Addresses, b.Status.Addresses) ||
		a.Labels[v1.LabelTopologyZone] != b.Labels[v1.LabelTopologyZone]
}

// change runs fn under the lock and wakes Run.
func (p *Proxy) change(fn func()) {
	p.mu.Lock()
	fn()
	p.mu.Unlock()
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

func (p *Proxy) mark(s source) { p.change(func() { p.dirty[s] = true }) }

// Synced says whether the rules have followed the API at least once.
func (p *Proxy) Synced() bool { return p.synced.Load() }

// Run keeps the table right until ctx ends; the rules stay, see Purge. It returns an error only where the kernel cannot be talked to at all.
func (p *Proxy) Run(ctx context.Context) error {
	k, err := openKernel(p.opt.NetNS, !p.opt.NoLoopbackNodePorts)
	if err != nil {
		return err
	}
	defer k.close()
	p.kernel = k
	p.health = newHealthServers(p.opt, p.log)
	defer p.health.close()
	p.prepareNode()
	if !cache.WaitFor(ctx, "", p.checkers...) {
		return nil
	}
	watching := make(chan struct{})
	go func() {
		defer close(watching)
		if err := watchForeign(ctx, int(k.ns), func() { p.change(func() { p.suspect = true }) }); err != nil {
			p.log.Warn("a flush of the ruleset by others will only be noticed with the next change", "err", err)
		}
	}()
	defer func() { <-watching }()
	p.change(func() { p.running = true; p.markAllLocked() })
	defer p.release()
	var retry <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-retry:
		case <-p.wake:
			if p.synced.Load() && !p.gather(ctx) {
				return nil
			}
		}
		retry = nil
		if err := p.pass(ctx); err != nil {
			p.log.Error("rules are not up to date", "err", err, "again in", retryAfter)
			retry = time.After(retryAfter)
			continue
		}
		p.synced.Store(true)
	}
}

// gather lets a burst of changes come in before they are worked on.
func (p *Proxy) gather(ctx context.Context) bool { return sleep(ctx, debounce) }

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

func (p *Proxy) markAllLocked() {
	p.dirtyNode = true
	all, _ := p.services.List(labels.Everything()) // the cache never fails
	for _, s := range all {
		p.dirty[source{s.Namespace, s.Name}] = true
	}
	for owner := range p.hostPorts {
		p.dirty[source{name: owner}] = true
	}
}

// pass works on everything that changed since the last one.
func (p *Proxy) pass(ctx context.Context) error {
	p.mu.Lock()
	dirty, dirtyNode, suspect, waiters := p.dirty, p.dirtyNode, p.suspect, p.waiters
	p.dirty, p.dirtyNode, p.suspect, p.waiters = map[source]bool{}, false, false, nil
	p.mu.Unlock()
	if suspect && !p.broken {
		p.checkTable()
	}
	var ranges map[setRef][]netip.Prefix
	if dirtyNode {
		ranges = p.syncNode(dirty)
	}
	stale := newStale(p.opt.NodeIPs)
	err := p.apply(p.ordered(dirty), ranges, stale)
	if err == nil {
		err = p.flushConntrack(stale)
	}
	p.health.sync(ctx, p.plans)
	for _, w := range waiters {
		w <- err
	}
	return err
}

// checkTable looks whether somebody flushed the rules.
func (p *Proxy) checkTable() {
	ok, err := p.kernel.intact()
	if err == nil && !ok {
		p.log.Warn("another process deleted the rules; they are built anew")
	}
	p.broken = !ok
}

// ordered sorts by age, so that the oldest service gets an address that two want, whatever the order of events.
func (p *Proxy) ordered(dirty map[source]bool) []source {
	age := map[source]time.Time{}
	for s := range dirty {
		if svc := p.get(s); svc != nil {
			age[s] = svc.CreationTimestamp.Time
		}
	}
	out := slices.Collect(maps.Keys(dirty))
	slices.SortFunc(out, func(a, b source) int {
		if c := age[a].Compare(age[b]); c != 0 {
			return c
		}
		if a.namespace != b.namespace {
			return cmpString(a.namespace, b.namespace)
		}
		return cmpString(a.name, b.name)
	})
	return out
}

func cmpString(a, b string) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

func (p *Proxy) get(s source) *v1.Service {
	if s.namespace == "" {
		return nil
	}
	svc, err := p.services.Services(s.namespace).Get(s.name)
	if err != nil {
		return nil
	}
	return svc
}

// apply plans the dirty sources and brings the table to the plans: by changes where the table is known, else by a new generation.
func (p *Proxy) apply(dirty []source, ranges map[setRef][]netip.Prefix, stale *staleFlows) error {
	b := newBatch()
	b.ranges = ranges
	for i := 0; i < len(dirty); i++ { // it grows while fronts come free
		p.replan(dirty[i], b, stale)
		dirty, p.freed = append(dirty, p.freed...), nil
		if len(b.del)+len(b.add) > changesPerTx {
			if err := p.commit(b); err != nil {
				return err
			}
			b = newBatch()
		}
	}
	if err := p.commit(b); err != nil || !p.broken {
		return err
	}
	return p.rebuild()
}

// rebuild makes a new generation from the plans.
func (p *Proxy) rebuild() error {
	c := content{chains: map[string]chainSpec{}, ranges: p.ranges}
	for _, pl := range p.plans {
		c.elements = append(c.elements, render(pl, c.chains))
	}
	hairpins := elements{}
	for ip := range p.hairpins {
		hairpins[hairpinKey(ip)] = elemValue{}
	}
	c.elements = append(c.elements, hairpins)
	if err := p.kernel.rebuild(c); err != nil {
		return err
	}
	p.broken = false
	p.reportForeign()
	return nil
}

// batch is one transaction of changes.
type batch struct {
	del, add elements
	chains   map[string]chainSpec
	ranges   map[setRef][]netip.Prefix
}

func newBatch() *batch {
	return &batch{del: elements{}, add: elements{}, chains: map[string]chainSpec{}}
}

// remove deletes an element: from the batch where it is only there, else from the kernel. Deletions are sent before additions.
func (b *batch) remove(key elemKey, v elemValue) {
	if _, fresh := b.add[key]; fresh {
		delete(b.add, key)
		return
	}
	b.del[key] = v
}

// commit sends a batch, or builds everything anew when the table is not known to hold the rest.
func (p *Proxy) commit(b *batch) error {
	if p.broken {
		return nil // apply ends with one rebuild for all
	}
	if len(b.del)+len(b.add)+len(b.ranges) == 0 {
		return nil
	}
	if err := p.kernel.change(b.del, b.add, b.chains, b.ranges); err != nil {
		p.broken = true
		p.log.Warn("the table is not as it was left; it is built anew", "err", err)
	}
	return nil
}

// replan computes the plan of s and adds the difference to the live one to b.
func (p *Proxy) replan(s source, b *batch, stale *staleFlows) {
	old := p.plans[s]
	plan := p.claim(s, p.plan(s, old), old)
	if plan == nil {
		delete(p.plans, s)
	} else {
		p.plans[s] = plan
	}
	stale.note(old, plan)
	del, add := diff(render(old, map[string]chainSpec{}), render(plan, b.chains))
	for k, v := range del {
		b.remove(k, v)
	}
	maps.Copy(b.add, add)
	p.countHairpins(old, plan, b)
}

// plan asks the planner; nil for what is gone.
func (p *Proxy) plan(s source, old *plan) *plan {
	if s.namespace == "" {
		p.mu.Lock()
		ports, ok := p.hostPorts[s.name]
		p.mu.Unlock()
		if !ok {
			return nil
		}
		return p.planner.hostPorts(ports)
	}
	found, _ := p.slices.ByIndex(network.SlicesByService, s.namespace+"/"+s.name) // the index exists
	parts := make([]*discovery.EndpointSlice, 0, len(found))
	for _, o := range found {
		parts = append(parts, o.(*discovery.EndpointSlice))
	}
	return p.planner.service(p.get(s), parts, old)
}

// claim takes the fronts of a new plan, and leaves out those that somebody else has; that one's going brings s here again.
func (p *Proxy) claim(s source, next, old *plan) *plan {
	for front, others := range p.waiting {
		if delete(others, s); len(others) == 0 {
			delete(p.waiting, front)
		}
	}
	keep := map[front]bool{}
	if next != nil {
		kept := next.bindings[:0]
		for _, b := range next.bindings {
			if owner, taken := p.owners[b.front]; taken && owner != s {
				p.log.Warn("two want the same address and port; the older one has it", "address", b.front.String(), "owner", owner, "refused", s)
				if p.waiting[b.front] == nil {
					p.waiting[b.front] = map[source]bool{}
				}
				p.waiting[b.front][s] = true
				continue
			}
			p.owners[b.front] = s
			keep[b.front] = true
			kept = append(kept, b)
		}
		next.bindings = kept
	}
	if old != nil {
		for _, b := range old.bindings {
			if !keep[b.front] {
				p.disown(b.front)
			}
		}
	}
	return next
}

func (p *Proxy) disown(f front) {
	delete(p.owners, f)
	p.freed = append(p.freed, slices.Collect(maps.Keys(p.waiting[f]))...)
}

func (p *Proxy) countHairpins(old, next *plan, b *batch) {
	count := func(pl *plan, n int) {
		if pl == nil {
			return
		}
		for _, ip := range pl.hairpins {
			before := p.hairpins[ip]
			p.hairpins[ip] += n
			key := hairpinKey(ip)
			switch {
			case before == 0:
				b.add[key] = elemValue{}
			case p.hairpins[ip] == 0:
				delete(p.hairpins, ip)
				b.remove(key, elemValue{})
			}
		}
	}
	count(next, 1) // first, so that an endpoint that stays is never counted down to zero
	count(old, -1)
}

// SetHostPorts implements network.HostPorts.
func (p *Proxy) SetHostPorts(ctx context.Context, owner string, ports []network.HostPort) error {
	return p.changeHostPorts(ctx, owner, func() { p.hostPorts[owner] = slices.Clone(ports) })
}

// RemoveHostPorts implements network.HostPorts.
func (p *Proxy) RemoveHostPorts(ctx context.Context, owner string) error {
	return p.changeHostPorts(ctx, owner, func() { delete(p.hostPorts, owner) })
}

func (p *Proxy) changeHostPorts(ctx context.Context, owner string, fn func()) error {
	done := make(chan error, 1)
	wait := false
	p.change(func() {
		fn()
		p.dirty[source{name: owner}] = true
		if wait = p.running; wait {
			p.waiters = append(p.waiters, done)
		}
	})
	if !wait {
		return nil
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("services: host ports of %s: %w", owner, context.Cause(ctx))
	}
}

// release lets nobody wait for a pass that does not come.
func (p *Proxy) release() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.running = false
	for _, w := range p.waiters {
		w <- errors.New("services: the data path has ended")
	}
	p.waiters = nil
}
