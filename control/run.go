package control

import (
	"context"
	"fmt"
	"runtime/debug"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"

	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/klog/v2"
)

// Run runs all controllers until ctx has ended and they have, too. It fails at once when the options are not complete, and at the end when
// controllers did not stop in time. What goes wrong in one controller is logged with its name and does not touch the others: one that cannot be
// built is tried again, one that panics goes on with its next item.
//
// There is no leader election: with several servers, whoever decides which of them leads calls Run there and ends its context when that
// changes.
//
// Run sets k8s.io/apimachinery/pkg/util/runtime.ReallyCrash to false for the whole process: upstream's workers otherwise end it on a panic.
func Run(ctx context.Context, o Options) error {
	if err := o.validate(); err != nil {
		return err
	}
	utilruntime.ReallyCrash = false
	e, err := newEnvironment(&o)
	if err != nil {
		return err
	}
	r := &runner{environment: e, live: map[string]bool{}}
	r.start(ctx)
	<-ctx.Done()
	return r.stop()
}

// runner is the running controllers of one Run.
type runner struct {
	*environment
	done sync.WaitGroup

	mu   sync.Mutex
	live map[string]bool // names of what runs; guarded by mu
}

func (r *runner) start(ctx context.Context) {
	r.run(ctx, "discovery-changes", func(ctx context.Context) { r.changes.run(ctx, r.options.Changed, r.options.Metadata) })
	rows := controllers()
	for i := range rows {
		row := &rows[i]
		if slices.Contains(r.options.Disabled, row.name) || !r.gatesOpen(row) {
			continue
		}
		r.run(ctx, row.name, func(ctx context.Context) { r.control(ctx, row) })
	}
	for _, c := range r.options.Extra {
		r.run(ctx, c.Name, func(ctx context.Context) {
			if err := c.Run(ctx); err != nil && ctx.Err() == nil {
				klog.FromContext(ctx).Error(err, "Controller ended early")
			}
		})
	}
}

// gatesOpen says whether upstream's feature gates let the controller run.
func (r *runner) gatesOpen(row *controller) bool {
	d := r.builders[row.name]
	if d == nil {
		return true
	}
	for _, g := range d.GetRequiredFeatureGates() {
		if !utilfeature.DefaultFeatureGate.Enabled(g) {
			return false
		}
	}
	return true
}

// run runs f in a goroutine that the runner waits for in the end; a panic is logged with the name.
func (r *runner) run(ctx context.Context, name string, f func(context.Context)) {
	ctx = klog.NewContext(ctx, klog.LoggerWithName(klog.FromContext(ctx), name))
	r.note(name, true)
	r.done.Go(func() {
		defer r.note(name, false)
		defer func() {
			if reason := recover(); reason != nil {
				klog.ErrorS(nil, "Controller panicked; it does not run any more", "controller", name, "panic", reason, "stack", string(debug.Stack()))
			}
		}()
		f(ctx)
		if ctx.Err() == nil {
			klog.V(1).InfoS("Controller has nothing to do or ended early", "controller", name)
		}
	})
}

func (r *runner) note(name string, live bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if live {
		r.live[name] = true
	} else {
		delete(r.live, name)
	}
}

// control waits until the controller is needed, builds it and runs it.
func (r *runner) control(ctx context.Context, row *controller) {
	if len(row.when) > 0 {
		a, err := arm(r.options.Informers, row.when)
		if err != nil {
			klog.ErrorS(err, "Controller cannot be waited for and starts at once", "controller", row.name)
		} else {
			r.options.Informers.StartWithContext(ctx)
			if !a.wait(ctx) {
				return
			}
		}
	}
	if run := r.build(ctx, row); run != nil {
		r.options.Informers.StartWithContext(ctx)
		r.options.Metadata.Start(ctx.Done())
		run(ctx)
	}
}

// build builds the controller, again and again until it can be built; nil when it is switched off or ctx has ended.
func (r *runner) build(ctx context.Context, row *controller) func(context.Context) {
	construct := row.build
	if construct == nil {
		construct = newUpstream
	}
	for pause := buildRetry; ; pause = min(2*pause, buildRetryMax) {
		s := r.scopeOf(row)
		run, err := construct(ctx, s)
		if err == nil {
			if err := s.check(); err != nil {
				klog.ErrorS(err, "Controller does not run", "controller", row.name)
				return nil
			}
			return run
		}
		klog.ErrorS(err, "Controller cannot be built; trying again", "controller", row.name, "after", pause)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
}

// stop waits for everything to end.
func (r *runner) stop() error {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		r.done.Wait()
		r.options.Informers.Shutdown()
		r.options.Metadata.Shutdown()
	}()
	select {
	case <-ended:
		return nil
	case <-time.After(stopTimeout):
		return fmt.Errorf("control: after %s these still run: %s", stopTimeout, strings.Join(r.names(), ", "))
	}
}

func (r *runner) names() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]string, 0, len(r.live))
	for n := range r.live {
		out = append(out, n)
	}
	sort.Strings(out)
	return out
}
