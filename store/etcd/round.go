package etcd

import (
	"context"
	"fmt"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"knarr/store"
)

// round is one question to etcd for its revision, and all who wait for the answer. The fields are set before done is closed.
type round struct {
	done     chan struct{}
	revision int64
	err      error
}

// sharedCurrent is current with one request for all who ask meanwhile: at most one is under way, and whoever comes later waits for the
// next, which begins after he came.
func (e *Engine) sharedCurrent(ctx context.Context) (int64, error) {
	r, err := e.joinRound()
	if err != nil {
		return 0, err
	}
	select {
	case <-r.done:
		return r.revision, r.err
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

func (e *Engine) joinRound() (*round, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closing {
		return nil, store.ErrClosed
	}
	if e.nextRound == nil {
		e.nextRound = &round{done: make(chan struct{})}
	}
	if !e.asking {
		e.asking = true
		e.running.Add(1)
		go e.ask()
	}
	return e.nextRound, nil
}

// ask asks round by round until nobody waits.
func (e *Engine) ask() {
	defer e.running.Done()
	for {
		e.mu.Lock()
		r := e.nextRound
		e.nextRound = nil
		if r == nil {
			e.asking = false
			e.mu.Unlock()
			return
		}
		e.mu.Unlock()
		r.revision, r.err = e.current(e.ctx)
		close(r.done)
	}
}

// Check implements store.CheckedEngine: etcd answers, its database has room, and our watch of it follows.
func (e *Engine) Check(ctx context.Context) error {
	if err := e.Sync(ctx); err != nil {
		if ctx.Err() != nil {
			err = e.unavailable(fmt.Errorf("no answer in time: %w", err))
		}
		return err
	}
	// A client that may not ask for alarms, or an old member, has none to tell.
	resp, err := e.client.AlarmList(ctx)
	if err != nil {
		return nil //nolint:nilerr // see above
	}
	for _, a := range resp.Alarms {
		switch a.Alarm {
		case etcdserverpb.AlarmType_NOSPACE:
			return e.unavailable(rpctypes.ErrNoSpace)
		case etcdserverpb.AlarmType_CORRUPT:
			return e.unavailable(rpctypes.ErrCorrupt)
		}
	}
	return nil
}
