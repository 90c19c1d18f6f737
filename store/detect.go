package store

import (
	"encoding/json"
	"fmt"
	"hash/maphash"
	"sync/atomic"
)

// detectEvery is how many reads pass per one that the mutation detector checks.
const detectEvery = 16

// detector finds objects that were changed after their publication: each is hashed when it is published and again now and then when it
// is read, always before it is replaced or handed out in an event, and at Close.
type detector struct {
	reads atomic.Uint64
}

// hashSeed is constant for the life of the process, which is all that hashes are compared within.
var hashSeed = maphash.MakeSeed()

func objectHash(r *Record) uint64 {
	data, err := json.Marshal(r.Object)
	if err != nil {
		data = fmt.Appendf(nil, "%+v", r.Object)
	}
	return maphash.Bytes(hashSeed, data)
}

func (d *detector) seal(r *Record) { r.hash = objectHash(r) }

// check panics when the record's object is not what was published.
func (d *detector) check(r *Record) {
	if objectHash(r) != r.hash {
		panic(fmt.Sprintf("store: somebody changed the shared object %s (revision %d, %T) after it was published; deep-copy before writing",
			r.Key, r.Revision, r.Object))
	}
}

// sample checks one record in detectEvery.
func (d *detector) sample(r *Record) {
	if d.reads.Add(1)%detectEvery == 0 {
		d.check(r)
	}
}
