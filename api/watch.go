package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/apiserver/pkg/storage"

	"knarr/store"
)

// BookmarkPeriod is how often a watch that asked for bookmarks hears of the revision it has reached, when that moved.
// Source: upstream's cacher.
const BookmarkPeriod = time.Minute

// watchResultBuffer is the number of events a storage watch prepares ahead of its reader.
const watchResultBuffer = 16

// A Change is one event of a selection.
type Change struct {
	Type watch.EventType
	// Record is the object. For an object that left the selection it is the last version inside it.
	Record *store.Record
	// Revision is the revision of the event, which for an object that left the selection is newer than the record's.
	Revision int64
}

// Changes follows one selection of a table: the initial state if asked for, then every change in order.
// It is not safe for concurrent use.
type Changes struct {
	// What is looked at for each event of each of many watches lies together.
	taken    []store.Event    // of the table, not looked at yet
	shared   *sharedEncodings // nil: every watch encodes for itself
	revision int64
	watch    store.Watch

	sel     Selection
	initial []Change
	// InitialEnd reports that the next call after the initial changes owes the client a bookmark that ends them.
	initialEnd bool
}

// changesAtOnce is how many events are taken from the table at a time.
const changesAtOnce = 16

// Follow starts a watch with upstream's meaning of resourceVersion and sendInitialEvents. Where the wanted revision is
// no longer in the window it fails with 410 Expired.
func (k *Kind) Follow(sel Selection, opts storage.ListOptions) (*Changes, error) {
	var versioner storage.APIObjectVersioner
	from, err := versioner.ParseResourceVersion(opts.ResourceVersion)
	if err != nil {
		return nil, err
	}
	if opts.SendInitialEvents != nil && *opts.SendInitialEvents {
		if err := k.notNewer(versioner, opts.ResourceVersion); err != nil {
			return nil, err
		}
		return k.followFromState(sel, opts.Predicate.AllowWatchBookmarks)
	}
	if from == 0 && opts.SendInitialEvents == nil {
		return k.followFromState(sel, false)
	}
	if from == 0 {
		from = uint64(k.store.Revision())
	}
	c := &Changes{sel: sel, revision: int64(from)}
	if err := k.Table.Start(&c.watch, sel.Prefix, int64(from)); err != nil {
		return nil, expired(err, int64(from))
	}
	return c, nil
}

// followFromState begins with what the selection holds now.
func (k *Kind) followFromState(sel Selection, end bool) (*Changes, error) {
	snap := k.Table.Snapshot()
	c := &Changes{sel: sel, revision: snap.Revision(), initialEnd: end}
	if err := k.Table.Start(&c.watch, sel.Prefix, snap.Revision()); err != nil {
		return nil, expired(err, snap.Revision())
	}
	add := func(rec *store.Record) bool {
		if sel.Matches(rec) {
			c.initial = append(c.initial, Change{Type: watch.Added, Record: rec, Revision: rec.Revision})
		}
		return true
	}
	if sel.Exact {
		if rec := snap.Get(sel.Prefix); rec != nil {
			add(rec)
		}
		return c, nil
	}
	snap.Ascend(sel.Prefix, sel.Prefix, add)
	return c, nil
}

func expired(err error, from int64) error {
	var gone *store.GoneError
	if errors.As(err, &gone) {
		return apierrors.NewResourceExpired(fmt.Sprintf("too old resource version: %d (%d)", from, gone.Oldest))
	}
	return err
}

// Initial gives the initial state, once, and whether a bookmark must end it.
func (c *Changes) Initial() (changes []Change, endsWithBookmark bool) {
	changes, endsWithBookmark = c.initial, c.initialEnd
	c.initial, c.initialEnd = nil, false
	return changes, endsWithBookmark
}

// Ready is signalled when Next may have something to give.
func (c *Changes) Ready() <-chan struct{} { return c.watch.Ready() }

// OnReady has the waker told whenever Next may have something to give: see store.Watch.
func (c *Changes) OnReady(waker store.Waker) { c.watch.OnReady(waker) }

// Pending reports whether Next may have something to give, an error included. It costs next to nothing and takes no lock.
func (c *Changes) Pending() bool { return len(c.taken) > 0 || c.watch.Pending() }

// Next gives the next change, without waiting; false when there is none now, 410 Expired when the reader fell out of the window.
func (c *Changes) Next() (Change, bool, error) { return c.next(changesAtOnce) }

// next is Next, and takes so many events from the table.
func (c *Changes) next(atOnce int) (Change, bool, error) {
	for {
		if len(c.taken) == 0 {
			var err error
			if c.taken, err = c.watch.TryTake(atOnce); err != nil {
				return Change{}, false, expired(err, c.revision)
			}
			if len(c.taken) == 0 {
				return Change{}, false, nil
			}
		}
		e := &c.taken[0]
		if c.taken = c.taken[1:]; len(c.taken) == 0 {
			c.taken = nil // keeps nothing alive
		}
		c.revision = e.Revision
		if change, ok := c.sel.change(e); ok {
			return change, true, nil
		}
	}
}

// Revision is the revision up to which the reader has been told everything.
func (c *Changes) Revision() int64 {
	if len(c.taken) > 0 {
		return c.revision
	}
	return max(c.revision, c.watch.Progress())
}

// Stop ends the watch.
func (c *Changes) Stop() { c.watch.Stop() }

// change translates a table's event to the selection's view: objects enter and leave a selection.
func (s *Selection) change(e *store.Event) (Change, bool) {
	if s.Exact && e.Record.Key != s.Prefix {
		return Change{}, false
	}
	was := e.Prev != nil && s.Matches(e.Prev)
	is := e.Type != store.Deleted && s.Matches(e.Record)
	switch {
	case is && was:
		return Change{watch.Modified, e.Record, e.Revision}, true
	case is:
		return Change{watch.Added, e.Record, e.Revision}, true
	case was && e.Type == store.Deleted:
		return Change{watch.Deleted, e.Record, e.Revision}, true
	case was:
		return Change{watch.Deleted, e.Prev, e.Revision}, true
	}
	return Change{}, false
}

// watch starts upstream's kind of watch over Changes: a goroutine that converts for one reader.
func (s *Storage) watch(ctx context.Context, prefix string, opts storage.ListOptions) (watch.Interface, error) {
	changes, err := s.kind.Follow(s.selection(prefix, opts), opts)
	if err != nil {
		if status := apierrors.APIStatus(nil); errors.As(err, &status) && status.Status().Code == http.StatusGone {
			return newFailedWatch(err), nil
		}
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	w := &storageWatch{
		storage:   s,
		changes:   changes,
		bookmarks: opts.Predicate.AllowWatchBookmarks,
		result:    make(chan watch.Event, watchResultBuffer),
		cancel:    cancel,
	}
	go w.run(ctx)
	return w, nil
}

// storageWatch is a watch.Interface over Changes.
type storageWatch struct {
	storage   *Storage
	changes   *Changes
	bookmarks bool
	result    chan watch.Event
	cancel    context.CancelFunc
}

// Stop implements watch.Interface.
func (w *storageWatch) Stop() { w.cancel() }

// ResultChan implements watch.Interface.
func (w *storageWatch) ResultChan() <-chan watch.Event { return w.result }

func (w *storageWatch) run(ctx context.Context) {
	defer close(w.result)
	defer w.changes.Stop()
	initial, end := w.changes.Initial()
	for _, change := range initial {
		if !w.send(ctx, change) {
			return
		}
	}
	if end && !w.bookmark(ctx, true) {
		return
	}
	var tick <-chan time.Time
	if w.bookmarks {
		ticker := time.NewTicker(BookmarkPeriod)
		defer ticker.Stop()
		tick = ticker.C
	}
	told := w.changes.Revision()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick:
			if now := w.changes.Revision(); now > told {
				told = now
				if !w.bookmark(ctx, false) {
					return
				}
			}
		case <-w.changes.Ready():
			if !w.pass(ctx) {
				return
			}
		}
	}
}

// pass delivers what there is; false when the reader is gone or the watch failed.
func (w *storageWatch) pass(ctx context.Context) bool {
	for {
		change, ok, err := w.changes.Next()
		if err != nil {
			w.fail(ctx, err)
			return false
		}
		if !ok {
			return true
		}
		if !w.send(ctx, change) {
			return false
		}
	}
}

// send converts and delivers; false when the reader is gone or the watch failed.
func (w *storageWatch) send(ctx context.Context, c Change) bool {
	obj, err := w.storage.kind.form.fromStored(c.Record)
	if err == nil && c.Revision != c.Record.Revision {
		err = w.storage.versioner.UpdateObject(obj, uint64(c.Revision))
	}
	if err != nil {
		w.fail(ctx, apierrors.NewInternalError(err))
		return false
	}
	return w.deliver(ctx, watch.Event{Type: c.Type, Object: obj})
}

func (w *storageWatch) deliver(ctx context.Context, e watch.Event) bool {
	select {
	case w.result <- e:
		return true
	case <-ctx.Done():
		return false
	}
}

// bookmark tells the reader how far it is; end marks the end of the initial events.
func (w *storageWatch) bookmark(ctx context.Context, end bool) bool {
	obj := w.storage.newFunc()
	m, err := meta.Accessor(obj)
	if err != nil {
		return false
	}
	m.SetResourceVersion(strconv.FormatInt(w.changes.Revision(), 10))
	if end {
		m.SetAnnotations(map[string]string{metav1.InitialEventsAnnotationKey: "true"})
	}
	return w.deliver(ctx, watch.Event{Type: watch.Bookmark, Object: obj})
}

func (w *storageWatch) fail(ctx context.Context, err error) {
	w.deliver(ctx, watch.Event{Type: watch.Error, Object: statusOf(err)})
}

func statusOf(err error) runtime.Object {
	var status apierrors.APIStatus
	if errors.As(err, &status) {
		s := status.Status()
		return &s
	}
	return &apierrors.NewInternalError(err).ErrStatus
}

// newFailedWatch delivers one error and ends: what a client gets that asks for a revision which is gone.
func newFailedWatch(err error) watch.Interface {
	ch := make(chan watch.Event, 1)
	ch <- watch.Event{Type: watch.Error, Object: statusOf(err)}
	close(ch)
	return watch.NewProxyWatcher(ch)
}
