package system

import (
	"context"
	"runtime"
	"runtime/debug"
	"time"

	"knarr/node/shim/pages"
)

const (
	// After its start a process gives back what only that needed: at firstTrim, and at secondTrim, since the last of what a start sets off
	// ends half a minute later.
	firstTrim, secondTrim = 5 * time.Second, 40 * time.Second
	// quiet is how long there was no garbage collection in a process that does next to nothing. The runtime makes one every two minutes
	// where nothing else asks for it.
	quiet = 20 * time.Second
)

// trimWhenQuiet gives memory back that a process does not need while it is quiet, until ctx ends: after its start, and after each time of
// work. Freed heap goes back to the system, and so do the pages of the program that were used once; those that are used again come
// back from the page cache. It wakes up for nothing but garbage collections.
func trimWhenQuiet(ctx context.Context) {
	program := pages.Own()
	collected := make(chan struct{}, 1)
	onCollection(ctx, collected)
	first, second, last := time.After(firstTrim), time.After(secondTrim), time.Now()
	for {
		rested := false
		select {
		case <-ctx.Done():
			return
		case <-first:
			rested = true
		case <-second:
			rested = time.Since(last) >= quiet
		case <-collected:
			rested = time.Since(last) >= quiet
			last = time.Now()
		}
		if rested {
			debug.FreeOSMemory()
			program.Drop()
		}
	}
}

// sentinel is an object that nobody keeps.
type sentinel struct{ _ *int }

// onCollection tells c of each garbage collection, by an object that each finds unused, until ctx ends; it never waits for a reader.
func onCollection(ctx context.Context, c chan<- struct{}) {
	runtime.AddCleanup(&sentinel{}, func(struct{}) {
		if ctx.Err() != nil {
			return
		}
		select {
		case c <- struct{}{}:
		default:
		}
		onCollection(ctx, c)
	}, struct{}{})
}
