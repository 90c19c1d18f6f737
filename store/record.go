package store

import (
	"hash/maphash"
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
	labels    *LabelSet
}

// Labels returns the labels of the object as the table knows them; nil where there are none, and for a record made outside a store.
func (r *Record) Labels() *LabelSet { return r.labels }

// Size is the number of bytes that the engine keeps for this record; zero for a record made outside a store.
func (r *Record) Size() int64 { return r.size }

// EncodedAs says whether an encoding may be the one that the engine keeps for this record: it is sure when it is not, by a
// fingerprint of 64 bits otherwise.
func (r *Record) EncodedAs(value []byte) bool {
	return r.size == int64(len(value)) && r.sum == fingerprint(value)
}

// fingerprints are of this process only.
var fingerprints = maphash.MakeSeed()

func fingerprint(value []byte) uint64 { return maphash.Bytes(fingerprints, value) }
