package apiserver

import (
	"context"
	"sync/atomic"
	"time"
)

// deadlined is a context with a deadline, as context.WithDeadline makes, for work that seldom waits for its end: it has a timer, and a place among the
// children of its parent, only once somebody has asked for Done. Stop it in the end.
type deadlined struct {
	context.Context // the parent
	at              time.Time
	timed           atomic.Pointer[timed]
}

// timed is the context that somebody waits for.
type timed struct {
	context.Context
	stop context.CancelFunc
}

// newDeadlined gives a context that ends with its parent, and at a time.
func newDeadlined(parent context.Context, at time.Time) *deadlined {
	if earlier, ok := parent.Deadline(); ok && earlier.Before(at) {
		at = earlier
	}
	return &deadlined{Context: parent, at: at}
}

// Deadline implements context.Context.
func (d *deadlined) Deadline() (time.Time, bool) { return d.at, true }

// Done implements context.Context.
func (d *deadlined) Done() <-chan struct{} {
	if t := d.timed.Load(); t != nil {
		return t.Done()
	}
	t := &timed{}
	t.Context, t.stop = context.WithDeadline(d.Context, d.at)
	if !d.timed.CompareAndSwap(nil, t) {
		t.stop()
	}
	return d.timed.Load().Done()
}

// Err implements context.Context.
func (d *deadlined) Err() error {
	if t := d.timed.Load(); t != nil {
		return t.Err()
	}
	if err := d.Context.Err(); err != nil {
		return err
	}
	if !time.Now().Before(d.at) {
		return context.DeadlineExceeded
	}
	return nil
}

// Value implements context.Context: contexts made of this one find by it whose end they follow.
func (d *deadlined) Value(key any) any {
	if t := d.timed.Load(); t != nil {
		return t.Value(key)
	}
	return d.Context.Value(key)
}

// stop ends what was made for those who wait.
func (d *deadlined) stop() {
	if t := d.timed.Load(); t != nil {
		t.stop()
	}
}
