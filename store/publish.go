package store

import (
	"context"
	"strings"
	"time"
)

// storeHost gives the engine its two calls without putting them into Store's own method set.
type storeHost struct{ s *Store }

// Current implements Host.
func (h storeHost) Current(w *Write) (revision, createRevision int64) {
	t := h.s.tableOf(w)
	if t == nil {
		return 0, 0
	}
	if r := t.Get(w.Key); r != nil {
		return r.Revision, r.CreateRevision
	}
	return 0, 0
}

// Publish implements Host: the one place where the store changes.
func (h storeHost) Publish(group []*Proposal) {
	s := h.s
	for _, p := range group {
		for i := range p.Writes {
			s.decodeForeign(&p.Writes[i])
		}
	}
	var wake []*watchGroup
	kick := false
	now := s.clock.Now()
	s.mu.Lock()
	last := s.revision.Load()
	for _, p := range group {
		p.records = make([]*Record, len(p.Writes))
		for i := range p.Writes {
			w := &p.Writes[i]
			last = w.Revision
			if w.op != nil {
				t := w.op.table
				ev := t.applyLocked(w)
				p.records[i] = ev.Record
				if ev.Record != nil {
					kick = t.window.empty() || kick || s.expiry.isFirst(ev.Record)
					wake = t.recordLocked(ev, now, wake)
				}
			}
		}
	}
	s.revision.Store(last)
	for _, g := range wake {
		g.waking = false
	}
	s.mu.Unlock()
	for _, g := range wake {
		g.wake()
	}
	if kick {
		s.keeper.kick()
	}
}

func (s *Store) tableOf(w *Write) *Table {
	if w.op != nil {
		return w.op.table
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	return tableOfLocked(s, w)
}

// tableOfLocked finds the open table of another server's write by its key: some ancestor path of it is the prefix.
func tableOfLocked(s *Store, w *Write) *Table {
	for end := strings.LastIndexByte(w.Key, '/'); end > 0; end = strings.LastIndexByte(w.Key[:end], '/') {
		if t := s.tables[w.Key[:end+1]]; t != nil {
			return t
		}
	}
	return nil
}

// decodeForeign makes the object of a write that another server did; op stays nil for a table that is not open. A value that cannot be decoded breaks its table: watches and
// transactions on it fail, rather than show a wrong state.
func (s *Store) decodeForeign(w *Write) {
	if w.op != nil {
		return
	}
	t := s.tableOf(w)
	if t == nil {
		return
	}
	op := &preparedOp{table: t}
	if !w.Delete {
		obj, err := t.codec.Decode(context.Background(), w.Key, w.Value, w.Revision)
		if err != nil {
			s.mu.Lock()
			t.closeLocked(&CorruptError{Key: w.Key, Err: err})
			s.mu.Unlock()
			return
		}
		op.object = obj
	}
	w.op = op
}

// applyLocked changes tree, indexes and expiry, and returns the event; its Record is nil when a deletion found nothing.
func (t *Table) applyLocked(w *Write) Event {
	s := t.store
	e, had := t.tree.Get(w.Key)
	prev := e.record
	if had && s.detector != nil {
		s.detector.check(prev)
	}
	ev := Event{Type: Added, Revision: w.Revision, Prev: prev}
	r := &Record{Key: w.Key, Revision: w.Revision, CreateRevision: w.CreateRevision}
	switch {
	case !w.Delete:
		if had {
			ev.Type = Modified
		}
		r.Object, r.Expires, r.size, r.sum = w.op.object, w.Expires, int64(len(w.Value)), fingerprint(w.Value)
		mustSetRevision(r)
		r.labels = t.labels.take(r.Object, e.labels)
	case had:
		ev.Type = Deleted
		obj, err := WithRevision(prev.Object, w.Revision)
		if err != nil {
			panic(err) // the same object took a revision when it was stored
		}
		r.Object, r.Expires, r.size, r.labels = obj, prev.Expires, prev.size, prev.labels
	default:
		return ev
	}
	s.finish(r)
	ev.Record = r
	t.replaceLocked(prev, r, ev.Type == Deleted)
	return ev
}

func mustSetRevision(r *Record) {
	if err := setRevision(r.Object, r.Revision); err != nil {
		panic(err) // its resourceVersion was cleared before
	}
}

// replaceLocked puts next in the place of prev (nil: none), or takes prev away.
func (t *Table) replaceLocked(prev, next *Record, deleted bool) {
	if prev != nil {
		t.store.expiry.remove(t, prev)
		t.store.encodings.replace(&prev.encodings)
		t.labels.leave(prev.labels)
		t.garbage += prev.size
	}
	live := next
	if deleted {
		live = nil
		t.store.encodings.replace(&next.encodings)
		t.tree.Delete(next.Key)
	} else {
		t.tree.Set(next.Key, entry{next, next.labels})
		t.store.expiry.add(t, next)
	}
	for _, ix := range t.indexes {
		ix.replace(prev, live)
	}
	t.revision = next.Revision
	t.cached.Store(nil)
	t.trimPinsLocked()
}

// recordLocked appends an event to the window and collects the groups to wake.
func (t *Table) recordLocked(ev Event, now time.Time, wake []*watchGroup) []*watchGroup {
	seq := t.window.append(ev, now)
	t.groups.matching(ev.Record.Key, func(g *watchGroup) {
		g.last.Store(seq + 1)
		if !g.waking {
			g.waking = true
			wake = append(wake, g)
		}
	})
	t.trimWindowLocked(now)
	return wake
}
