package store

import (
	"strings"
	"time"

	"github.com/tidwall/btree"
)

// Snapshot is the state of one table at one revision. It never changes; it is safe for concurrent use.
type Snapshot struct {
	tree     *btree.Map[string, entry] // never written to
	revision int64                     // at which the snapshot stands
	changed  int64                     // revision of the table's last change up to then
	garbage  int64                     // Table.garbage then

	pinnedUntil time.Time // guarded by Store.mu; only of the copies in Table.pins
}

// Revision returns the revision at which the snapshot stands: it holds every change up to it.
func (sn *Snapshot) Revision() int64 { return sn.revision }

// Len returns the number of records.
func (sn *Snapshot) Len() int { return sn.tree.Len() }

// Get returns the record of a key, nil when there is none.
func (sn *Snapshot) Get(key string) *Record {
	e, _ := sn.tree.Get(key)
	return e.record
}

// Ascend calls fn in key order for the records whose key has the prefix and is not below from, until fn returns false. Empty strings do not
// restrict.
func (sn *Snapshot) Ascend(prefix, from string, fn func(*Record) bool) {
	sn.AscendLabeled(prefix, from, func(r *Record, _ *LabelSet) bool { return fn(r) })
}

// AscendLabeled is Ascend that gives the record's labels too, which are at hand: who does not look at the record need not wait for its memory.
func (sn *Snapshot) AscendLabeled(prefix, from string, fn func(*Record, *LabelSet) bool) {
	if last, _, ok := sn.tree.Max(); ok && strings.HasPrefix(last, prefix) {
		// Then every key from here on has the prefix, and none of them need be fetched from memory to see that.
		sn.tree.Ascend(max(prefix, from), func(_ string, e entry) bool { return fn(e.record, e.labels) })
		return
	}
	sn.tree.Ascend(max(prefix, from), func(key string, e entry) bool {
		return strings.HasPrefix(key, prefix) && fn(e.record, e.labels)
	})
}

// Snapshot returns the present state, at the newest published revision. It takes constant time; while the table does not change, all callers
// share one.
func (t *Table) Snapshot() *Snapshot {
	s := t.store
	if sn := t.cached.Load(); sn != nil && sn.revision == s.revision.Load() {
		return sn
	}
	s.mu.Lock()
	sn := t.snapshotLocked()
	s.mu.Unlock()
	if d := s.detector; d != nil && sn.Len() > 0 {
		_, e, _ := sn.tree.GetAt(int(d.reads.Add(1) % uint64(sn.Len())))
		d.check(e.record)
	}
	return sn
}

func (t *Table) snapshotLocked() *Snapshot {
	rev := t.store.revision.Load()
	sn := t.cached.Load()
	switch {
	case sn == nil:
		sn = &Snapshot{tree: t.tree.Copy(), revision: rev, changed: t.revision, garbage: t.garbage}
	case sn.revision == rev:
		return sn
	default:
		sn = sn.at(rev)
	}
	t.cached.Store(sn)
	return sn
}

// at is the same state known to hold at another revision.
func (sn *Snapshot) at(rev int64) *Snapshot {
	return &Snapshot{tree: sn.tree, revision: rev, changed: sn.changed, garbage: sn.garbage}
}

// SnapshotAt returns the state at exactly that revision: a pinned one, or the present one if the table has not changed since and no pin of
// that revision has come to its end. Errors: *GoneError when it is not kept (any more), *FutureError when the store is not there yet.
func (t *Table) SnapshotAt(rev int64) (*Snapshot, error) {
	s := t.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if now := s.revision.Load(); rev > now {
		return nil, &FutureError{Requested: rev, Current: now}
	}
	t.expirePinsLocked(s.clock.Now())
	if pin := t.pinOfLocked(rev); pin != nil {
		return pin.at(rev), nil
	}
	if rev >= t.revision && rev >= t.compacted {
		return t.snapshotLocked().at(rev), nil
	}
	return nil, &GoneError{Requested: rev, Oldest: max(t.revision, t.compacted)}
}

// pinOfLocked finds a pinned snapshot of the state at a revision.
func (t *Table) pinOfLocked(rev int64) *Snapshot {
	for _, pin := range t.pins {
		if pin.changed <= rev && rev <= pin.revision {
			return pin
		}
	}
	return nil
}

// Pin keeps a snapshot for SnapshotAt: for Options.PinAge from now, unless the bounds on pins (count, bytes of replaced objects) push it
// out earlier, the oldest first. For lists in pages, which name their snapshot by its revision. Its time is not extended by pinning it again:
// then its revision counts as compacted, as upstream's after five minutes, and lists that go on from it are told so.
func (t *Table) Pin(sn *Snapshot) {
	s := t.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.ended != nil {
		return
	}
	now := s.clock.Now()
	t.expirePinsLocked(now)
	if t.pinOfLocked(sn.revision) != nil {
		return
	}
	pin := sn.at(sn.revision)
	pin.pinnedUntil = now.Add(s.opts.PinAge)
	if n := len(t.pins); n > 0 && t.pins[n-1].changed == sn.changed && pin.pinnedUntil.Sub(t.pins[n-1].pinnedUntil) < s.opts.PinAge/pinGrains {
		// The same state, only just pinned at an earlier revision: one pin serves both.
		pin.pinnedUntil = t.pins[n-1].pinnedUntil
		t.pins = t.pins[: n-1 : n-1]
	}
	t.pins = append(t.pins, pin)
	t.trimPinsLocked()
	s.keeper.kick()
}

// expirePinsLocked drops the pins whose time is over, and remembers up to which revision that makes lists too old.
func (t *Table) expirePinsLocked(now time.Time) {
	n := 0
	for n < len(t.pins) && !now.Before(t.pins[n].pinnedUntil) {
		if t.store.revision.Load() > t.pins[n].revision {
			t.compacted = max(t.compacted, t.pins[n].revision+1)
		}
		n++
	}
	t.dropPinsLocked(n)
}

// trimPinsLocked drops the oldest pins while they are too many or keep too much alive.
func (t *Table) trimPinsLocked() {
	drop := max(0, len(t.pins)-t.store.opts.PinCount)
	for i := len(t.pins) - 1; i >= drop; i-- {
		if t.garbage-t.pins[i].garbage > t.store.opts.PinBytes {
			drop = i + 1
		}
	}
	t.dropPinsLocked(drop)
}

func (t *Table) dropPinsLocked(n int) {
	if n == 0 {
		return
	}
	clear(t.pins[:n])
	t.pins = append([]*Snapshot(nil), t.pins[n:]...)
}
