package store

import (
	"hash/maphash"
	"maps"
	"sync/atomic"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
)

// A LabelSet is the labels that some objects of a table have in common, exactly. All pods of a workload usually share one, and their objects its
// map: who selects by labels decides once for each set, and of the objects looks only at those that are selected. It is immutable; nil has no labels.
type LabelSet struct {
	labels map[string]string
	number uint32
	hash   uint64
	uses   int           // guarded by Store.mu: records of the table that have it
	marks  atomic.Uint64 // the highest bit: they were made
}

// NewLabelSet makes a set that belongs to no table. The labels belong to it from then on.
func NewLabelSet(labels map[string]string) *LabelSet { return &LabelSet{labels: labels} }

// Labels returns the labels, which must not be changed.
func (l *LabelSet) Labels() map[string]string {
	if l == nil {
		return nil
	}
	return l.labels
}

// Number tells the sets of a table apart while there are fewer than 2^32 of them; after that some share one.
func (l *LabelSet) Number() uint32 {
	if l == nil {
		return 0
	}
	return l.number
}

// MarkBits is the number of bits of LabelSet.Marks.
const MarkBits = 63

// Marks returns bits that stand for something in the labels. fn gives them, from the labels alone; it is called once, or a few times at once.
// All callers share the same marks. Safe for concurrent use.
func (l *LabelSet) Marks(fn func(map[string]string) uint64) uint64 {
	const made = 1 << MarkBits
	m := l.marks.Load()
	if m == 0 {
		m = fn(l.labels) | made
		l.marks.Store(m)
	}
	return m &^ made
}

// labelSets are the sets of a table's present records, one of each. Guarded by Store.mu. Snapshots may hold sets that are in none of them any more.
type labelSets struct {
	known map[uint64]*LabelSet // by hash; of two sets with the same hash one is not known and serves its record alone
	last  uint32
}

// labelSeed is of this process only.
var labelSeed = maphash.MakeSeed()

func hashLabels(labels map[string]string) (out uint64) {
	for key, value := range labels {
		out += maphash.String(labelSeed, key)*31 ^ maphash.String(labelSeed, value) // in any order
	}
	return out
}

// take gives the set of an object that is about to be published in the place of one with the set prev (nil: none), and lets the object share its labels. The set is in use until
// leave.
func (s *labelSets) take(obj runtime.Object, prev *LabelSet) *LabelSet {
	m, err := meta.Accessor(obj)
	if err != nil {
		return nil
	}
	labels := m.GetLabels()
	if len(labels) == 0 {
		return nil
	}
	set := prev
	if set == nil || !maps.Equal(set.labels, labels) {
		set = s.find(labels)
	}
	set.uses++
	if _, isTree := obj.(*unstructured.Unstructured); !isTree {
		m.SetLabels(set.labels) // a tree has no such map
	}
	return set
}

// find gives the set of labels, which it takes over.
func (s *labelSets) find(labels map[string]string) *LabelSet {
	hash := hashLabels(labels)
	have := s.known[hash]
	if have != nil && maps.Equal(have.labels, labels) {
		return have
	}
	s.last++
	set := &LabelSet{labels: labels, number: s.last, hash: hash}
	if have == nil {
		if s.known == nil {
			s.known = map[uint64]*LabelSet{}
		}
		s.known[hash] = set
	}
	return set
}

// leave ends a record's use of a set.
func (s *labelSets) leave(set *LabelSet) {
	if set == nil {
		return
	}
	if set.uses--; set.uses == 0 && s.known[set.hash] == set {
		delete(s.known, set.hash)
	}
}
