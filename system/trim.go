package system

import (
	"context"
	"runtime/debug"
	"sync"
	"time"

	"a.knarr/early/collect"

	"knarr/node/shim/pages"
)

const (
	// After its start a process gives back what only that needed: at firstTrim, and at secondTrim, since the last of what a start sets off
	// ends half a minute later.
	firstTrim, secondTrim = 5 * time.Second, 40 * time.Second
	// quiet is how long there was no garbage collection in a process that does next to nothing.
	quiet = 20 * time.Second
	// periodic is how long after the one before the runtime makes a collection of a heap that has hardly grown, less a second.
	periodic = 119 * time.Second
)

// dropEvery is how often the program's pages are let go of while there is work: of 35 MB that a load touches a third is used once. It takes 10 ms of processor time, with the
// page faults of what is used again.
const dropEvery = 4 * time.Second

// trimWhenQuiet gives memory back that a process does not need while it is quiet, until ctx ends: after its start, and after each time of
// work. Freed heap goes back to the system, and so do the pages of the program that were used once; those that are used again come
// back from the page cache. It wakes up for nothing but garbage collections, and once after them. The program's mappings are not cut before they are let go of for
// the first time: that is work, and a start has fewer page faults where each maps more. What the heap may have while there is work says the pace.
func trimWhenQuiet(ctx context.Context, pace pace) {
	program := sync.OnceValue(pages.Own)
	collected := make(chan struct{}, 1)
	onCollection(ctx, collected)
	now := time.Now()
	trims, dropped := newTrims(now), now
	for timer := time.NewTimer(firstTrim); ; timer.Reset(trims.next.Sub(now)) {
		rest := false
		select {
		case <-ctx.Done():
			return
		case now = <-timer.C:
			rest = true
		case <-collected:
			now = time.Now()
			rest = trims.collected(now, pace.follow(now))
		}
		if rest {
			trims.done(now)
			pace.rest()
			debug.FreeOSMemory()
		}
		if rest || pace.working && now.Sub(dropped) >= dropEvery {
			program().Drop()
			dropped = now
		}
	}
}

// never is longer than a process runs.
const never = 100 * 365 * 24 * time.Hour

// trims says when a process is to be trimmed. Not safe for concurrent use.
type trims struct {
	second time.Time // not before it, but for the first
	next   time.Time // when it has to be without anything else happening
	first  bool      // has been
	last   time.Time // a collection
}

// newTrims is for a process that starts now.
func newTrims(now time.Time) *trims {
	return &trims{second: now.Add(secondTrim), next: now.Add(firstTrim), last: now}
}

// collected is told of each garbage collection, and whether nobody asked for it, and reports whether the process is quiet: nothing but time was its cause.
func (t *trims) collected(now time.Time, own bool) (quietNow bool) {
	quietNow = now.Sub(t.last) >= periodic
	t.last = now
	if own && t.first && !quietNow {
		t.next = now.Add(quiet) // the first after a while may be that of a load that begins now
		if t.next.Before(t.second) {
			t.next = t.second
		}
	}
	return quietNow
}

// done is told of each trim.
func (t *trims) done(now time.Time) {
	t.next = now.Add(never)
	if !t.first {
		t.first, t.next = true, t.second
	}
}

// onCollection tells c of each garbage collection, until ctx ends; it never waits for a reader.
func onCollection(ctx context.Context, c chan<- struct{}) {
	collect.After(func() {
		if ctx.Err() != nil {
			return
		}
		onCollection(ctx, c) // before the message: its reader may begin the next collection
		select {
		case c <- struct{}{}:
		default:
		}
	})
}
