package client

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
	"k8s.io/utils/ptr"

	"knarr/store"
)

// minResync is the shortest resync period that a handler gets, as in client-go.
const minResync = time.Second

// informer is a cache.SharedIndexInformer over a view.
//
// It runs one goroutine, the pump, which waits for the table to change and then wakes the handlers. A handler has no goroutine and no queue
// while it has nothing to do: it has a place in the table's event window and the snapshot that belongs to that place (see registration).
type informer struct {
	view    *view
	synced  chan struct{} // closed when the informer runs and its table exists
	poke    chan struct{} // capacity 1: the set of handlers changed
	handler sync.WaitGroup

	mu            sync.Mutex
	started       bool
	stopped       bool
	resync        time.Duration              // for handlers that do not say; 0 is none
	registrations map[*registration]struct{} // of handlers not removed
}

var _ cache.SharedIndexInformer = (*informer)(nil)

func newInformer(v *view, resync time.Duration) *informer {
	return &informer{view: v, resync: resync, synced: make(chan struct{}), poke: make(chan struct{}, 1),
		registrations: map[*registration]struct{}{}}
}

// Run implements cache.SharedInformer.
func (i *informer) Run(stop <-chan struct{}) { i.RunWithContext(wait.ContextForChannel(stop)) }

// RunWithContext implements cache.SharedInformer: it returns when ctx has ended and no handler runs any more.
func (i *informer) RunWithContext(ctx context.Context) {
	i.mu.Lock()
	again := i.started
	i.started = true
	i.mu.Unlock()
	if again {
		klog.FromContext(ctx).Info("Warning: the informer runs already, a second run is not allowed", "informer", i.view.name)
		return
	}
	i.pump(ctx)
	i.mu.Lock()
	i.stopped = true
	for r := range i.registrations {
		r.halt()
	}
	i.mu.Unlock()
	i.handler.Wait()
}

// pump wakes the handlers when something is new for them, until ctx ends.
func (i *informer) pump(ctx context.Context) {
	p := &pumpState{view: i.view}
	defer p.stop()
	for ctx.Err() == nil {
		changed := i.view.source.changed() // before the look at the tables, so that no change is missed
		if p.follow(i.view.bind()) {
			i.markSynced()
		}
		for again := true; again; {
			i.wakeAll()
			again = i.await(ctx, p, changed)
		}
	}
}

// await waits until handlers may have something to do; false means that the table has to be looked up anew.
func (i *informer) await(ctx context.Context, p *pumpState, changed <-chan struct{}) bool {
	timer, stop := i.resyncTimer()
	defer stop()
	select {
	case <-ctx.Done():
		return false
	case <-changed:
		return false
	case <-p.ready():
		return p.skip()
	case <-i.poke:
	case <-timer:
	}
	return true
}

func (i *informer) markSynced() {
	select {
	case <-i.synced:
	default:
		close(i.synced)
	}
}

func (i *informer) wakeAll() {
	i.mu.Lock()
	defer i.mu.Unlock()
	now := time.Now()
	for r := range i.registrations {
		r.wakeLocked(now)
	}
}

// resyncTimer fires when the next handler wants a resync; it never does when none does.
func (i *informer) resyncTimer() (<-chan time.Time, func()) {
	i.mu.Lock()
	defer i.mu.Unlock()
	var next time.Time
	for r := range i.registrations {
		if r.resync > 0 && (next.IsZero() || r.nextResync.Before(next)) {
			next = r.nextResync
		}
	}
	if next.IsZero() {
		return nil, func() {}
	}
	t := time.NewTimer(time.Until(next))
	return t.C, func() { t.Stop() }
}

// pumpState is the pump's own place in the table's event window; it only tells that there is something.
type pumpState struct {
	view  *view
	table *store.Table
	watch *store.Watch
}

// follow moves to t (nil: no table) and says whether there is a table.
func (p *pumpState) follow(t *store.Table) bool {
	if t == p.table && (t == nil || p.watch != nil) {
		return t != nil
	}
	p.stop()
	p.table = t
	if t != nil {
		p.watch, _ = watchFrom(t, p.view.prefix(t))
	}
	return t != nil
}

// skip moves past what handlers will now read for themselves; false when the place was lost.
func (p *pumpState) skip() bool {
	for {
		events, err := p.watch.TryNext()
		if err != nil {
			p.stop()
			return false
		}
		if len(events) == 0 {
			return true
		}
	}
}

func (p *pumpState) ready() <-chan struct{} {
	if p.watch == nil {
		return nil
	}
	return p.watch.Ready()
}

func (p *pumpState) stop() {
	if p.watch != nil {
		p.watch.Stop()
		p.watch = nil
	}
}

// watchFrom takes a snapshot and a watch that goes on exactly from it. The watch is nil when the table was closed meanwhile; then the set of
// tables changes, too.
func watchFrom(t *store.Table, prefix string) (*store.Watch, *store.Snapshot) {
	for {
		s := t.Snapshot()
		w, err := t.Watch(prefix, s.Revision())
		if err == nil {
			return w, s
		}
		if !errors.Is(err, store.ErrGone) {
			return nil, s
		}
		if t.Snapshot().Revision() == s.Revision() { // Gone although nothing moved: the table is closed
			return nil, s
		}
	}
}

// AddEventHandler implements cache.SharedInformer.
func (i *informer) AddEventHandler(h cache.ResourceEventHandler) (cache.ResourceEventHandlerRegistration, error) {
	return i.AddEventHandlerWithOptions(h, cache.HandlerOptions{})
}

// AddEventHandlerWithResyncPeriod implements cache.SharedInformer.
func (i *informer) AddEventHandlerWithResyncPeriod(h cache.ResourceEventHandler, resync time.Duration) (cache.ResourceEventHandlerRegistration, error) {
	return i.AddEventHandlerWithOptions(h, cache.HandlerOptions{ResyncPeriod: &resync})
}

// AddEventHandlerWithOptions implements cache.SharedInformer. The handler is called from one goroutine at a time.
func (i *informer) AddEventHandlerWithOptions(h cache.ResourceEventHandler, o cache.HandlerOptions) (cache.ResourceEventHandlerRegistration, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.stopped {
		return nil, fmt.Errorf("handler %v was not added to shared informer because it has stopped already", h)
	}
	r := &registration{informer: i, handler: h, synced: make(chan struct{}), resync: ptr.Deref(o.ResyncPeriod, i.resync)}
	if r.resync > 0 {
		r.resync = max(r.resync, minResync)
		r.nextResync = time.Now().Add(r.resync)
	}
	i.registrations[r] = struct{}{}
	select {
	case i.poke <- struct{}{}: // the pump, when it runs, wakes it
	default:
	}
	return r, nil
}

// RemoveEventHandler implements cache.SharedInformer. A call under way is not waited for; no further one begins.
func (i *informer) RemoveEventHandler(handle cache.ResourceEventHandlerRegistration) error {
	r, ok := handle.(*registration)
	if !ok {
		return fmt.Errorf("invalid key type %T", handle)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if _, ok := i.registrations[r]; ok {
		delete(i.registrations, r)
		r.halt()
	}
	return nil
}

// GetStore implements cache.SharedInformer.
func (i *informer) GetStore() cache.Store { return i.view }

// GetIndexer implements cache.SharedIndexInformer.
func (i *informer) GetIndexer() cache.Indexer { return i.view }

// AddIndexers implements cache.SharedIndexInformer.
func (i *informer) AddIndexers(indexers cache.Indexers) error {
	if i.IsStopped() {
		return errors.New("indexer was not added because it has stopped already")
	}
	return i.view.AddIndexers(indexers)
}

// HasSynced implements cache.SharedInformer.
func (i *informer) HasSynced() bool { return cache.IsDone(i.HasSyncedChecker()) }

// HasSyncedChecker implements cache.SharedInformer.
func (i *informer) HasSyncedChecker() cache.DoneChecker {
	return done{"informer of " + i.view.name, i.synced}
}

// LastSyncResourceVersion implements cache.SharedInformer: the newest revision of the whole store, since everything published is visible.
func (i *informer) LastSyncResourceVersion() string {
	if !i.HasSynced() {
		return ""
	}
	return strconv.FormatInt(i.view.source.revision(), 10)
}

// SetWatchErrorHandler implements cache.SharedInformer; there is no connection that could fail, so the handler is never called.
func (i *informer) SetWatchErrorHandler(cache.WatchErrorHandler) error { return i.beforeStart() }

// SetWatchErrorHandlerWithContext implements cache.SharedInformer; see SetWatchErrorHandler.
func (i *informer) SetWatchErrorHandlerWithContext(cache.WatchErrorHandlerWithContext) error {
	return i.beforeStart()
}

// SetTransform implements cache.SharedInformer. The transform is accepted and not applied: it exists to save the memory of a copy that here
// nobody makes, and the objects are everybody's.
func (i *informer) SetTransform(cache.TransformFunc) error { return i.beforeStart() }

func (i *informer) beforeStart() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.started {
		return errors.New("informer has already started")
	}
	return nil
}

// IsStopped implements cache.SharedInformer.
func (i *informer) IsStopped() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.stopped
}

// GetController implements cache.SharedInformer.
func (i *informer) GetController() cache.Controller { return controller{i} }

// controller is the part of an informer that older code asks; running it does nothing, as in client-go.
type controller struct{ i *informer }

func (controller) Run(<-chan struct{})                   {}
func (controller) RunWithContext(context.Context)        {}
func (c controller) HasSynced() bool                     { return c.i.HasSynced() }
func (c controller) HasSyncedChecker() cache.DoneChecker { return c.i.HasSyncedChecker() }
func (c controller) LastSyncResourceVersion() string     { return c.i.LastSyncResourceVersion() }

// done is a cache.DoneChecker.
type done struct {
	name string
	ch   <-chan struct{}
}

func (d done) Name() string          { return d.name }
func (d done) Done() <-chan struct{} { return d.ch }
