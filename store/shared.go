package store

import (
	"context"
	"errors"
)

// SharedEngine is an Engine whose data other processes write, too: what this store holds in memory may lag behind what they were
// told is written. An engine that is alone with its data does not implement it.
type SharedEngine interface {
	// Sync returns when everything is published that any process had been told is written before the call. Concurrent calls share their
	// cost. Errors: *UnavailableError, ErrClosed, the context's.
	Sync(ctx context.Context) error
}

// CheckedEngine is an Engine that can tell why it does not work.
type CheckedEngine interface {
	// Check returns nil while the engine takes reads and writes, else the reason why it does not. It costs little and writes nothing.
	Check(ctx context.Context) error
}

// Shared reports whether other processes write this store's data, so that a read may have to wait for Sync.
func (s *Store) Shared() bool { return s.shared != nil }

// Sync makes every write visible here that any process was told of before the call. It returns at once where nobody else writes
// the data. Errors: *UnavailableError, ErrClosed, the context's.
func (s *Store) Sync(ctx context.Context) error {
	if s.shared == nil {
		return nil
	}
	return s.shared.Sync(ctx)
}

// Check tells why the store does not work; nil when it does, or when the engine cannot tell.
func (s *Store) Check(ctx context.Context) error {
	if c, ok := s.engine.(CheckedEngine); ok {
		return c.Check(ctx)
	}
	return nil
}

// RawEngine is an Engine that shows what it keeps.
type RawEngine interface {
	// Read calls fn for every key that begins with prefix, in key order, with the bytes that are stored now, until fn returns an error, which it
	// returns. fn may keep nothing of value.
	Read(ctx context.Context, prefix string, fn func(key string, value []byte) error) error
}

// ReadStored calls fn with what the engine keeps under a prefix: the bytes that the tables' codecs gave. fn may keep nothing of value; its error
// ends the reading and is returned.
func (s *Store) ReadStored(ctx context.Context, prefix string, fn func(key string, value []byte) error) error {
	raw, ok := s.engine.(RawEngine)
	if !ok {
		return errors.New("store: this engine does not show what it keeps")
	}
	s.gate.RLock()
	defer s.gate.RUnlock()
	if s.closed {
		return ErrClosed
	}
	return raw.Read(ctx, prefix, fn)
}

// Settle waits until every transaction that began before has ended.
func (s *Store) Settle() {
	s.gate.Lock()
	//lint:ignore SA2001 having held it is all
	s.gate.Unlock()
}
