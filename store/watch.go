package store

import (
	"context"
	"fmt"
	"math"
	"strings"
	"sync"
	"sync/atomic"
)

// maxScan bounds the events that one poll of a watch looks at while it holds the store's lock shared.
const maxScan = 4096

// Watch reads a table's events after a revision. Its methods are for one goroutine at a time, except Stop, which anybody may call. It costs
// nothing while it is not read. Stop it in the end: its place in the table is kept until then.
type Watch struct {
	group   *watchGroup
	cursor  uint64 // number of the next event to look at
	seen    int64  // revision up to which matching events were handed out
	table   *Table
	from    int64
	over    atomic.Bool
	ahead   bool // from lay in the future
	stopped chan struct{}
	once    sync.Once

	waker Waker // guarded by group.mu; nil: nobody is to be told
}

// Waker is told that watches have something to read. It is compared with ==: one that is given to several watches of a prefix is told once for
// all of them.
type Waker interface {
	// Wake runs on the goroutine that publishes, perhaps while locks of the store are held: it must be quick and must not call the store. among is
	// how many wakers, this one too, are told of the same.
	Wake(among int)
}

// closedChannel is what Ready returns when there is something to read.
var closedChannel = func() chan struct{} { ch := make(chan struct{}); close(ch); return ch }()

// Watch starts reading the events of keys with the prefix (empty: all) and a revision above from. from may lie in the future. A
// revision older than the window is a *GoneError.
func (t *Table) Watch(prefix string, from int64) (*Watch, error) {
	w := &Watch{}
	if err := t.Start(w, prefix, from); err != nil {
		return nil, err
	}
	return w, nil
}

// Start is Watch for a zero Watch of the caller's, which must stay where it is: what is read for each of many watches lies together then.
func (t *Table) Start(w *Watch, prefix string, from int64) error {
	if prefix == "" {
		prefix = t.prefix
	}
	if !strings.HasPrefix(prefix, t.prefix) {
		return fmt.Errorf("store: watch prefix %q does not lie under %s", prefix, t.prefix)
	}
	s := t.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.ended != nil {
		return t.ended
	}
	if from < t.window.base {
		return &GoneError{Requested: from, Oldest: t.window.base}
	}
	w.table, w.group = t, t.groups.join(prefix, t.window.next)
	w.from, w.seen, w.cursor, w.ahead = from, from, t.window.after(from), from > s.revision.Load()
	w.stopped = make(chan struct{})
	return nil
}

// Stop ends the watch: a blocked or later Next returns ErrStopped.
func (w *Watch) Stop() {
	w.once.Do(func() {
		w.over.Store(true)
		close(w.stopped)
		w.group.forget(w)
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
		events, wait, err := w.poll(maxBatch, true)
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
func (w *Watch) TryNext() ([]Event, error) { return w.TryTake(maxBatch) }

// TryTake is TryNext for at most n events, which must be between 1 and maxBatch.
func (w *Watch) TryTake(n int) ([]Event, error) {
	for {
		events, wait, err := w.poll(n, false)
		if err != nil || len(events) > 0 || wait != nil {
			return events, err
		}
	}
}

// Ready returns a channel that is closed as soon as TryNext may have something to return, an error included. Ask for it anew before each
// wait.
func (w *Watch) Ready() <-chan struct{} {
	_, wait, err := w.poll(0, true)
	if err != nil || wait == nil {
		return closedChannel
	}
	return wait
}

// OnReady has the waker told after each event that the watch sees, and when its table closes, until Stop: who is told has no goroutine of its
// own that waits for Ready. It is told too of what was read meanwhile, and not of what was there before: look for that
// afterwards. To be called once, before Stop.
func (w *Watch) OnReady(waker Waker) { w.group.remember(w, waker) }

// Pending reports whether TryNext may have something to return, an error included. It costs next to nothing and takes no lock.
func (w *Watch) Pending() bool { return w.cursor < w.group.last.Load() }

// Position tells how far the watch has read, as the number of the event that it looks at next: watches of one table and prefix that are at one
// position will be given the same events.
func (w *Watch) Position() uint64 { return w.cursor }

// Skip does as if the watch had been given all events up to a position, that with the revision as the last of them: for who has them already
// because another watch of the same prefix, at the same position, was given them. Only for watches that Shared gave something.
func (w *Watch) Skip(position uint64, revision int64) { w.cursor, w.seen = position, revision }

// Shared returns what make made for the first watch of the same table and prefix that asked with the key, which must be comparable. It is
// forgotten when none of these watches is left. Nil for a watch that began in the future, which is not given what others at its position are.
func (w *Watch) Shared(key any, make func() any) any {
	if w.ahead {
		return nil
	}
	return w.group.sharedBy(key, make)
}

// Progress returns the revision up to which every event was handed out: the store's newest when the watch has read everything. It is
// what a bookmark may say.
func (w *Watch) Progress() int64 {
	t := w.table
	t.store.mu.RLock()
	defer t.store.mu.RUnlock()
	if w.cursor >= w.group.last.Load() && w.cursor >= w.group.evicted {
		return max(w.from, t.store.revision.Load())
	}
	if w.cursor >= t.window.head && w.cursor < t.window.next {
		c := t.window.find(w.cursor)
		return max(w.from, c.events[w.cursor-c.first].Revision-1)
	}
	return w.seen
}

// poll looks for at most n events. With nothing to read it returns a channel: the one to wait on, if that is wanted. All three results are
// zero when it has to be called again, or n is 0 and there is something.
func (w *Watch) poll(n int, waits bool) (events []Event, wait <-chan struct{}, err error) {
	if w.over.Load() {
		return nil, nil, ErrStopped
	}
	t := w.table
	t.store.mu.RLock()
	events, wait, err = w.pollLocked(n, waits)
	t.store.mu.RUnlock()
	if d := t.store.detector; d != nil {
		for i := range events {
			d.check(events[i].Record)
		}
	}
	return events, wait, err
}

func (w *Watch) pollLocked(n int, waits bool) ([]Event, <-chan struct{}, error) {
	t, g := w.table, w.group
	win := &t.window
	if t.ended != nil {
		return nil, nil, t.ended
	}
	if w.cursor < g.evicted {
		return nil, nil, &GoneError{Requested: w.seen, Oldest: win.base}
	}
	w.cursor = max(w.cursor, win.head)
	if w.cursor >= g.last.Load() {
		if !waits {
			return nil, closedChannel, nil
		}
		return nil, g.waiter(), nil
	}
	if n == 0 {
		return nil, nil, nil
	}
	if g.prefix == t.prefix && win.find(w.cursor).events[w.cursor-win.find(w.cursor).first].Revision > w.from {
		return w.takeAllLocked(n), nil, nil
	}
	return w.takeMatchingLocked(n), nil, nil
}

// takeAllLocked hands out a part of a chunk as it is.
func (w *Watch) takeAllLocked(n int) []Event {
	c := w.table.window.find(w.cursor)
	i := int(w.cursor - c.first)
	j := min(len(c.events), i+n)
	w.cursor = c.first + uint64(j)
	w.seen = c.events[j-1].Revision
	return c.events[i:j:j]
}

// takeMatchingLocked hands out the next run of events that match, as it is in its chunk.
func (w *Watch) takeMatchingLocked(n int) []Event {
	win := &w.table.window
	for scanned := 0; w.cursor < win.next && scanned < maxScan; {
		c := win.find(w.cursor)
		first := int(w.cursor - c.first)
		i := first
		for i < len(c.events) && !w.matches(&c.events[i]) {
			i++
		}
		j := i
		for j < min(len(c.events), i+n) && w.matches(&c.events[j]) {
			j++
		}
		scanned += j - first
		w.cursor = c.first + uint64(j)
		w.seen = max(w.seen, c.events[j-1].Revision)
		if j > i {
			return c.events[i:j:j]
		}
	}
	return nil
}

func (w *Watch) matches(ev *Event) bool {
	return ev.Revision > w.from && strings.HasPrefix(ev.Record.Key, w.group.prefix)
}

// watchGroup is what all watches of one prefix share. What stands below mu is guarded by it, the rest by Store.mu.
type watchGroup struct {
	prefix  string
	members int
	// last is the number after the last event that matches: a cursor here or later has nothing to read. Beyond all numbers when the table has
	// closed. Read without a lock, too.
	last    atomic.Uint64
	evicted uint64 // number after the last matching event that was dropped: a cursor before it has lost something

	waking bool // is to be woken by the Publish under way

	mu     sync.Mutex
	ch     chan struct{}  // closed at the next matching event; nil: nobody waits
	wakers []countedWaker // in no order
	slots  map[Waker]int  // index of each in wakers
	shared map[any]any
}

// countedWaker is who is to be told for so many watches.
type countedWaker struct {
	Waker
	watches int
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

// wake tells all members that wait.
func (g *watchGroup) wake() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.ch != nil {
		close(g.ch)
		g.ch = nil
	}
	for i := range g.wakers {
		g.wakers[i].Wake(len(g.wakers))
	}
}

// end wakes all members for the last time.
func (g *watchGroup) end() {
	g.last.Store(math.MaxUint64)
	g.wake()
}

func (g *watchGroup) remember(w *Watch, waker Waker) {
	g.mu.Lock()
	defer g.mu.Unlock()
	w.waker = waker
	slot, known := g.slots[waker]
	if !known {
		if g.slots == nil {
			g.slots = map[Waker]int{}
		}
		slot = len(g.wakers)
		g.slots[waker] = slot
		g.wakers = append(g.wakers, countedWaker{Waker: waker})
	}
	g.wakers[slot].watches++
}

// forget ends the calls for a member. Where it was the waker's last, none is under way after it.
func (g *watchGroup) forget(w *Watch) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if w.waker == nil {
		return
	}
	slot := g.slots[w.waker]
	if g.wakers[slot].watches--; g.wakers[slot].watches == 0 {
		last := len(g.wakers) - 1
		g.wakers[slot] = g.wakers[last]
		g.slots[g.wakers[slot].Waker] = slot
		delete(g.slots, w.waker)
		g.wakers[last] = countedWaker{}
		g.wakers = g.wakers[:last]
	}
	w.waker = nil
}

// sharedBy finds what the group's watches share under a key.
func (g *watchGroup) sharedBy(key any, make func() any) any {
	g.mu.Lock()
	defer g.mu.Unlock()
	if v, ok := g.shared[key]; ok {
		return v
	}
	if g.shared == nil {
		g.shared = map[any]any{}
	}
	v := make()
	g.shared[key] = v
	return v
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
		g = &watchGroup{prefix: prefix}
		g.last.Store(next)
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
