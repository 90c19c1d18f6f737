package store

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
)

// Store is one revisioned object store. All methods are safe for concurrent use.
type Store struct {
	engine    Engine
	shared    SharedEngine // nil: nobody else writes the data
	clock     Clock
	opts      Options
	encodings *encodingCache
	detector  *detector // nil: off
	keeper    *keeper

	// gate is held shared by every transaction, and exclusively to be sure that none is under way.
	gate   sync.RWMutex
	closed bool // guarded by gate

	revision atomic.Int64 // written with mu held

	// mu guards everything published: all below, and the fields of each Table that say so.
	mu      sync.RWMutex
	tables  map[string]*Table
	opening map[string]*openCall
	expiry  expiryQueue
}

// openCall is an OpenTable under way, for those who ask for the same table meanwhile.
type openCall struct {
	done  chan struct{}
	table *Table
	err   error
}

// Open starts a store on an engine. Tables are opened one by one with OpenTable. When Open fails the engine is still the caller's to close.
func Open(ctx context.Context, o Options) (*Store, error) {
	if o.Engine == nil {
		return nil, errors.New("store: Options.Engine is required")
	}
	o.setDefaults()
	s := &Store{
		engine:    o.Engine,
		clock:     o.Clock,
		opts:      o,
		encodings: newEncodingCache(o.EncodingBytes),
		tables:    map[string]*Table{},
		opening:   map[string]*openCall{},
		expiry:    newExpiryQueue(),
	}
	s.shared, _ = o.Engine.(SharedEngine)
	if o.Debug {
		s.detector = &detector{}
	}
	rev, err := s.engine.Start(ctx, storeHost{s})
	if err != nil {
		return nil, fmt.Errorf("store: start the engine: %w", err)
	}
	s.revision.Store(rev)
	s.keeper = startKeeper(s)
	return s, nil
}

// Close waits for transactions under way, ends every watch with ErrClosed, and closes the engine. Records and snapshots stay readable.
func (s *Store) Close() error {
	s.gate.Lock()
	if s.closed {
		s.gate.Unlock()
		return nil
	}
	s.closed = true
	s.gate.Unlock()

	s.keeper.stop()
	err := s.engine.Close()

	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.tables {
		if s.detector != nil {
			t.tree.Scan(func(_ string, e entry) bool { s.detector.check(e.record); return true })
		}
		t.closeLocked(ErrClosed)
	}
	return err
}

// Revision returns the newest published revision.
func (s *Store) Revision() int64 { return s.revision.Load() }

// Table returns the open table of a prefix, nil when there is none.
func (s *Store) Table(prefix string) *Table {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.tables[prefix]
}

// Tables returns the open tables, ordered by prefix.
func (s *Store) Tables() []*Table {
	s.mu.RLock()
	out := make([]*Table, 0, len(s.tables))
	for _, t := range s.tables {
		out = append(out, t)
	}
	s.mu.RUnlock()
	sort.Slice(out, func(i, j int) bool { return out[i].prefix < out[j].prefix })
	return out
}

// OpenTable makes the objects under a prefix readable and writable, loading what the engine holds. An open table of the same prefix
// is returned as it is, whatever the other options say; a prefix within another's is an error. A value that cannot be decoded is a *CorruptError.
func (s *Store) OpenTable(ctx context.Context, o TableOptions) (*Table, error) {
	if len(o.Prefix) < 2 || o.Prefix[0] != '/' || !strings.HasSuffix(o.Prefix, "/") {
		return nil, fmt.Errorf("store: table prefix %q must begin and end with a slash", o.Prefix)
	}
	if o.Codec == nil {
		return nil, fmt.Errorf("store: table %s needs a codec", o.Prefix)
	}
	o.setDefaults()
	s.gate.RLock()
	defer s.gate.RUnlock()
	if s.closed {
		return nil, ErrClosed
	}
	t, call, mine, err := s.beginOpen(o.Prefix)
	switch {
	case t != nil || err != nil:
		return t, err
	case !mine:
		select {
		case <-call.done:
			return call.table, call.err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	call.table, call.err = s.load(ctx, o)
	s.mu.Lock()
	delete(s.opening, o.Prefix)
	s.mu.Unlock()
	close(call.done)
	s.keeper.kick()
	return call.table, call.err
}

// beginOpen finds the table, or the call that opens it, or registers such a call of our own.
func (s *Store) beginOpen(prefix string) (t *Table, call *openCall, mine bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := s.tables[prefix]; t != nil {
		return t, nil, false, nil
	}
	if call := s.opening[prefix]; call != nil {
		return nil, call, false, nil
	}
	overlaps := func(other string) bool {
		return strings.HasPrefix(other, prefix) || strings.HasPrefix(prefix, other)
	}
	for other := range s.tables {
		if overlaps(other) {
			return nil, nil, false, fmt.Errorf("store: table prefix %s overlaps the open table %s", prefix, other)
		}
	}
	for other := range s.opening {
		if overlaps(other) {
			return nil, nil, false, fmt.Errorf("store: table prefix %s overlaps the table %s that is being opened", prefix, other)
		}
	}
	call = &openCall{done: make(chan struct{})}
	s.opening[prefix] = call
	return nil, call, true, nil
}

// load builds a table from what the engine holds, and opens it.
func (s *Store) load(ctx context.Context, o TableOptions) (*Table, error) {
	t := newTable(s, o)
	add := func(e Entry) error {
		obj, err := o.Codec.Decode(ctx, e.Key, e.Value, e.Revision)
		if err != nil {
			return &CorruptError{Key: e.Key, Err: err}
		}
		if err := setRevision(obj, e.Revision); err != nil {
			return &CorruptError{Key: e.Key, Err: err}
		}
		r := &Record{Key: e.Key, Object: obj, Revision: e.Revision, CreateRevision: e.CreateRevision, Expires: e.Expires, size: int64(len(e.Value)), sum: fingerprint(e.Value)}
		r.labels = t.labels.take(obj, nil)
		s.finish(r)
		t.tree.Set(r.Key, entry{r, r.labels})
		t.revision = max(t.revision, r.Revision)
		return nil
	}
	done := func(history int64) {
		t.revision = max(t.revision, history)
		t.window.base = t.revision
		s.mu.Lock()
		defer s.mu.Unlock()
		s.tables[o.Prefix] = t
		t.tree.Scan(func(_ string, e entry) bool { s.expiry.add(t, e.record); return true })
	}
	if err := s.engine.Load(ctx, o.Prefix, o.Class, add, done); err != nil {
		return nil, fmt.Errorf("store: load %s: %w", o.Prefix, err)
	}
	return t, nil
}

// CloseTable forgets a table, for example because its custom resource definition went; its data stays in the engine. Watches of it
// end with ErrGone, transactions on it with ErrClosed. OpenTable opens it anew, with another codec if need be.
func (s *Store) CloseTable(prefix string) {
	s.gate.Lock()
	defer s.gate.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.tables[prefix]
	if t == nil {
		return
	}
	delete(s.tables, prefix)
	t.tree.Scan(func(_ string, e entry) bool { s.expiry.remove(t, e.record); return true })
	t.closeLocked(&GoneError{Requested: s.Revision(), Oldest: s.Revision()})
}

// finish prepares a record for publication.
func (s *Store) finish(r *Record) {
	r.encodings.cache = s.encodings
	if s.detector != nil {
		s.detector.seal(r)
	}
}
