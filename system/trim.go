package system

import (
	"context"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync"
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
// back from the page cache. It wakes up for nothing but garbage collections. The program's mappings are not cut before they are let go of for
// the first time: that is work, and a start has fewer page faults where each maps more.
func trimWhenQuiet(ctx context.Context) {
	program := sync.OnceValue(pages.Own)
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
			limitMemory()
		}
		if rested {
			debug.FreeOSMemory()
			program().Drop()
		}
	}
}

// Memory in use besides the live heap: as much again as the live heap before the next collection (GOGC is 100), a share of it for holes,
// and memoryBase bytes for stacks, the runtime and small heaps.
const (
	holes      = 4 // a quarter
	memoryBase = 48 << 20
)

// limitMemory sets the runtime's soft memory limit to what the present live heap needs: it then gives back at once what a peak took
// (a list of all pods, collections that came late on a busy machine), not in the minutes after it. Where the heap grows, so does the
// limit, with each collection. An operator's own limit stands.
func limitMemory() {
	if os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(live)
	if live[0].Value.Kind() == metrics.KindUint64 {
		n := int64(live[0].Value.Uint64())
		debug.SetMemoryLimit(2*n + n/holes + memoryBase)
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
		onCollection(ctx, c) // before the message: its reader may begin the next collection
		select {
		case c <- struct{}{}:
		default:
		}
	}, struct{}{})
}
