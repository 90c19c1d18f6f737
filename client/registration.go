package client

import (
	"runtime/debug"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"knarr/store"
)

// maxKeptSince is the number of keys up to which the map registration.since is reused.
const maxKeptSince = 256

// registration is one handler's place in a table.
//
// What the handler knows is the snapshot `base` plus the events delivered since then (`since`). While it is caught up, since is empty and base
// is the table's newest state, which costs nothing. If the handler is so slow that the event window moves on without it, the difference
// between what it knows and the newest snapshot is delivered instead of the lost events.
//
// A goroutine exists only while there is something to deliver; there is never more than one.
type registration struct {
	informer   *informer
	handler    cache.ResourceEventHandler
	synced     chan struct{} // closed when the initial list is delivered
	resync     time.Duration // 0 is none
	nextResync time.Time     // guarded by informer.mu

	mu        sync.Mutex
	running   bool // a goroutine delivers
	again     bool // something happened since it looked
	halted    bool // removed, or the informer has stopped
	resyncDue bool

	// Owned by the delivering goroutine.
	listed bool // the initial list is delivered
	table  *store.Table
	prefix string // of the keys that matter in table and base
	watch  *store.Watch
	base   *store.Snapshot          // nil is empty
	since  map[string]*store.Record // by key; nil is deleted
}

// HasSynced implements cache.ResourceEventHandlerRegistration.
func (r *registration) HasSynced() bool { return cache.IsDone(r.HasSyncedChecker()) }

// HasSyncedChecker implements cache.ResourceEventHandlerRegistration.
func (r *registration) HasSyncedChecker() cache.DoneChecker {
	return done{"handler of " + r.informer.view.name, r.synced}
}

// wakeLocked makes the handler look for news. informer.mu is held, which orders it before the informer's stop.
func (r *registration) wakeLocked(now time.Time) {
	due := r.resync > 0 && !now.Before(r.nextResync)
	if due {
		r.nextResync = now.Add(r.resync)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.resyncDue = r.resyncDue || due
	switch {
	case r.halted:
	case r.running:
		r.again = true
	default:
		r.running = true
		r.informer.handler.Go(r.deliver)
	}
}

// halt ends the deliveries after the one under way.
func (r *registration) halt() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.halted = true
	if !r.running {
		r.release()
	}
}

func (r *registration) isHalted() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.halted
}

// release gives the place in the table back.
func (r *registration) release() {
	if r.watch != nil {
		r.watch.Stop()
	}
	r.watch, r.base, r.since, r.table = nil, nil, nil, nil
}

// deliver calls the handler until there is nothing left to tell it.
func (r *registration) deliver() {
	for {
		r.catchUp()
		r.mu.Lock()
		due := r.resyncDue && !r.halted
		r.resyncDue = false
		if !due && (!r.again || r.halted) {
			r.running = false
			if r.halted {
				r.release()
			}
			r.mu.Unlock()
			return
		}
		r.again = false
		r.mu.Unlock()
		if due {
			r.resyncAll()
		}
	}
}

// catchUp delivers everything published so far.
func (r *registration) catchUp() {
	t := r.informer.view.table()
	if t != r.table || r.watch == nil {
		r.rebase(t)
	}
	for r.watch != nil && !r.isHalted() {
		now := r.table.Snapshot() // before TryNext: if that has nothing, now is exactly what the handler knows
		events, err := r.watch.TryNext()
		if err != nil {
			r.rebase(r.table)
			continue
		}
		if len(events) == 0 {
			r.know(now)
			return
		}
		for n := range events {
			if r.isHalted() {
				return
			}
			r.event(&events[n])
		}
	}
}

// know says that the handler has been told everything up to s.
func (r *registration) know(s *store.Snapshot) {
	r.base = s
	if len(r.since) > maxKeptSince {
		r.since = nil
	}
	clear(r.since)
}

// event delivers one event as the view sees it: an object that begins or ceases to match the filter is added or deleted.
func (r *registration) event(e *store.Event) {
	if r.since == nil {
		r.since = map[string]*store.Record{}
	}
	v := r.informer.view
	if e.Type == store.Deleted {
		r.since[e.Record.Key] = nil
		if last, ok := v.see(e.Record); ok { // the last state, with the revision in which it is gone
			r.call(func() { r.handler.OnDelete(last) })
		}
		return
	}
	r.since[e.Record.Key] = e.Record
	r.changed(e.Prev, e.Record, false)
}

// changed delivers the way from old (nil: none) to an existing version.
func (r *registration) changed(old, now *store.Record, initial bool) {
	before, had := r.informer.view.see(old)
	after, has := r.informer.view.see(now)
	switch {
	case had && has:
		r.call(func() { r.handler.OnUpdate(before, after) })
	case has:
		r.call(func() { r.handler.OnAdd(after, initial) })
	case had:
		r.call(func() { r.handler.OnDelete(atRevision(before, now.Revision)) })
	}
}

// rebase takes a new place in t (nil: the table is gone) and delivers the difference to what the handler knows. The first time that is the
// initial list.
func (r *registration) rebase(t *store.Table) {
	if r.watch != nil {
		r.watch.Stop()
		r.watch = nil
	}
	if t == nil && r.table == nil {
		return
	}
	old := r.known()
	var now *store.Snapshot
	if t != nil {
		r.watch, now = watchFrom(t, r.informer.view.prefix(t))
	}
	r.table = t
	if now != nil {
		r.prefix = r.informer.view.prefix(t)
		now.Ascend(r.prefix, "", func(rec *store.Record) bool {
			before := old(rec.Key)
			if before == nil || before.Revision != rec.Revision {
				r.changed(before, rec, !r.listed)
			}
			return !r.isHalted()
		})
	}
	r.vanished(now)
	r.since = nil
	r.base = now
	if t != nil && !r.listed && !r.isHalted() {
		r.listed = true
		close(r.synced)
	}
}

// known returns a lookup of what the handler knows.
func (r *registration) known() func(key string) *store.Record {
	base, since := r.base, r.since
	return func(key string) *store.Record {
		if rec, ok := since[key]; ok {
			return rec
		}
		if base == nil {
			return nil
		}
		return base.Get(key)
	}
}

// vanished delivers the deletion of what the handler knows and now (nil: empty) has not.
func (r *registration) vanished(now *store.Snapshot) {
	gone := func(rec *store.Record) {
		if rec == nil || now != nil && now.Get(rec.Key) != nil {
			return
		}
		if obj, ok := r.informer.view.see(rec); ok {
			key, _ := cache.MetaNamespaceKeyFunc(obj)
			r.call(func() { r.handler.OnDelete(cache.DeletedFinalStateUnknown{Key: key, Obj: obj}) })
		}
	}
	if r.base != nil {
		r.base.Ascend(r.prefix, "", func(rec *store.Record) bool {
			if _, newer := r.since[rec.Key]; !newer {
				gone(rec)
			}
			return !r.isHalted()
		})
	}
	for _, rec := range r.since {
		gone(rec)
	}
}

// resyncAll tells the handler of every object again.
func (r *registration) resyncAll() {
	r.informer.view.each("", func(_ string, obj runtime.Object) {
		if !r.isHalted() {
			r.call(func() { r.handler.OnUpdate(obj, obj) })
		}
	})
}

// call runs the handler; its panic is logged and ends only this call.
func (r *registration) call(f func()) {
	defer func() {
		if reason := recover(); reason != nil {
			klog.ErrorS(nil, "Panic in an event handler", "informer", r.informer.view.name, "panic", reason, "stack", string(debug.Stack()))
		}
	}()
	f()
}
