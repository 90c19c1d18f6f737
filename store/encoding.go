package store

import (
	"slices"
	"sync"
	"sync/atomic"
)

// encodingSet holds the encodings of one record: a list that only grows, to at most maxEncodings.
type encodingSet struct {
	head     atomic.Pointer[encoding]
	cache    *encodingCache // nil: a record made outside a store, not accounted
	replaced bool           // there is a newer version of the object, or it is deleted; guarded by cache.mu
}

// encoding is one kind of encoding of one record. Its bytes may be dropped by the cache, and are then made again when asked for.
type encoding struct {
	kind  string
	next  *encoding
	depth int // length of the list from here on

	mu   sync.Mutex // held while the bytes are made, so that they are made once
	data atomic.Pointer[[]byte]

	size  int64 // that the cache counts, in bytes; guarded by the cache's mu
	moved bool  // to the cache's replaced ones; guarded by the cache's mu
}

// Encoding returns the record's bytes of a kind (media type and version), made at most once by make and then shared by all callers, who
// must not change them. An error is not remembered. Kinds beyond maxEncodings, and encodings that the store's byte bound pushed
// out, are made again. Safe for concurrent use; make must not call Encoding of the same record and kind.
func (r *Record) Encoding(kind string, make func() ([]byte, error)) ([]byte, error) {
	e := r.encodings.entry(kind)
	if e == nil {
		return make()
	}
	if p := e.data.Load(); p != nil {
		return *p, nil
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if p := e.data.Load(); p != nil {
		return *p, nil
	}
	data, err := make()
	if err != nil {
		return nil, err
	}
	e.data.Store(&data)
	if c := r.encodings.cache; c != nil {
		c.add(&r.encodings, e, int64(len(data)))
	}
	return data, nil
}

// Encodings sets into[i] to the bytes that records[i] has cached of a kind, and leaves it where there are none. For many records it
// takes a fraction of the time of Encoding: each of its loops waits for the memory of several records at once.
func Encodings(records []*Record, kind string, into [][]byte) {
	var entries [encodingsAtOnce]*encoding
	var found [encodingsAtOnce]*[]byte
	for len(records) > 0 {
		n := min(len(records), encodingsAtOnce)
		for i, r := range records[:n] {
			entries[i] = r.encodings.head.Load()
		}
		for i, e := range entries[:n] {
			for e != nil && e.kind != kind {
				e = e.next
			}
			if found[i] = nil; e != nil {
				found[i] = e.data.Load()
			}
		}
		for i, data := range found[:n] {
			if data != nil {
				into[i] = *data
			}
		}
		records, into = records[n:], into[n:]
	}
}

// encodingsAtOnce is how many records Encodings works on at a time.
const encodingsAtOnce = 64

// entry finds or adds the list element of a kind; nil when the list is full.
func (s *encodingSet) entry(kind string) *encoding {
	var fresh *encoding
	for {
		head := s.head.Load()
		for e := head; e != nil; e = e.next {
			if e.kind == kind {
				return e
			}
		}
		depth := 1
		if head != nil {
			depth = head.depth + 1
		}
		if depth > maxEncodings {
			return nil
		}
		if fresh == nil {
			fresh = &encoding{kind: kind}
		}
		fresh.next, fresh.depth = head, depth
		if s.head.CompareAndSwap(head, fresh) {
			return fresh
		}
	}
}

// encodingCache bounds the bytes of all cached encodings of a store, and more tightly those of replaced versions, which only watches that have not
// seen the change yet still ask for. It holds no records, only their encodings, so a replaced object is freed at once.
type encodingCache struct {
	mu       sync.Mutex
	current  encodingQueue // guarded by mu
	replaced encodingQueue // guarded by mu
}

func newEncodingCache(limit int64) *encodingCache {
	return &encodingCache{current: encodingQueue{limit: limit}, replaced: encodingQueue{limit: min(limit, maxReplacedBytes)}}
}

// add takes bytes that were made into account.
func (c *encodingCache) add(of *encodingSet, e *encoding, size int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e.size = size
	if of.replaced {
		e.moved = true
		c.replaced.add(e, true)
		return
	}
	c.current.add(e, false)
}

// replace counts a record's encodings with those of replaced versions from now on.
func (c *encodingCache) replace(of *encodingSet) {
	c.mu.Lock()
	defer c.mu.Unlock()
	of.replaced = true
	for e := of.head.Load(); e != nil; e = e.next {
		if e.size > 0 && !e.moved {
			c.current.leave(e)
			e.moved = true
			c.replaced.add(e, true)
		}
	}
}

// encodingQueue is encodings, first in, first out. Guarded by the cache's mu.
type encodingQueue struct {
	limit int64 // bytes
	bytes int64
	left  int         // how many in the queue are not counted here any more
	queue []*encoding // oldest first, from index first on
	first int
}

// add appends an encoding and lets go of the oldest beyond the limit. moved is what those that are counted here have in common.
func (q *encodingQueue) add(e *encoding, moved bool) {
	q.queue = append(q.queue, e)
	q.bytes += e.size
	for q.bytes > q.limit && q.first < len(q.queue) {
		old := q.queue[q.first]
		q.queue[q.first] = nil
		q.first++
		if old.moved != moved {
			q.left--
			continue
		}
		q.bytes -= old.size
		old.size = 0
		old.data.Store(nil)
	}
	if q.first+q.left > len(q.queue)/2 {
		q.compact(moved)
	}
}

// leave takes an encoding out of the account; its place in the queue goes later.
func (q *encodingQueue) leave(e *encoding) {
	q.bytes -= e.size
	q.left++
}

func (q *encodingQueue) compact(moved bool) {
	kept := slices.DeleteFunc(q.queue[q.first:], func(e *encoding) bool { return e.moved != moved })
	n := copy(q.queue, kept)
	clear(q.queue[n:])
	q.queue, q.first, q.left = q.queue[:n], 0, 0
}
