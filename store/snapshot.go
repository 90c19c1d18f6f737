package store

import (
	"strings"
	"time"

	"github.com/tidwall/btree"
)

// Snapshot is the state of one table at one revision. It never changes; it is safe for concurrent use.
type Snapshot struct {
	tree     *btree.Map[string, *Record] // never written to
	revision int64                       // at which the snapshot stands
	changed  int64                       // revision of the table's last change up to then
	garbage  int64                       // Table.garbage then

	pinnedUntil time.Time // guarded by Store.mu; only of the copies in Table.pins
}

// Revision returns the revision at which the snapshot stands: it holds every change up to it.
func (sn *Snapshot) Revision() int64 { return sn.revision }

// Len returns the number of records.
func (sn *Snapshot) Len() int { return sn.tree.Len() }

// Get returns the record of a key, nil when there is none.
func (sn *Snapshot) Get(key string) *Record {
	r, _ := sn.tree.Get(key)
	return r
}

// Ascend calls fn in key order for the records whose key has the prefix and is not below from, until fn returns false. Empty strings do not
// restrict.
func (sn *Snapshot) Ascend(prefix, from string, fn func(*Record) bool) {
	sn.tree.Ascend(max(prefix, from), func(key string, r *Record) bool {
		return strings.HasPrefix(key, prefix) && fn(r)
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
		_, r, _ := sn.tree.GetAt(int(d.reads.Add(1) % uint64(sn.Len())))
		d.check(r)
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

// SnapshotAt returns the state at exactly that revision: the present one if the table has not changed since, else a pinned one.
// Errors: *GoneError when it is not kept (any more), *FutureError when the store is not there yet.
func (t *Table) SnapshotAt(rev int64) (*Snapshot, error) {
	s := t.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if now := s.revision.Load(); rev > now {
		return nil, &FutureError{Requested: rev, Current: now}
	}
	if rev >= t.revision {
		return t.snapshotLocked().at(rev), nil
	}
	now := s.clock.Now()
	for _, pin := range t.pins {
		if pin.changed <= rev && rev <= pin.revision && now.Before(pin.pinnedUntil) {
			return pin.at(rev), nil
		}
	}
	return nil, &GoneError{Requested: rev, Oldest: t.revision}
}

// Pin keeps a snapshot for SnapshotAt: for Options.PinAge from now, unless the bounds on pins (count, bytes of replaced objects) push it
// out earlier, the oldest first. Pin it again to extend. For lists in pages, which name their snapshot by its revision.
func (t *Table) Pin(sn *Snapshot) {
	s := t.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.ended != nil {
		return
	}
	for i, old := range t.pins {
		if old.changed == sn.changed {
			// The same state: keep it known at the newest of both revisions.
			sn = old.at(max(old.revision, sn.revision))
			t.pins = append(t.pins[:i], t.pins[i+1:]...)
			break
		}
	}
	pin := sn.at(sn.revision)
	pin.pinnedUntil = s.clock.Now().Add(s.opts.PinAge)
	t.pins = append(t.pins, pin)
	t.trimPinsLocked()
	s.keeper.kick()
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
