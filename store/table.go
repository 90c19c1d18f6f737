package store

import (
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/tidwall/btree"
)

// Table is everything under one key prefix. All methods are safe for concurrent use.
type Table struct {
	store  *Store
	prefix string
	codec  Codec
	class  Class
	closed atomic.Bool
	cached atomic.Pointer[Snapshot] // of the present tree; nil after each change

	// Guarded by store.mu:
	tree     btree.Map[string, entry]
	labels   labelSets
	revision int64 // of the last change
	garbage  int64 // encoded bytes of all records ever replaced: what pins cost is a difference of two such counts
	indexes  map[string]*index
	window   window
	groups   groupSet
	pins     []*Snapshot // oldest pin first
	// compacted is the revision before which no list may go on, even where the table has not changed since.
	compacted int64
	ended     error // why the table is closed
}

// entry is what the tree holds of a key: a record, and beside it what is asked of many records of which few are wanted.
type entry struct {
	record *Record
	labels *LabelSet
}

func newTable(s *Store, o TableOptions) *Table {
	return &Table{
		store:   s,
		prefix:  o.Prefix,
		codec:   o.Codec,
		class:   o.Class,
		indexes: map[string]*index{},
		window:  window{maxEvents: o.WindowEvents, maxAge: o.WindowAge, maxBytes: o.WindowBytes},
		groups:  groupSet{tablePrefix: o.Prefix, byPrefix: map[string]*watchGroup{}},
	}
}

// Prefix returns the prefix of all keys.
func (t *Table) Prefix() string { return t.prefix }

// Class returns how safe the table's acknowledged writes are.
func (t *Table) Class() Class { return t.class }

// Revision returns the revision of the last change in the table, as far as it is known (after an unclean stop a Lossy table starts
// with a revision above all that were given out before).
func (t *Table) Revision() int64 {
	t.store.mu.RLock()
	defer t.store.mu.RUnlock()
	return t.revision
}

// Len returns the number of objects.
func (t *Table) Len() int {
	t.store.mu.RLock()
	defer t.store.mu.RUnlock()
	return t.tree.Len()
}

// Get returns the newest published record of a key, nil when there is none.
func (t *Table) Get(key string) *Record {
	t.store.mu.RLock()
	e, _ := t.tree.Get(key)
	t.store.mu.RUnlock()
	r := e.record
	if d := t.store.detector; d != nil && r != nil {
		d.sample(r)
	}
	return r
}

// closeLocked ends the table and wakes all its watches.
func (t *Table) closeLocked(why error) {
	if t.ended != nil {
		return
	}
	t.ended = why
	t.closed.Store(true)
	t.pins = nil
	t.groups.each((*watchGroup).end)
}

// AddIndex keeps, from now on, the table's records by the values that fn gives for each. fn must be pure and quick: it is called with
// the store's lock held. The index changes together with the table. An index name can be given once.
func (t *Table) AddIndex(name string, fn func(*Record) []string) error {
	t.store.mu.Lock()
	defer t.store.mu.Unlock()
	if t.indexes[name] != nil {
		return fmt.Errorf("store: table %s has an index %q already", t.prefix, name)
	}
	ix := &index{fn: fn, byValue: map[string]map[string]*Record{}}
	t.tree.Scan(func(_ string, e entry) bool { ix.replace(nil, e.record); return true })
	t.indexes[name] = ix
	return nil
}

// DropIndex forgets an index; nothing happens when there is none of that name.
func (t *Table) DropIndex(name string) {
	t.store.mu.Lock()
	defer t.store.mu.Unlock()
	delete(t.indexes, name)
}

// ByIndex returns the records that have the value in the index, in no particular order, in a slice of the caller's own; nil when there is
// none, or no such index.
func (t *Table) ByIndex(name, value string) []*Record {
	t.store.mu.RLock()
	defer t.store.mu.RUnlock()
	ix := t.indexes[name]
	if ix == nil || len(ix.byValue[value]) == 0 {
		return nil
	}
	set := ix.byValue[value]
	out := make([]*Record, 0, len(set))
	for _, r := range set {
		out = append(out, r)
	}
	return out
}

// IndexValues returns the values that at least one record has in the index, in no particular order.
func (t *Table) IndexValues(name string) []string {
	t.store.mu.RLock()
	defer t.store.mu.RUnlock()
	ix := t.indexes[name]
	if ix == nil {
		return nil
	}
	out := make([]string, 0, len(ix.byValue))
	for v := range ix.byValue {
		out = append(out, v)
	}
	return out
}

// index maps values to records by key. Guarded by Store.mu.
type index struct {
	fn      func(*Record) []string
	byValue map[string]map[string]*Record
}

// replace moves a key from the values of prev to those of next; nil stands for absent.
func (ix *index) replace(prev, next *Record) {
	var old, now []string
	if prev != nil {
		old = ix.fn(prev)
	}
	if next != nil {
		now = ix.fn(next)
	}
	if !slices.Equal(old, now) {
		for _, v := range old {
			set := ix.byValue[v]
			delete(set, prev.Key)
			if len(set) == 0 {
				delete(ix.byValue, v)
			}
		}
	}
	for _, v := range now {
		set := ix.byValue[v]
		if set == nil {
			set = map[string]*Record{}
			ix.byValue[v] = set
		}
		set[next.Key] = next
	}
}
