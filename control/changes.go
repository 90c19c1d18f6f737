package control

import (
	"context"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/metadata/metadatainformer"
	"k8s.io/client-go/tools/cache"
)

// After the set of resources may have changed, discovery is looked at at once and again after each of these, since the API's discovery may
// follow the change with a delay. Nothing looks at it otherwise.
var followUps = [...]time.Duration{500 * time.Millisecond, 5 * time.Second, 30 * time.Second}

// After a discovery that failed (an aggregated API that is down), the next attempt comes after discoveryRetry, doubled each time up to
// discoveryRetryMax.
const (
	discoveryRetry    = 5 * time.Second
	discoveryRetryMax = time.Minute
)

// changes tells when the set of resources that the API serves may have changed.
type changes struct {
	reset func() // forgets what was cached of discovery

	mu         sync.Mutex
	generation uint64        // guarded by mu
	next       chan struct{} // guarded by mu; closed when generation grows
}

func newChanges(reset func()) *changes {
	return &changes{reset: reset, generation: 1, next: make(chan struct{})}
}

// now returns the generation and a channel that is closed when it has grown.
func (c *changes) now() (uint64, <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.generation, c.next
}

func (c *changes) announce() {
	c.reset()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.generation++
	close(c.next)
	c.next = make(chan struct{})
}

// run announces changes until ctx ends: of the set of tables, of definitions of custom resources and of aggregated APIs.
func (c *changes) run(ctx context.Context, tables func() <-chan struct{}, f metadatainformer.SharedInformerFactory) {
	events := make(chan struct{}, 1)
	handler := func(any) {
		select {
		case events <- struct{}{}:
		default:
		}
	}
	for _, gvr := range []schema.GroupVersionResource{
		{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"},
		{Group: "apiregistration.k8s.io", Version: "v1", Resource: "apiservices"},
	} {
		informer := f.ForResource(gvr).Informer()
		h, err := informer.AddEventHandler(cache.ResourceEventHandlerDetailedFuncs{
			AddFunc: func(obj any, initial bool) {
				if !initial {
					handler(obj)
				}
			},
			UpdateFunc: func(_, obj any) { handler(obj) }, DeleteFunc: handler})
		if err == nil {
			defer func() { _ = informer.RemoveEventHandler(h) }()
		}
	}
	f.Start(ctx.Done())
	later, step := time.NewTimer(followUps[0]), 0
	defer later.Stop()
	for {
		changed := tables()
		select {
		case <-ctx.Done():
			return
		case <-changed:
			step = 0
		case <-events:
			step = 0
		case <-later.C:
			step++
		}
		c.announce()
		if step < len(followUps) {
			later.Reset(followUps[step])
		}
	}
}

// gate makes a poll of discovery wait for a reason to poll: the first call passes, later ones when there was a change since, or when the call
// before had failed and some time has passed. For one goroutine.
type gate struct {
	ctx     context.Context
	changes *changes
	seen    uint64
	retry   time.Duration // 0: the last call succeeded
}

// wait returns the context's error when it ended meanwhile.
func (g *gate) wait() error {
	for {
		now, next := g.changes.now()
		if now != g.seen {
			g.seen = now
			return g.ctx.Err()
		}
		var timer <-chan time.Time
		if g.retry > 0 {
			t := time.NewTimer(g.retry)
			defer t.Stop()
			timer = t.C
		}
		select {
		case <-g.ctx.Done():
			return g.ctx.Err()
		case <-next:
		case <-timer:
			return nil
		}
	}
}

// result notes how the call went.
func (g *gate) result(err error) {
	switch {
	case err == nil:
		g.retry = 0
	case g.retry == 0:
		g.retry = discoveryRetry
	default:
		g.retry = min(2*g.retry, discoveryRetryMax)
	}
}

// gated is a discovery client whose ServerPreferred... methods wait at a gate.
type gated struct {
	discovery.ServerResourcesInterface
	gate *gate
}

// ServerPreferredResources implements discovery.ServerResourcesInterface.
func (g gated) ServerPreferredResources() ([]*metav1.APIResourceList, error) {
	return g.pass(g.ServerResourcesInterface.ServerPreferredResources)
}

// ServerPreferredNamespacedResources implements discovery.ServerResourcesInterface.
func (g gated) ServerPreferredNamespacedResources() ([]*metav1.APIResourceList, error) {
	return g.pass(g.ServerResourcesInterface.ServerPreferredNamespacedResources)
}

func (g gated) pass(f func() ([]*metav1.APIResourceList, error)) ([]*metav1.APIResourceList, error) {
	if err := g.gate.wait(); err != nil {
		return nil, err
	}
	out, err := f()
	g.gate.result(err)
	return out, err
}
