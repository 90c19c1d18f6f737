package store

import (
	"context"
	"fmt"
	"strings"
	"sync"
)

// maxScan bounds the events that one poll of a watch looks at while it holds the store's lock shared.
const maxScan = 4096

// Watch reads a table's events after a revision. Its methods are for one goroutine at a time, except Stop, which anybody may call. It costs
// nothing while it is not read. Stop it in the end: its place in the table is kept until then.
type Watch struct {
	table   *Table
	group   *watchGroup
	from    int64
	cursor  uint64 // number of the next event to look at
	seen    int64  // revision up to which matching events were handed out
	stopped chan struct{}
	once    sync.Once
}

// closedChannel is what Ready returns when there is something to read.
var closedChannel = func() chan struct{} { ch := make(chan struct{}); close(ch); return ch }()

// Watch starts reading the events of keys with the prefix (empty: all) and a revision above from. from may lie in the future. A
// revision older than the window is a *GoneError.
func (t *Table) Watch(prefix string, from int64) (*Watch, error) {
	if prefix == "" {
		prefix = t.prefix
	}
	if !strings.HasPrefix(prefix, t.prefix) {
		return nil, fmt.Errorf("store: watch prefix %q does not lie under %s", prefix, t.prefix)
	}
	s := t.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.ended != nil {
		return nil, t.ended
	}
	if from < t.window.base {
		return nil, &GoneError{Requested: from, Oldest: t.window.base}
	}
	return &Watch{
		table:   t,
		group:   t.groups.join(prefix, t.window.next),
		from:    from,
		cursor:  t.window.after(from),
		seen:    from,
		stopped: make(chan struct{}),
	}, nil
}

// Stop ends the watch: a blocked or later Next returns ErrStopped.
func (w *Watch) Stop() {
	w.once.Do(func() {
		close(w.stopped)
		s := w.table.store
		s.mu.Lock()
		w.table.groups.leave(w.group)
		s.mu.Unlock()
	})
}

// Next waits for events and returns some of them, at most maxBatch, in order. The slice may be shared with other watches and must not be
// changed; it may be kept. Errors: ErrGone (*GoneError) when the watch fell behind the window or its table was closed, ErrStopped,
// ErrClosed, the context's.
func (w *Watch) Next(ctx context.Context) ([]Event, error) {
	for {
		events, wait, err := w.poll(true)
		if err != nil || len(events) > 0 {
			return events, err
		}
		if wait == nil {
			continue
		}
		select {
		case <-wait:
		case <-w.stopped:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// TryNext is Next without waiting: no events and no error when there is nothing now.
func (w *Watch) TryNext() ([]Event, error) {
	for {
		events, wait, err := w.poll(true)
		if err != nil || len(events) > 0 || wait != nil {
			return events, err
		}
	}
}

// Ready returns a channel that is closed as soon as TryNext may have something to return, an error included. Ask for it anew before each
// wait.
func (w *Watch) Ready() <-chan struct{} {
	_, wait, err := w.poll(false)
	if err != nil || wait == nil {
		return closedChannel
	}
	return wait
}

// Progress returns the revision up to which every event was handed out: the store's newest when the watch has read everything. It is
// what a bookmark may say.
func (w *Watch) Progress() int64 {
	t := w.table
	t.store.mu.RLock()
	defer t.store.mu.RUnlock()
	if w.cursor >= w.group.last && w.cursor >= w.group.evicted {
		return max(w.from, t.store.revision.Load())
	}
	if w.cursor >= t.window.head && w.cursor < t.window.next {
		c := t.window.find(w.cursor)
		return max(w.from, c.events[w.cursor-c.first].Revision-1)
	}
	return w.seen
}

// poll looks for events. With nothing to read it returns the channel to wait on; all three results are zero when it has to be called again.
func (w *Watch) poll(take bool) (events []Event, wait <-chan struct{}, err error) {
	select {
	case <-w.stopped:
		return nil, nil, ErrStopped
	default:
	}
	t := w.table
	t.store.mu.RLock()
	events, wait, err = w.pollLocked(take)
	t.store.mu.RUnlock()
	if d := t.store.detector; d != nil {
		for i := range events {
			d.check(events[i].Record)
		}
	}
	return events, wait, err
}

func (w *Watch) pollLocked(take bool) ([]Event, <-chan struct{}, error) {
	t, g := w.table, w.group
	win := &t.window
	if t.ended != nil {
		return nil, nil, t.ended
	}
	if w.cursor < g.evicted {
		return nil, nil, &GoneError{Requested: w.seen, Oldest: win.base}
	}
	w.cursor = max(w.cursor, win.head)
	if w.cursor >= g.last {
		return nil, g.waiter(), nil
	}
	if !take {
		return nil, nil, nil
	}
	if g.prefix == t.prefix && win.find(w.cursor).events[w.cursor-win.find(w.cursor).first].Revision > w.from {
		return w.takeAllLocked(), nil, nil
	}
	return w.takeMatchingLocked(), nil, nil
}

// takeAllLocked hands out a part of a chunk as it is.
func (w *Watch) takeAllLocked() []Event {
	c := w.table.window.find(w.cursor)
	i := int(w.cursor - c.first)
	j := min(len(c.events), i+maxBatch)
	w.cursor = c.first + uint64(j)
	w.seen = c.events[j-1].Revision
	return c.events[i:j:j]
}

// takeMatchingLocked copies the events that match.
func (w *Watch) takeMatchingLocked() []Event {
	win := &w.table.window
	var out []Event
	for scanned := 0; w.cursor < win.next && scanned < maxScan && len(out) < maxBatch; {
		c := win.find(w.cursor)
		for i := int(w.cursor - c.first); i < len(c.events) && len(out) < maxBatch; i++ {
			ev := &c.events[i]
			w.cursor++
			scanned++
			if ev.Revision > w.from && strings.HasPrefix(ev.Record.Key, w.group.prefix) {
				out = append(out, *ev)
			}
			w.seen = max(w.seen, ev.Revision)
		}
	}
	return out
}

// watchGroup is what all watches of one prefix share. All but mu and ch is guarded by Store.mu.
type watchGroup struct {
	prefix  string
	members int
	last    uint64 // number after the last event that matches: a cursor here or later has nothing to read
	evicted uint64 // number after the last matching event that was dropped: a cursor before it has lost something

	mu sync.Mutex
	ch chan struct{} // closed at the next matching event; nil: nobody waits
}

// waiter returns the channel that the next matching event closes. Called with Store.mu held at least shared, so no event gets lost in
// between.
func (g *watchGroup) waiter() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.ch == nil {
		g.ch = make(chan struct{})
	}
	return g.ch
}

// take removes the channel, for the caller to close; nil when nobody waits.
func (g *watchGroup) take() chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	ch := g.ch
	g.ch = nil
	return ch
}

// fewGroups is the number of groups up to which trying each prefix is cheaper than looking up the parts of a key.
const fewGroups = 4

// groupSet finds the groups that match a key. Guarded by Store.mu.
type groupSet struct {
	tablePrefix string
	byPrefix    map[string]*watchGroup
	odd         int // groups whose prefix may end within a part of a path: neither in a slash, nor known to be a whole key
}

// join adds a member to the group of a prefix, creating it if need be; next is the number of the event to come.
func (gs *groupSet) join(prefix string, next uint64) *watchGroup {
	g := gs.byPrefix[prefix]
	if g == nil {
		// What matched before is unknown; the first poll finds out.
		g = &watchGroup{prefix: prefix, last: next}
		gs.byPrefix[prefix] = g
		if gs.isOdd(prefix) {
			gs.odd++
		}
	}
	g.members++
	return g
}

func (gs *groupSet) leave(g *watchGroup) {
	g.members--
	if g.members == 0 {
		delete(gs.byPrefix, g.prefix)
		if gs.isOdd(g.prefix) {
			gs.odd--
		}
	}
}

// isOdd says that looking up the path parts of a key may miss the prefix: every prefix that does not end in a slash also matches longer keys.
func (gs *groupSet) isOdd(prefix string) bool { return !strings.HasSuffix(prefix, "/") }

func (gs *groupSet) each(fn func(*watchGroup)) {
	for _, g := range gs.byPrefix {
		fn(g)
	}
}

// matching calls fn for every group whose prefix the key has.
func (gs *groupSet) matching(key string, fn func(*watchGroup)) {
	if len(gs.byPrefix) == 0 {
		return
	}
	if gs.odd > 0 || len(gs.byPrefix) <= fewGroups {
		for prefix, g := range gs.byPrefix {
			if strings.HasPrefix(key, prefix) {
				fn(g)
			}
		}
		return
	}
	for end := len(gs.tablePrefix); ; {
		if g := gs.byPrefix[key[:end]]; g != nil {
			fn(g)
		}
		i := strings.IndexByte(key[end:], '/')
		if i < 0 {
			return
		}
		end += i + 1
	}
}
