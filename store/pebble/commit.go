package pebble

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"syscall"

	"github.com/cockroachdb/pebble/v2"

	"knarr/store"
)

// unavailable is the error of a full disk.
func unavailable(full error) error {
	return &store.UnavailableError{Err: fmt.Errorf("the disk is full, free some space; writes then work again by themselves (%w)", full)}
}

// Commit implements store.Engine.
func (e *Engine) Commit(ctx context.Context, p *store.Proposal) error {
	becomesFull, full := e.space.state()
	if full != nil {
		return unavailable(full)
	}
	r, err := e.enqueue(ctx, p, becomesFull)
	if err != nil {
		return err
	}
	select {
	case <-r.done:
		return r.err
	case <-becomesFull:
	}
	select {
	case <-r.done: // was done before
		return r.err
	default:
		return unavailable(syscall.ENOSPC)
	}
}

// enqueue waits until no key of the proposal is under way and there is a place in the queue, compares, and queues it.
func (e *Engine) enqueue(ctx context.Context, p *store.Proposal, becomesFull <-chan struct{}) (*request, error) {
	for {
		e.mu.Lock()
		if err := e.refusal(); err != nil {
			e.mu.Unlock()
			return nil, err
		}
		if len(e.queue) < maxQueue && !e.busy(p) {
			r, err := e.admitLocked(p)
			e.mu.Unlock()
			if err == nil {
				e.signal()
			}
			return r, err
		}
		wait := e.settled
		e.mu.Unlock()
		select {
		case <-wait:
		case <-becomesFull:
			return nil, unavailable(syscall.ENOSPC)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// refusal says why there are no more writes; nil when there are. Called with mu held.
func (e *Engine) refusal() error {
	if e.closing {
		return store.ErrClosed
	}
	if e.broken != nil {
		return &store.UnavailableError{Err: e.broken}
	}
	return nil
}

// Check implements store.CheckedEngine.
func (e *Engine) Check(context.Context) error {
	if _, full := e.space.state(); full != nil {
		return unavailable(full)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.refusal()
}

func (e *Engine) busy(p *store.Proposal) bool {
	for i := range p.Writes {
		if _, busy := e.inflight[p.Writes[i].Key]; busy {
			return true
		}
	}
	return false
}

// admitLocked compares against the published state, which is the newest for keys that are not under way.
func (e *Engine) admitLocked(p *store.Proposal) (*request, error) {
	for i := range p.Writes {
		w := &p.Writes[i]
		rev, create := e.host.Current(w)
		if rev != w.Expect {
			return nil, &store.RefusedError{Index: i}
		}
		w.CreateRevision = create
	}
	for i := range p.Writes {
		e.inflight[p.Writes[i].Key] = struct{}{}
	}
	r := &request{p: p, done: make(chan struct{})}
	e.queue = append(e.queue, r)
	return r, nil
}

func (e *Engine) signal() {
	select {
	case e.work <- struct{}{}:
	default:
	}
}

// run is the committer: it ends when the engine closes and the queue is empty.
func (e *Engine) run() {
	defer close(e.stopped)
	for {
		e.gather()
		group, closing := e.take()
		if len(group) > 0 {
			e.settle(group, e.commit(group))
			continue
		}
		if closing {
			return
		}
		<-e.work
	}
}

// gather lets goroutines run that are ready to, as long as that makes the group larger: on a busy machine the writes that are about to come
// share one sync then, and on an idle one there is nobody to wait for.
func (e *Engine) gather() {
	for before := -1; ; {
		e.mu.Lock()
		n := len(e.queue)
		e.mu.Unlock()
		if n <= before || n == 0 || n >= maxGroup {
			return
		}
		before = n
		runtime.Gosched()
	}
}

// take removes the next group from the queue.
func (e *Engine) take() (group []*request, closing bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	n, bytes := 0, 0
	for n < len(e.queue) && n < maxGroup && bytes < maxGroupBytes {
		for i := range e.queue[n].p.Writes {
			bytes += len(e.queue[n].p.Writes[i].Value)
		}
		n++
	}
	group = e.queue[:n:n]
	e.queue = e.queue[n:]
	if len(e.queue) == 0 {
		e.queue = nil
	}
	return group, e.closing
}

// commit makes a group safe and publishes it.
func (e *Engine) commit(group []*request) error {
	e.mu.Lock()
	err := e.broken
	e.mu.Unlock()
	if err != nil {
		return err
	}
	b := e.db.NewBatch()
	durable, err := e.fill(b, group)
	if err == nil {
		err = e.apply(b, durable)
	}
	if err != nil {
		return err
	}
	proposals := make([]*store.Proposal, len(group))
	for i, r := range group {
		proposals[i] = r.p
	}
	e.host.Publish(proposals)
	return nil
}

// fill gives revisions to a group's writes and puts them into the batch. It says whether the batch has to be synced.
func (e *Engine) fill(b *pebble.Batch, group []*request) (durable bool, err error) {
	deleted := map[string]int64{}
	var buf []byte
	for _, r := range group {
		for i := range r.p.Writes {
			w := &r.p.Writes[i]
			e.revision++
			w.Revision = e.revision
			durable = durable || w.Class == store.Durable
			if w.Delete {
				deleted[w.Prefix] = w.Revision
				err = errors.Join(err, b.Delete([]byte(w.Key), nil))
				continue
			}
			if w.CreateRevision == 0 {
				w.CreateRevision = w.Revision
			}
			buf = appendValue(buf[:0], w)
			err = errors.Join(err, b.Set([]byte(w.Key), buf, nil))
		}
	}
	for prefix, rev := range deleted {
		err = errors.Join(err, b.Set([]byte(keyDeleted+prefix), revisionBytes(rev), nil))
	}
	if !e.dirty {
		durable, e.dirty = true, true
		err = errors.Join(err, b.Delete([]byte(keyClean), nil))
	}
	if e.revision > e.reserved {
		durable = true
		e.reserved = e.revision + revisionBlock
		err = errors.Join(err, b.Set([]byte(keyReserve), revisionBytes(e.reserved), nil))
	}
	return durable, err
}

// apply writes the batch to the log, waits until it is as safe as asked, and makes it part of the database.
func (e *Engine) apply(b *pebble.Batch, durable bool) error {
	e.fs.skipSync.Store(!durable)
	defer e.fs.skipSync.Store(false)
	if err := e.db.ApplyNoSyncWait(b, pebble.Sync); err != nil {
		return err
	}
	if err := b.SyncWait(); err != nil {
		return err
	}
	return b.Close()
}

// settle tells the group's callers and lets others at their keys. After an error there are no more writes: what the disk holds of
// the group shows after a restart only.
func (e *Engine) settle(group []*request, err error) {
	e.mu.Lock()
	if err != nil && e.broken == nil {
		e.broken = fmt.Errorf("the disk failed, check it and restart: %w", err)
	}
	for _, r := range group {
		for i := range r.p.Writes {
			delete(e.inflight, r.p.Writes[i].Key)
		}
		if err != nil {
			r.err = &store.UnavailableError{Err: e.broken}
		}
		close(r.done)
	}
	close(e.settled)
	e.settled = make(chan struct{})
	e.mu.Unlock()
}
