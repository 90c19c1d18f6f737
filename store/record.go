package store

import (
	"hash/maphash"
	"sync/atomic"
	"time"

	"k8s.io/apimachinery/pkg/runtime"
)

// Record is one published version of one object. It and everything it points to is immutable; it may be shared and kept freely.
type Record struct {
	Key string
	// Object has its resourceVersion set to Revision. Never write to it: make a deep copy.
	Object runtime.Object
	// Revision of this version; CreateRevision of the object's first version.
	Revision, CreateRevision int64
	// Expires is when the store deletes the object by itself; zero: never.
	Expires time.Time

	size      int64  // encoded bytes, as the engine keeps them
	sum       uint64 // fingerprint of the encoding
	hash      uint64 // of the object as published; set by the mutation detector only
	encodings encodingSet
	marks     atomic.Uint64 // the highest bit: they were made
}

// MarkBits is the number of bits of Record.Marks.
const MarkBits = 63

// Marks returns bits that stand for something in the object, such as its labels, so that readers need not look at objects that have
// nothing of it. fn gives them, from the object alone; it is called once, or a few times at once. All callers share the same marks. Safe for
// concurrent use.
func (r *Record) Marks(fn func() uint64) uint64 {
	const made = 1 << MarkBits
	m := r.marks.Load()
	if m == 0 {
		m = fn() | made
		r.marks.Store(m)
	}
	return m &^ made
}

// EncodedAs says whether an encoding may be the one that the engine keeps for this record: it is sure when it is not, by a
// fingerprint of 64 bits otherwise.
func (r *Record) EncodedAs(value []byte) bool {
	return r.size == int64(len(value)) && r.sum == fingerprint(value)
}

// fingerprints are of this process only.
var fingerprints = maphash.MakeSeed()

func fingerprint(value []byte) uint64 { return maphash.Bytes(fingerprints, value) }
