package store

import (
	"sort"
	"time"
)

// EventType says what happened to an object.
type EventType uint8

// The types of events.
const (
	Added EventType = iota + 1
	Modified
	Deleted
)

// String gives the name that the Kubernetes API uses.
func (t EventType) String() string {
	switch t {
	case Added:
		return "ADDED"
	case Modified:
		return "MODIFIED"
	case Deleted:
		return "DELETED"
	}
	return "UNKNOWN"
}

// Event is one change of one object.
type Event struct {
	Type     EventType
	Revision int64
	Record   *Record // for Deleted: the deleted object with the deletion's revision
	Prev     *Record // the version before; nil for Added
}

const (
	minChunk = 8   // events in the first chunk of a window
	maxChunk = 256 // events in later ones: chunks double up to this
	// chunkShare is the part of a window's bytes after which a chunk is full, whatever its count.
	chunkShare = 8
)

// window is a table's recent events: chunks that fill up and are never changed after, so that watches can be given parts of them without
// copying. Whole chunks are dropped, oldest first. An empty window costs nothing. Guarded by Store.mu.
type window struct {
	maxEvents int
	maxAge    time.Duration
	maxBytes  int64

	chunks []*chunk // oldest first
	head   uint64   // number of the oldest kept event; events are numbered from 0
	next   uint64   // number of the event to come
	base   int64    // every change after this revision is kept
	bytes  int64
}

type chunk struct {
	first  uint64  // number of events[0]
	events []Event // capacity never changes
	newest time.Time
	bytes  int64
}

func (w *window) empty() bool { return len(w.chunks) == 0 }

// append adds an event and returns its number.
func (w *window) append(ev Event, now time.Time) uint64 {
	c := w.tail()
	c.events = append(c.events, ev)
	c.newest = now
	size := ev.Record.size
	if ev.Prev != nil && ev.Type == Modified {
		size += ev.Prev.size
	}
	c.bytes += size
	w.bytes += size
	w.next++
	return w.next - 1
}

// tail returns a chunk with room.
func (w *window) tail() *chunk {
	size := minChunk
	if n := len(w.chunks); n > 0 {
		c := w.chunks[n-1]
		if len(c.events) < cap(c.events) && c.bytes < w.maxBytes/chunkShare {
			return c
		}
		size = min(2*cap(c.events), maxChunk)
	}
	c := &chunk{first: w.next, events: make([]Event, 0, size)}
	w.chunks = append(w.chunks, c)
	return c
}

// evict drops what the bounds forbid and calls fn with each event that went. The newest chunk goes by age only.
func (w *window) evict(now time.Time, fn func(seq uint64, ev *Event)) {
	n := 0
	for n < len(w.chunks) {
		c := w.chunks[n]
		old := now.Sub(c.newest) >= w.maxAge
		full := int(w.next-w.head)-len(c.events) >= w.maxEvents || w.bytes > w.maxBytes
		if !old && (!full || n == len(w.chunks)-1) {
			break
		}
		for i := range c.events {
			fn(c.first+uint64(i), &c.events[i])
		}
		w.bytes -= c.bytes
		w.head += uint64(len(c.events))
		w.base = c.events[len(c.events)-1].Revision
		n++
	}
	if n > 0 {
		w.chunks = append([]*chunk(nil), w.chunks[n:]...)
	}
}

// find returns the chunk that holds an event number in [head, next).
func (w *window) find(seq uint64) *chunk {
	i := sort.Search(len(w.chunks), func(i int) bool { return w.chunks[i].first > seq })
	return w.chunks[i-1]
}

// after returns the number of the first event with a revision above rev.
func (w *window) after(rev int64) uint64 {
	i := sort.Search(len(w.chunks), func(i int) bool {
		evs := w.chunks[i].events
		return evs[len(evs)-1].Revision > rev
	})
	if i == len(w.chunks) {
		return w.next
	}
	c := w.chunks[i]
	return c.first + uint64(sort.Search(len(c.events), func(j int) bool { return c.events[j].Revision > rev }))
}

// oldest returns when the oldest chunk ages out.
func (w *window) oldest() (time.Time, bool) {
	if len(w.chunks) == 0 {
		return time.Time{}, false
	}
	return w.chunks[0].newest.Add(w.maxAge), true
}

// trimWindowLocked drops events that the bounds forbid, and notes for each group the last matching one.
func (t *Table) trimWindowLocked(now time.Time) {
	t.window.evict(now, func(seq uint64, ev *Event) {
		t.groups.matching(ev.Record.Key, func(g *watchGroup) { g.evicted = seq + 1 })
	})
}
