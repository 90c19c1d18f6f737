package system

import (
	"context"
	"errors"
	"fmt"
	"sync"
)

// group runs the long-lived parts of a process. The first part that fails ends all of them; parts stop in no order but
// the one that their contexts give. It is used by one goroutine until wait.
type group struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup
}

func newGroup(ctx context.Context) *group {
	ctx, cancel := context.WithCancelCause(ctx)
	return &group{ctx: ctx, cancel: cancel}
}

// run starts a part. It must return when its context ends; an error, or an early end, is the end of the process.
func (g *group) run(name string, part func(context.Context) error) {
	g.wg.Go(func() {
		err := part(g.ctx)
		switch {
		case g.ctx.Err() != nil:
		case err != nil:
			g.cancel(fmt.Errorf("%s: %w", name, err))
		default:
			g.cancel(fmt.Errorf("%s: ended unexpectedly", name))
		}
	})
}

// background starts a part that has nothing to report and may end.
func (g *group) background(part func(context.Context)) {
	g.wg.Go(func() { part(g.ctx) })
}

// fail ends all parts with an error.
func (g *group) fail(err error) { g.cancel(err) }

// wait waits for all parts and gives the failure that ended them, nil after an ordinary end.
func (g *group) wait() error {
	g.wg.Wait()
	err := context.Cause(g.ctx)
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}
