// Package early settles, before upstream's packages are initialized, what their initialization would settle otherwise and
// nobody can change afterwards. Programs import it for nothing but that.
//
// Go initializes packages one after the other: always the one with the least import path among those whose imports are
// initialized. Hence this package's path, and so its module of its own: it comes as soon as the few packages that it imports are there.
package early

import (
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	_ "unsafe" // for go:linkname

	"k8s.io/client-go/util/workqueue"
	"k8s.io/kubectl/pkg/util/i18n"
)

// QueueMetricsEnv asks for upstream's metrics of work queues (workqueue_*), where it is not empty.
const QueueMetricsEnv = "KNARR_QUEUE_METRICS"

// provider is where work queues get their metrics from. It still stands for none, which has no name outside of its package.
//
//go:linkname provider k8s.io/client-go/util/workqueue.globalMetricsProvider
var provider workqueue.MetricsProvider

// quiet are the commands that say nothing in kubectl's words.
var quiet = []string{"server", "agent", "up", "down", "status"}

// startHeap is the heap, in bytes, at which a process that starts collects garbage for the first time. With more, a server starts no faster,
// and what stays lies among so much garbage that more pages stay with it (12 MB at 160 MB).
const startHeap = 32 << 20

// leastHeap is where the runtime collects first at a GOGC of 100 (see the package runtime), in bytes.
const leastHeap = 4 << 20

// collectLater lets a start go without the many collections of a small heap that grows. From the first collection on, which comes
// at startHeap or where somebody asks for one, the pace is Go's own. An operator's pace stands.
func collectLater() {
	if os.Getenv("GOGC") != "" {
		return
	}
	usual := debug.SetGCPercent(100 * startHeap / leastHeap)
	runtime.AddCleanup(&sentinel{}, func(percent int) { debug.SetGCPercent(percent) }, usual)
}

// sentinel is an object that nobody keeps: the first collection finds it unused.
type sentinel struct{ _ *int }

func init() {
	// Each queue with metrics wakes up twice a second to say how long its work takes: most of what an idle server would do.
	if os.Getenv(QueueMetricsEnv) == "" {
		workqueue.SetProvider(provider) // the first call decides
	}
	if len(os.Args) > 1 && slices.Contains(quiet, os.Args[1]) && filepath.Base(os.Args[0]) != "kubectl" {
		collectLater()
		// Kubectl's packages look up their texts in a catalogue when they are initialized, which takes a third of the time until main.
		i18n.LoadTranslationsFunc = func() error { return nil }
	}
}
