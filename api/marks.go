package api

import (
	"hash/maphash"

	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"

	"knarr/store"
)

// Marks are bits that stand for labels, for each its key and its pair of key and value: a set that lacks a bit lacks the label, which is told
// without a look at the rest. For watches, whose events are looked at one by one, and tables whose objects have labels of their own each.

var markSeed = maphash.MakeSeed()

// markKey is the mark of an object that has the label.
func markKey(key string) uint64 { return bit(maphash.String(markSeed, key)) }

// markPair is the mark of an object whose label has the value.
func markPair(key, value string) uint64 {
	h := maphash.String(markSeed, key)*31 + maphash.String(markSeed, value)
	return bit(h) | bit(h>>20)
}

func bit(h uint64) uint64 { return 1 << (h % store.MarkBits) }

// marksOf gives the marks of labels.
func marksOf(set map[string]string) (out uint64) {
	for key, value := range set {
		out |= markKey(key) | markPair(key, value)
	}
	return out
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
