package store

import "context"

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
