// Package collect puts off the garbage collections of a process that starts. It imports next to nothing, so that it comes before all packages
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

// leastHeap is where the runtime collects first at a GOGC of 100 (see the package runtime), in bytes.
const leastHeap = 4 << 20

// later lets a start go without the many collections of a small heap that grows. From the first collection on, which comes
// at startHeap or where somebody asks for one, the pace is Go's own. An operator's pace stands.
func later() {
	if os.Getenv("GOGC") != "" {
		return
	}
	usual := debug.SetGCPercent(100 * startHeap / leastHeap)
	runtime.AddCleanup(&sentinel{}, func(percent int) { debug.SetGCPercent(percent) }, usual)
}

// sentinel is an object that nobody keeps: the first collection finds it unused.
type sentinel struct{ _ *int }

func init() {
	if Starts() {
		later()
	}
}
