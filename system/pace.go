package system

import (
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// rush is how close together two collections are when work begins; it is over when there was none for quiet.
	rush = 2 * time.Second
	// A collection slows all requests down that are under way: where the heap is small it is put off until the heap has serverHeap bytes, on a machine with less memory until it
	// has a share of that.
	serverHeap, heapShare = 160 << 20, 16
	// The next collection comes with so much garbage, in percent of the live heap: the runtime's own share, and that of a large heap while there is work.
	usualPercent, workPercent = 100, 80
	// Memory in use besides what the collector is to let the heap become: a share of the live heap for holes, and memoryBase bytes for stacks, the runtime and small heaps.
	holes      = 4 // a quarter
	memoryBase = 48 << 20
)

// workHeap is what a server's heap may become before the first collection of a time of work, in bytes.
func workHeap() int64 {
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil {
		return 0
	}
	return min(serverHeap, int64(info.Totalram)*int64(info.Unit)/heapShare)
}

// pace makes the runtime's collector follow the live heap and the work. With no workHeap there is no work. Not safe for concurrent use.
type pace struct {
	workHeap  int64       // bytes
	busy      func() bool // there is work now; nil: nobody knows
	started   bool        // the start is over
	working   bool
	automatic uint64    // collections that nobody asked for
	last      time.Time // when there was one
}

// What follow asks the runtime for.
const (
	liveHeap = iota
	globals
	stacks
	automatic
)

// follow is called after each collection, with the time, and reports whether it was one that nobody asked for. Where one of those comes while the process is busy, or two come within rush, work
// has begun. An operator's own GOGC and GOMEMLIMIT stand.
//
// The soft memory limit becomes what the present live heap needs: the runtime then gives back at once what a peak took (a list of all pods, collections that came late on a busy
// machine), not in the minutes after it. Where the heap grows, so does the limit, with each collection.
func (p *pace) follow(now time.Time) bool {
	read := []metrics.Sample{liveHeap: {Name: "/gc/heap/live:bytes"}, globals: {Name: "/gc/scan/globals:bytes"}, stacks: {Name: "/gc/scan/stack:bytes"},
		automatic: {Name: "/gc/cycles/automatic:gc-cycles"}}
	metrics.Read(read)
	for i := range read {
		if read[i].Value.Kind() != metrics.KindUint64 {
			return false
		}
	}
	working, own := false, false
	if n := read[automatic].Value.Uint64(); n != p.automatic {
		own = true
		since := now.Sub(p.last)
		begun := since < rush || p.working && since < quiet || p.busy != nil && p.busy()
		working = p.started && p.workHeap > 0 && begun && os.Getenv("GOGC") == ""
		p.automatic, p.last = n, now
	}
	live := int64(read[liveHeap].Value.Uint64())
	goal := live + live*usualPercent/100
	if working {
		goal = max(p.workHeap, live+live*workPercent/100)
		roots := int64(read[globals].Value.Uint64() + read[stacks].Value.Uint64()) // which the runtime's percentage is of, too
		debug.SetGCPercent(int((goal - live) * 100 / (live + roots)))
	} else if p.working {
		debug.SetGCPercent(usualPercent)
	}
	p.working = working
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(goal + live/holes + memoryBase)
	}
	return own
}

// rest is called when the start or a time of work is over.
func (p *pace) rest() {
	if p.working {
		debug.SetGCPercent(usualPercent)
	}
	p.started, p.working = true, false
}
