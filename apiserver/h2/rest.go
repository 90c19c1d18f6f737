package h2

import (
	"sync"
	"time"
)

// A change that many connections are told of costs a write for each, a wake-up of its client and the reading of the windows that the client
// opens then; where changes follow one another, that is most of what they cost. So such a connection rests after it has written: the first
// change leaves at once, those of the next milliseconds together.
const (
	// feedRest is how long a connection rests at most.
	feedRest = 5 * time.Millisecond
	// feedCrowd is how many connections are many.
	feedCrowd = 8
)

// rests are the connections of a server that rest. They go on together, by one timer, as the same changes wake them: the first has rested for
// feedRest then, the others nearly so.
type rests struct {
	mu    sync.Mutex
	conns []*conn     // each once
	timer *time.Timer // runs while there are any
}

// add has a connection rest, whose lock is held.
func (r *rests) add(c *conn) {
	c.resting = true
	r.mu.Lock()
	defer r.mu.Unlock()
	r.conns = append(r.conns, c)
	switch {
	case len(r.conns) > 1:
	case r.timer == nil:
		r.timer = time.AfterFunc(feedRest, r.end)
	default:
		r.timer.Reset(feedRest)
	}
}

// end has all go on.
func (r *rests) end() {
	r.mu.Lock()
	conns := r.conns
	r.conns = nil
	r.mu.Unlock()
	for _, c := range conns {
		c.mu.Lock()
		c.resting = false
		c.offerLocked()
		c.mu.Unlock()
	}
}
