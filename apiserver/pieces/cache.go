package pieces

import (
	"container/list"
	"hash/maphash"
	"slices"
	"sync"
)

// entryBytes is about what an entry takes besides its piece and its versions.
const entryBytes = 256

// Cache keeps pieces by what they are made of, up to a number of bytes; those that were not asked for longest go first. Safe for concurrent use.
type Cache struct {
	limit int

	mu      sync.Mutex
	entries map[uint64]*list.Element // of *Entry, by hash; of two with one hash, the later
	recent  list.List                // first: the one asked for last
	bytes   int
}

// NewCache makes a cache of at most limit bytes.
func NewCache(limit int) *Cache {
	return &Cache{limit: limit, entries: map[uint64]*list.Element{}}
}

// Entry is the place of one piece.
type Entry struct {
	cache    *Cache
	hash     uint64
	source   string
	versions []int64

	making sync.Mutex // held while the piece is made, so that it is made once
	piece  *Piece     // guarded by cache.mu
	bytes  int        // that the cache counts, guarded by its mu; 0: it is in the cache no more
}

// Find gives the entry for a sequence of versions of one source. The source is a name for where versions are
// unique and for what the bytes are: of a source and versions, they are always the same. The versions are not kept.
func (c *Cache) Find(source string, versions []int64) *Entry {
	h := hash(source, versions)
	c.mu.Lock()
	defer c.mu.Unlock()
	element := c.entries[h]
	if element != nil {
		if e := element.Value.(*Entry); e.source == source && slices.Equal(e.versions, versions) {
			c.recent.MoveToFront(element)
			return e
		}
		c.drop(element)
	}
	e := &Entry{cache: c, hash: h, source: source, versions: slices.Clone(versions), bytes: entryBytes + 8*len(versions)}
	c.entries[h] = c.recent.PushFront(e)
	c.grow(e.bytes)
	return e
}

// Piece gives the piece if it was made, nil if not.
func (e *Entry) Piece() *Piece {
	e.cache.mu.Lock()
	defer e.cache.mu.Unlock()
	return e.piece
}

// Make gives the piece, and makes it of what raw gives where nobody has.
func (e *Entry) Make(raw func() ([]byte, error)) (*Piece, error) {
	e.making.Lock()
	defer e.making.Unlock()
	if p := e.Piece(); p != nil {
		return p, nil
	}
	data, err := raw()
	if err != nil {
		return nil, err
	}
	p := Compress(data)
	e.cache.keep(e, p)
	return p, nil
}

func (c *Cache) keep(e *Entry, p *Piece) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e.piece = p
	if e.bytes > 0 {
		e.bytes += len(p.data)
		c.grow(len(p.data))
	}
}

// grow counts n more bytes, and lets go of what is too many.
func (c *Cache) grow(n int) {
	for c.bytes += n; c.bytes > c.limit && c.recent.Len() > 0; {
		c.drop(c.recent.Back())
	}
}

func (c *Cache) drop(element *list.Element) {
	e := c.recent.Remove(element).(*Entry)
	delete(c.entries, e.hash)
	c.bytes -= e.bytes
	e.bytes = 0
}

var seed = maphash.MakeSeed()

func hash(source string, versions []int64) uint64 {
	h := maphash.String(seed, source)
	for _, v := range versions {
		h = (h ^ uint64(v)) * 0x9e3779b97f4a7c15
		h ^= h >> 29
	}
	return h
}
