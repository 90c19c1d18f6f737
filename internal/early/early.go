// Package early settles, before upstream's packages are initialized, what their initialization would settle otherwise and
// nobody can change afterwards. Programs import it for nothing but that.
//
// Go initializes packages one after the other: always the one with the least import path among those whose imports are
// initialized. Hence this package's path, and so its module of its own: it comes as soon as the few packages that it imports are there.
package early

import (
	"os"
	_ "unsafe" // for go:linkname

	"a.knarr/early/collect"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/kubectl/pkg/util/i18n"
)

// QueueMetricsEnv asks for upstream's metrics of work queues (workqueue_*), where it is not empty.
const QueueMetricsEnv = "KNARR_QUEUE_METRICS"

// provider is where work queues get their metrics from. It still stands for none, which has no name outside of its package.
//
//go:linkname provider k8s.io/client-go/util/workqueue.globalMetricsProvider
var provider workqueue.MetricsProvider

func init() {
	// Each queue with metrics wakes up twice a second to say how long its work takes: most of what an idle server would do.
	if os.Getenv(QueueMetricsEnv) == "" {
		workqueue.SetProvider(provider) // the first call decides
	}
	if collect.Starts() {
		// Kubectl's packages look up their texts in a catalogue when they are initialized, which takes a third of the time until main.
		i18n.LoadTranslationsFunc = func() error { return nil }
	}
}
