package apiserver

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync/atomic"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/apis/meta/internalversion"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/component-base/metrics"

	"knarr/api"
	"knarr/apiserver/h2"
	"knarr/store"
)

// watchBufferBytes is what a watch gathers before it writes.
const watchBufferBytes = 64 << 10

// watcher writes one watch.
type watcher struct {
	changes *api.Changes
	events  metrics.CounterMetric // nil: nobody counts
	*read
	w       http.ResponseWriter
	control *http.ResponseController
	buffer  []byte
	told    int64 // revision of the newest bookmark
}

func (rd *read) watch(w http.ResponseWriter, req *http.Request) error {
	sel, opts, params, err := rd.selection(req)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(req.Context(), watchTimeout(params))
	defer cancel()
	changes, err := rd.kind.Follow(sel, opts)
	wt := &watcher{read: rd, w: w, control: http.NewResponseController(w), changes: changes, events: eventCounter(w)}
	if err != nil {
		var status apierrors.APIStatus
		if !errors.As(err, &status) || status.Status().Code != http.StatusGone {
			return err
		}
		wt.begin()
		wt.buffer = wt.appendFailure(wt.buffer, err)
		wt.flush()
		return nil
	}
	defer changes.Stop()
	changes.Share(encoding{rd.kind.Stored, rd.format.name()})
	wt.begin()
	wt.run(ctx, opts.Predicate.AllowWatchBookmarks)
	return nil
}

// encoding is all that decides how a change is written.
type encoding struct {
	kind schema.GroupVersionKind
	form string
}

// watchTimeout is the client's wish, or thirty to sixty minutes so that watches do not all end at once.
func watchTimeout(opts *internalversion.ListOptions) time.Duration {
	if opts.TimeoutSeconds != nil && *opts.TimeoutSeconds > 0 {
		return time.Duration(*opts.TimeoutSeconds) * time.Second
	}
	return MinWatchTimeout + rand.N(MinWatchTimeout)
}

func (wt *watcher) begin() {
	wt.w.Header().Set("Content-Type", wt.format.streamType())
	wt.w.WriteHeader(http.StatusOK)
	_ = wt.control.Flush()
}

// run delivers changes until the client or the time is gone, or the reader has fallen out of the window.
func (wt *watcher) run(ctx context.Context, bookmarks bool) {
	if !wt.initial() {
		return
	}
	var tick <-chan time.Time
	if bookmarks {
		ticker := time.NewTicker(api.BookmarkPeriod)
		defer ticker.Stop()
		tick = ticker.C
	}
	wt.told = wt.changes.Revision()
	if feeder, stall := feederOf(wt.w); feeder != nil {
		wt.feed(ctx, feeder, stall, tick)
		return
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick:
			if wt.buffer = wt.appendBookmark(wt.buffer); !wt.flush() {
				return
			}
		case <-wt.changes.Ready():
			if !wt.pass() {
				return
			}
		}
	}
}

// initial sends the initial state, if that was asked for.
func (wt *watcher) initial() bool {
	changes, end := wt.changes.Initial()
	wt.count(len(changes))
	var err error
	for _, c := range changes {
		if wt.buffer, err = wt.AppendChange(wt.buffer, c); err != nil {
			wt.buffer = wt.appendFailure(wt.buffer, err)
			wt.flush()
			return false
		}
		if len(wt.buffer) >= watchBufferBytes && !wt.drain() {
			return false
		}
	}
	if end {
		wt.buffer = wt.appendRevision(wt.buffer, wt.changes.Revision(), map[string]string{metav1.InitialEventsAnnotationKey: "true"})
	}
	return wt.flush()
}

// pass sends what there is; false when the watch is over.
func (wt *watcher) pass() bool {
	for {
		var more, over bool
		if wt.buffer, more, over = wt.appendChanges(wt.buffer, watchBufferBytes); over || !more {
			return wt.flush() && !over
		}
		if !wt.drain() {
			return false
		}
	}
}

// appendChanges appends what there is, and stops soon after limit bytes; more says that it stopped there, over that the watch has failed, as
// the last event says.
func (wt *watcher) appendChanges(out []byte, limit int) (_ []byte, more, over bool) {
	n, ok := 0, true
	var err error
	for begin := len(out); len(out)-begin < limit; n++ {
		if out, ok, err = wt.changes.AppendNext(out, wt); !ok || err != nil {
			break
		}
	}
	wt.count(n)
	if err != nil {
		return wt.appendFailure(out, err), false, true
	}
	return out, ok, false
}

func (wt *watcher) count(n int) {
	if n > 0 && wt.events != nil {
		wt.events.Add(float64(n))
	}
}

// AppendChange implements api.Encoder: an event around the shared bytes of a change's object; an object that left the selection shows the revision
// of its leaving.
func (wt *watcher) AppendChange(out []byte, c api.Change) ([]byte, error) {
	data, err := wt.encoded(c)
	if err != nil {
		return out, apierrors.NewInternalError(err)
	}
	return wt.format.event(out, c.Type, data, wt.kind.Stored), nil
}

func (wt *watcher) encoded(c api.Change) ([]byte, error) {
	if c.Revision == c.Record.Revision {
		return wt.format.raw(c.Record)
	}
	obj, err := wt.kind.Served(c.Record)
	if err == nil {
		obj, err = store.WithRevision(obj, c.Revision)
	}
	if err != nil {
		return nil, err
	}
	return wt.format.encode(obj)
}

func (wt *watcher) drain() bool {
	_, err := wt.w.Write(wt.buffer)
	wt.buffer = wt.buffer[:0]
	return err == nil
}

func (wt *watcher) flush() bool {
	if len(wt.buffer) == 0 {
		return true
	}
	ok := wt.drain() && wt.control.Flush() == nil
	if cap(wt.buffer) > watchBufferBytes {
		wt.buffer = nil
	}
	return ok
}

// appendBookmark tells the client how far it is, where it does not know.
func (wt *watcher) appendBookmark(out []byte) []byte {
	now := wt.changes.Revision()
	if now <= wt.told {
		return out
	}
	wt.told = now
	return wt.appendRevision(out, now, nil)
}

// appendRevision appends a bookmark, and nothing for a kind that knows no metadata.
func (wt *watcher) appendRevision(out []byte, revision int64, annotations map[string]string) []byte {
	obj, err := wt.kind.New()
	if err != nil {
		return out
	}
	m, err := meta.Accessor(obj)
	if err != nil {
		return out
	}
	m.SetResourceVersion(fmt.Sprint(revision))
	m.SetAnnotations(annotations)
	data, err := wt.format.encode(obj)
	if err != nil {
		return out
	}
	return wt.format.event(out, watch.Bookmark, data, wt.kind.Stored)
}

// appendFailure appends the error event that ends a watch.
func (wt *watcher) appendFailure(out []byte, err error) []byte {
	var status apierrors.APIStatus
	if !errors.As(err, &status) {
		status = apierrors.NewInternalError(err)
	}
	s := status.Status()
	s.TypeMeta = metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}
	data, err := wt.format.encode(&s)
	if err != nil {
		return out
	}
	return wt.format.event(out, watch.Error, data, schema.GroupVersionKind{Version: "v1", Kind: "Status"})
}

// feed is a watch over HTTP/2: the connection asks it when it writes, and its goroutine wakes for the bookmarks and the end only.
type feed struct {
	due  atomic.Bool // a bookmark
	over bool        // the watch has failed
	watcher
	ended chan struct{} // closed when it has failed
}

// feederOf finds what takes feeds below the wrappers of a response, and how long its client may take in nothing; nil where there is none.
func feederOf(w http.ResponseWriter) (_ h2.Feeder, stall time.Duration) {
	for {
		if f, ok := w.(h2.Feeder); ok {
			return f, stall
		}
		if g, ok := w.(*stallGuard); ok {
			stall = g.limit
		}
		u, ok := w.(interface{ Unwrap() http.ResponseWriter })
		if !ok {
			return nil, 0
		}
		w = u.Unwrap()
	}
}

// feed delivers changes until the client or the time is gone, or the reader has fallen out of the window.
func (wt *watcher) feed(ctx context.Context, feeder h2.Feeder, stall time.Duration, tick <-chan time.Time) {
	wt.buffer = nil
	f := &feed{watcher: *wt, ended: make(chan struct{})}
	waker, err := feeder.StartFeed(f, stall)
	if err != nil {
		return
	}
	defer func() { _ = feeder.StopFeed() }() // else the client went away
	wt.changes.OnReady(waker)
	waker.Wake(1) // for what came before
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.ended:
			return
		case <-tick:
			f.due.Store(true)
			waker.Wake(1)
		}
	}
}

// Pending implements h2.Feed.
func (f *feed) Pending() bool { return !f.over && (f.changes.Pending() || f.due.Load()) }

// Next implements h2.Feed.
func (f *feed) Next(out []byte, limit int) (data []byte, more bool) {
	if f.over {
		return out, false
	}
	if out, more, f.over = f.appendChanges(out, limit); f.over {
		close(f.ended)
	} else if !more && f.due.Swap(false) {
		out = f.appendBookmark(out)
	}
	return out, more
}
