// Package collect puts off the garbage collections of a process that starts, and tells of collections. It imports next to nothing, so that it comes before all packages
// that make garbage when they are initialized: see package early.
package collect

import (
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
)

// quiet are the commands that say nothing in kubectl's words: their start is what somebody waits for.
var quiet = []string{"server", "agent", "up", "down", "status"}

// Starts reports whether the process is one of these commands, and not kubectl.
func Starts() bool {
	return len(os.Args) > 1 && slices.Contains(quiet, os.Args[1]) && filepath.Base(os.Args[0]) != "kubectl"
}

// startHeap is the heap, in bytes, at which a process that starts collects garbage for the first time. With more, a server starts no faster,
// and what stays lies among so much garbage that more pages stay with it (12 MB at 160 MB).
const startHeap = 32 << 20

// startPercent is the garbage, in percent of the live heap, that the next startCollections-1 collections come with. Live then is less than half of what there is in the
// end: with the usual 100 the second collection would come with less heap than the first. The price of a start that is a tenth faster are 2 MB that stay.
const startPercent, startCollections = 170, 3

// leastHeap is where the runtime collects first at a GOGC of 100 (see the package runtime), in bytes.
const leastHeap = 4 << 20

// later lets a start go without the many collections of a small heap that grows. The first comes at startHeap or where somebody asks for one, those after it with
// startPercent; then the pace is Go's own. An operator's pace stands.
func later() {
	if os.Getenv("GOGC") != "" {
		return
	}
	usual := debug.SetGCPercent(100 * startHeap / leastHeap)
	collected := 0
	var next func()
	next = func() {
		if collected++; collected == startCollections {
			debug.SetGCPercent(usual)
			return
		}
		debug.SetGCPercent(startPercent)
		After(next)
	}
	After(next)
}

// sentinel is an object that nobody keeps: the next collection finds it unused.
type sentinel struct{ _ *int }

// After calls f once, after the next collection, on another goroutine.
func After(f func()) {
	runtime.AddCleanup(&sentinel{}, func(f func()) { f() }, f)
}

func init() {
	if Starts() {
		later()
	}
}
