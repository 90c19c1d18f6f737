package image

import (
	"context"
	"errors"
	"sync"
)

var errClosed = errors.New("the image store is closed")

// flightGroup lets callers that want the same pull share one. A shared pull goes on while at least one of its callers
// waits for it. The zero value is ready.
type flightGroup struct {
	mu      sync.Mutex
	flights map[string]*flight
	closed  bool
	wg      sync.WaitGroup // running flights
}

type flight struct {
	cancel context.CancelCauseFunc
	done   chan struct{}
	result *details // valid when done is closed
	err    error

	// Guarded by flightGroup.mu.
	callers int

	reportMu  sync.Mutex // held while watchers are called
	watchers  map[int]func(Progress)
	nextWatch int
}

type work func(ctx context.Context, report func(Progress)) (*details, error)

// do joins the flight for key, or starts fn as one, and waits for its end or that of ctx.
func (g *flightGroup) do(ctx context.Context, key string, progress func(Progress), fn work) (*details, error) {
	f, err := g.join(ctx, key, fn)
	if err != nil {
		return nil, err
	}
	defer g.leave(key, f)
	if progress != nil {
		id := f.watch(progress)
		defer f.unwatch(id)
	}
	select {
	case <-f.done:
		return f.result, f.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (g *flightGroup) join(ctx context.Context, key string, fn work) (*flight, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil, errClosed
	}
	if f := g.flights[key]; f != nil {
		f.callers++
		return f, nil
	}
	if g.flights == nil {
		g.flights = map[string]*flight{}
	}
	// The work outlives the caller that began it, as long as others wait.
	workCtx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	f := &flight{cancel: cancel, done: make(chan struct{}), callers: 1, watchers: map[int]func(Progress){}}
	g.flights[key] = f
	g.wg.Add(1)
	go func() {
		defer g.wg.Done()
		defer cancel(nil)
		f.result, f.err = fn(workCtx, f.report)
		g.forget(key, f)
		close(f.done)
	}()
	return f, nil
}

func (g *flightGroup) forget(key string, f *flight) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.flights[key] == f {
		delete(g.flights, key)
	}
}

// leave ends the work when the last caller is gone. A caller that comes then begins anew.
func (g *flightGroup) leave(key string, f *flight) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if f.callers--; f.callers > 0 {
		return
	}
	f.cancel(context.Canceled)
	if g.flights[key] == f {
		delete(g.flights, key)
	}
}

// close ends all flights and waits for them; later calls of do fail.
func (g *flightGroup) close() {
	g.mu.Lock()
	g.closed = true
	for _, f := range g.flights {
		f.cancel(errClosed)
	}
	g.mu.Unlock()
	g.wg.Wait()
}

func (f *flight) watch(fn func(Progress)) int {
	f.reportMu.Lock()
	defer f.reportMu.Unlock()
	f.nextWatch++
	f.watchers[f.nextWatch] = fn
	return f.nextWatch
}

func (f *flight) unwatch(id int) {
	f.reportMu.Lock()
	defer f.reportMu.Unlock()
	delete(f.watchers, id)
}

func (f *flight) report(p Progress) {
	f.reportMu.Lock()
	defer f.reportMu.Unlock()
	for _, fn := range f.watchers {
		fn(p)
	}
}
