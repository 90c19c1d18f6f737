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
	worked := time.NewTimer(quiet)
	worked.Stop()
	first, second, last, dropped := time.After(firstTrim), time.After(secondTrim), time.Now(), time.Now()
	for {
		rested, again := false, false
		select {
		case <-ctx.Done():
			return
		case <-first:
			rested = true
		case <-second:
			rested = time.Since(last) >= quiet
			again = !rested // what the start sets off late is given back all the same
		case <-worked.C:
			rested = time.Since(last) >= quiet
			again = !rested
		case <-collected:
			rested = time.Since(last) >= periodic
			last = time.Now()
			again = pace.follow(last) && !rested // the first after a while may be that of a load that begins now
		}
		if again {
			worked.Reset(quiet)
		}
		if rested {
			pace.rest()
			debug.FreeOSMemory()
		}
		if rested || pace.working && time.Since(dropped) >= dropEvery {
			program().Drop()
			dropped = time.Now()
		}
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
