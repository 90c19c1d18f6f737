package store

import (
	"errors"
	"fmt"
)

// ErrGone is matched (errors.Is) by every *GoneError: the asked history is no longer kept, start again from a list.
var ErrGone = errors.New("history is gone")

// ErrClosed is returned by every operation on a store or table after it was closed.
var ErrClosed = errors.New("store is closed")

// ErrStopped is returned by Watch.Next and Watch.TryNext after Watch.Stop.
var ErrStopped = errors.New("watch is stopped")

// ConflictError says that a key was not at the revision that the Op expected. Nothing of the transaction happened.
type ConflictError struct {
	// Key is the first key of the transaction that did not match.
	Key string
	// Current is the record that the key has; nil when the key is absent.
	Current *Record
}

func (e *ConflictError) Error() string {
	if e.Current == nil {
		return fmt.Sprintf("conflict: %s does not exist; read it again", e.Key)
	}
	return fmt.Sprintf("conflict: %s is at revision %d; read it again", e.Key, e.Current.Revision)
}

// GoneError says that history from Requested on is not kept any more; Oldest is the oldest revision that can be asked for.
type GoneError struct {
	Requested, Oldest int64
}

func (e *GoneError) Error() string {
	return fmt.Sprintf("revision %d is gone: the oldest kept is %d; list again", e.Requested, e.Oldest)
}

// Is makes errors.Is(err, ErrGone) true.
func (e *GoneError) Is(target error) bool { return target == ErrGone }

// FutureError says that a revision was asked for that the store has not reached.
type FutureError struct {
	Requested, Current int64
}

func (e *FutureError) Error() string {
	return fmt.Sprintf("revision %d lies in the future: the store is at %d", e.Requested, e.Current)
}

// CorruptError says that a stored value cannot be read. The value stays as it is.
type CorruptError struct {
	Key string
	Err error
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("stored value of %s cannot be read: %v", e.Key, e.Err)
}

// Unwrap gives the cause.
func (e *CorruptError) Unwrap() error { return e.Err }

// UnavailableError says that the engine could not take a write, for example because the disk is full. The outcome of this
// one write is unknown (as with any lost connection: read the object again); everything acknowledged before it is safe, reads and
// watches go on, and writes work again by themselves as soon as the cause is gone.
type UnavailableError struct {
	Err error
}

func (e *UnavailableError) Error() string {
	return fmt.Sprintf("the store takes no writes now: %v", e.Err)
}

// Unwrap gives the cause.
func (e *UnavailableError) Unwrap() error { return e.Err }
