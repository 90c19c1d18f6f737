package store

import (
	"sync"
	"sync/atomic"
)

// encodingSet holds the encodings of one record: a list that only grows, to at most maxEncodings.
type encodingSet struct {
	head  atomic.Pointer[encoding]
	cache *encodingCache // nil: a record made outside a store, not accounted
}

// encoding is one kind of encoding of one record. Its bytes may be dropped by the cache, and are then made again when asked for.
type encoding struct {
	kind  string
	next  *encoding
	depth int // length of the list from here on

	mu   sync.Mutex // held while the bytes are made, so that they are made once
	data atomic.Pointer[[]byte]
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
		c.add(e, int64(len(data)))
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

// encodingCache bounds the bytes of all cached encodings of a store: first in, first out. It holds no records, only their encodings, so a
// replaced object is freed at once and its encodings a little later.
type encodingCache struct {
	limit int64 // bytes

	mu    sync.Mutex
	bytes int64
	queue []cachedEncoding // oldest first, from index first on
	first int
}

type cachedEncoding struct {
	e    *encoding
	size int64
}

func (c *encodingCache) add(e *encoding, size int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.queue = append(c.queue, cachedEncoding{e, size})
	c.bytes += size
	for c.bytes > c.limit && c.first < len(c.queue) {
		old := c.queue[c.first]
		c.queue[c.first] = cachedEncoding{}
		c.first++
		c.bytes -= old.size
		old.e.data.Store(nil)
	}
	if c.first > len(c.queue)/2 {
		n := copy(c.queue, c.queue[c.first:])
		clear(c.queue[n:])
		c.queue, c.first = c.queue[:n], 0
	}
}
