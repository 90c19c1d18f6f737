package system

import (
	"bytes"
	"runtime/pprof"
	"testing"

	"github.com/stretchr/testify/require"
	"k8s.io/client-go/util/workqueue"
	_ "k8s.io/component-base/metrics/prometheus/workqueue" // what would give queues their metrics
)

// TestQueuesDoNotTick: a work queue that has nothing to do does not wake up.
func TestQueuesDoNotTick(t *testing.T) {
	q := workqueue.NewTypedRateLimitingQueueWithConfig(workqueue.DefaultTypedControllerRateLimiter[string](),
		workqueue.TypedRateLimitingQueueConfig[string]{Name: "with-a-name"})
	defer q.ShutDown()
	var all bytes.Buffer
	// With 2 it says who began each goroutine, also of one that has not run yet.
	require.NoError(t, pprof.Lookup("goroutine").WriteTo(&all, 2))
	require.Contains(t, all.String(), "created by k8s.io/client-go/util/workqueue.newDelayingQueue", "the queue runs")
	require.NotContains(t, all.String(), "created by sync.(*WaitGroup).Go", "the loop that a queue with metrics has besides")
}
