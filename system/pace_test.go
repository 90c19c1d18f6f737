package system

import (
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// kept is live, so that the collector's goal is not the runtime's least.
var kept [][]byte

// garbage lasts until there is another.
var garbage []byte

// provoke allocates until the heap's growth makes a collection.
func provoke(t *testing.T) {
	t.Helper()
	before := read(automaticCollections)
	for i := 0; read(automaticCollections) == before; i++ {
		require.Less(t, i, 1<<20, "no collection")
		garbage = make([]byte, 64<<10)
	}
}

const (
	automaticCollections = "/gc/cycles/automatic:gc-cycles"
	heapGoal             = "/gc/heap/goal:bytes"
)

func read(name string) int64 {
	s := []metrics.Sample{{Name: name}}
	metrics.Read(s)
	return int64(s[0].Value.Uint64())
}

func TestPace(t *testing.T) {
	if testing.Short() {
		t.Skip("allocates")
	}
	t.Setenv("GOGC", "")
	t.Setenv("GOMEMLIMIT", "")
	percent, limit := debug.SetGCPercent(usualPercent), debug.SetMemoryLimit(-1)
	t.Cleanup(func() {
		kept, garbage = nil, nil
		debug.SetGCPercent(percent)
		debug.SetMemoryLimit(limit)
	})
	for range 160 {
		kept = append(kept, make([]byte, 64<<10)) // 10 MB
	}
	runtime.GC()
	heap := 16 * read("/gc/heap/live:bytes")
	p := pace{workHeap: heap}
	at := time.Now()
	next := func(after time.Duration) bool {
		provoke(t)
		at = at.Add(after)
		require.True(t, p.follow(at), "nobody asked for it")
		return p.working
	}
	usual := func() {
		t.Helper()
		runtime.GC() // what was allocated during the last counted as live
		require.Less(t, read(heapGoal), heap/2)
	}
	next(time.Minute)
	require.False(t, next(time.Second), "a start is no work")
	p.rest()
	require.False(t, next(time.Second+rush), "one collection is no rush")
	usual()
	require.True(t, next(rush/2))
	require.InEpsilon(t, heap, read(heapGoal), 0.1, "the next waits for that heap")
	require.True(t, next(rush/2))
	require.InEpsilon(t, heap, read(heapGoal), 0.1)
	require.True(t, next(2*rush), "a pause is not the end")
	require.False(t, next(quiet), "they are rare again")
	usual()
	require.True(t, next(rush/2))
	runtime.GC()
	at = at.Add(rush / 2)
	require.False(t, p.follow(at), "somebody asked for it")
	require.False(t, p.working)
	usual()
	require.True(t, next(rush/4))
	p.rest()
	usual()

	busy := true
	p.busy = func() bool { return busy }
	require.True(t, next(time.Minute), "one collection of a busy process")
	busy = false
	p.rest()
	require.False(t, next(time.Minute))
	usual()
	p.started, busy = false, true
	require.False(t, next(time.Minute), "a start is no work, how busy it may be")
	p.rest()
	busy = false

	p.workHeap = 1 // a large heap has less garbage, not more
	at = at.Add(time.Minute)
	next(0)
	require.True(t, next(rush/2))
	roots := read("/gc/scan/globals:bytes") + read("/gc/scan/stack:bytes")
	live := read("/gc/heap/live:bytes")
	require.InEpsilon(t, live+live*workPercent/100, read(heapGoal), 0.15, "live %d roots %d", live, roots)

	t.Setenv("GOGC", "70")
	require.False(t, next(rush/2), "an operator's pace stands")
}

func TestWorkHeap(t *testing.T) {
	h := workHeap()
	require.Positive(t, h)
	require.LessOrEqual(t, h, int64(serverHeap))
}
