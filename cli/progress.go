package cli

import (
	"fmt"
	"io"
	"sync"
	"time"
)

// progressAfter is how long a step may take before it is worth a line.
const progressAfter = time.Second

// progress says what a command waits for, once that takes longer than progressAfter, and again each further
// progressEvery. Methods may be called concurrently.
type progress struct {
	out   io.Writer
	start time.Time

	mu    sync.Mutex
	step  string      // guarded by mu
	timer *time.Timer // guarded by mu
}

const progressEvery = 10 * time.Second

func newProgress(out io.Writer) *progress { return &progress{out: out, start: time.Now()} }

// now names the step that is under way. It ends the one before.
func (p *progress) now(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.step = fmt.Sprintf(format, args...)
	if p.timer != nil {
		p.timer.Stop()
	}
	p.timer = time.AfterFunc(progressAfter, p.say)
}

func (p *progress) say() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.step == "" {
		return
	}
	fmt.Fprintf(p.out, "%5.1fs %s ...\n", time.Since(p.start).Seconds(), p.step)
	p.timer.Reset(progressEvery)
}

// done ends the last step.
func (p *progress) done() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.step = ""
	if p.timer != nil {
		p.timer.Stop()
	}
}

// rename says more of the step that is under way.
func (p *progress) rename(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.step = fmt.Sprintf(format, args...)
}
