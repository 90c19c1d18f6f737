package api

import (
	"hash/maphash"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"

	"knarr/store"
)

// Marks are bits that stand for the labels of an object, for each its key and its pair of key and value: an object that lacks a bit lacks
// the label, which is told without touching the object. Most of what a selective list costs otherwise is waiting for memory.

var markSeed = maphash.MakeSeed()

// markKey is the mark of an object that has the label.
func markKey(key string) uint64 { return bit(maphash.String(markSeed, key)) }

// markPair is the mark of an object whose label has the value.
func markPair(key, value string) uint64 {
	h := maphash.String(markSeed, key)*31 + maphash.String(markSeed, value)
	return bit(h) | bit(h>>20)
}

func bit(h uint64) uint64 { return 1 << (h % store.MarkBits) }

// marksOf gives the marks of a record's labels; all of them where it has no metadata, so that it is looked at.
func marksOf(rec *store.Record) uint64 {
	return rec.Marks(func() (out uint64) {
		m, err := meta.Accessor(rec.Object)
		if err != nil {
			return 1<<store.MarkBits - 1
		}
		for key, value := range m.GetLabels() {
			out |= markKey(key) | markPair(key, value)
		}
		return out
	})
}

// marksFor gives the marks that every object has which the selector selects.
func marksFor(selector labels.Selector) (out uint64) {
	if selector == nil {
		return 0
	}
	requirements, selectable := selector.Requirements()
	if !selectable {
		return 0
	}
	for _, r := range requirements {
		switch r.Operator() {
		case selection.Equals, selection.DoubleEquals, selection.In:
			out |= markKey(r.Key())
			if values := r.ValuesUnsorted(); len(values) == 1 {
				out |= markPair(r.Key(), values[0])
			}
		case selection.Exists, selection.GreaterThan, selection.LessThan:
			out |= markKey(r.Key())
		}
	}
	return out
}
