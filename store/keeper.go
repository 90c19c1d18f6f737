package store

import (
	"context"
	"errors"
	"time"
)

// keeper is the store's one goroutine: it deletes what expired, and drops events and pins that are too old. It sleeps until the next of
// these is due, for good when none is pending.
type keeper struct {
	store  *Store
	wake   chan struct{} // capacity 1: something may be due earlier than the keeper thinks
	cancel context.CancelFunc
	done   chan struct{}

	retryAt time.Time // not before this after a failed expiry; own to run
}

func startKeeper(s *Store) *keeper {
	ctx, cancel := context.WithCancel(context.Background())
	k := &keeper{store: s, wake: make(chan struct{}, 1), cancel: cancel, done: make(chan struct{})}
	go k.run(ctx)
	return k
}

func (k *keeper) stop() {
	k.cancel()
	<-k.done
}

func (k *keeper) kick() {
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

func (k *keeper) run(ctx context.Context) {
	defer close(k.done)
	for {
		var timer <-chan time.Time
		if wait, some := k.wait(); some {
			timer = k.store.clock.After(wait)
		}
		select {
		case <-ctx.Done():
			return
		case <-k.wake:
		case <-timer:
			k.trim()
			k.expire(ctx)
		}
	}
}

// wait returns how long nothing is due; false when nothing is pending at all.
func (k *keeper) wait() (time.Duration, bool) {
	s := k.store
	now := s.clock.Now()
	wait, some := time.Duration(0), false
	consider := func(at, notBefore time.Time) {
		d := max(at.Sub(now), notBefore.Sub(now), 0)
		if !some || d < wait {
			wait, some = d, true
		}
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if at, ok := s.expiry.first(); ok {
		// Rounded up, so that what expires within the same grain goes in one transaction.
		consider(at.Add(expiryGrain-1).Truncate(expiryGrain), k.retryAt)
	}
	for _, t := range s.tables {
		if at, ok := t.window.oldest(); ok {
			consider(at, now.Add(trimGrain))
		}
		for _, pin := range t.pins {
			consider(pin.pinnedUntil, now.Add(trimGrain))
		}
	}
	return wait, some
}

// trim drops events and pins that are too old.
func (k *keeper) trim() {
	s := k.store
	now := s.clock.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.tables {
		t.trimWindowLocked(now)
		t.expirePinsLocked(now)
	}
}

// expire deletes what has expired, batch by batch. A record that was changed at the same time is looked at again; an engine that
// refuses is asked again after expiryRetry.
func (k *keeper) expire(ctx context.Context) {
	s := k.store
	for ctx.Err() == nil {
		s.mu.RLock()
		ops := s.expiry.due(s.clock.Now())
		s.mu.RUnlock()
		if len(ops) == 0 {
			return
		}
		_, err := s.Txn(ctx, ops...)
		var conflict *ConflictError
		if err != nil && !errors.As(err, &conflict) {
			k.retryAt = s.clock.Now().Add(expiryRetry)
			return
		}
	}
}
