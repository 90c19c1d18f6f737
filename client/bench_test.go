package client

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/tools/cache"

	"knarr/store"
)

// The floor of an in-process request: nothing but the transport.
func BenchmarkRoundTrip(b *testing.B) {
	body := make([]byte, 2048)
	c := httpClient(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(body) })
	b.ReportAllocs()
	for b.Loop() {
		resp, err := c.Get(inProcessHost + "/api/v1/namespaces/n/pods/a")
		require.NoError(b, err)
		n, err := io.Copy(io.Discard, resp.Body)
		require.NoError(b, err)
		require.EqualValues(b, len(body), n)
		_ = resp.Body.Close()
	}
}

// benchWorld is a store without the mutation detector, so that it costs what it costs in production.
func benchWorld(b *testing.B, pods int) *world {
	w := newWorldWith(b, store.Options{Engine: &memoryEngine{}}, 0)
	for n := range pods {
		w.put(pod(fmt.Sprintf("n%d", n%10), fmt.Sprintf("p%d", n), "Running", "app", fmt.Sprint(n%7)))
	}
	return w
}

// One namespace of ten, 100 of 1000 pods, by a lister.
func BenchmarkListNamespace(b *testing.B) {
	l := NewFactory(Options{Tables: benchWorld(b, 1000)}).Core().V1().Pods().Lister().Pods("n3")
	b.ReportAllocs()
	for b.Loop() {
		got, err := l.List(labels.Everything())
		require.NoError(b, err)
		require.Len(b, got, 100)
	}
}

func BenchmarkGet(b *testing.B) {
	l := NewFactory(Options{Tables: benchWorld(b, 1000)}).Core().V1().Pods().Lister().Pods("n3")
	b.ReportAllocs()
	for b.Loop() {
		_, err := l.Get("p33")
		require.NoError(b, err)
	}
}

// From a write to the last of ten handlers that are told of it.
func BenchmarkEventToTenHandlers(b *testing.B) {
	w := benchWorld(b, 1000)
	i := NewFactory(Options{Tables: w}).Core().V1().Pods().Informer()
	told := make(chan struct{}, 10)
	var synced []cache.DoneChecker
	for range 10 {
		reg, err := i.AddEventHandler(cache.ResourceEventHandlerFuncs{UpdateFunc: func(_, _ any) { told <- struct{}{} }})
		require.NoError(b, err)
		synced = append(synced, reg.HasSyncedChecker())
	}
	ctx, cancel := context.WithCancel(b.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); i.RunWithContext(ctx) }()
	require.True(b, cache.WaitFor(ctx, "", synced...))
	b.ReportAllocs()
	for b.Loop() {
		w.put(pod("n0", "p0", "Running"))
		for range 10 {
			<-told
		}
	}
	cancel()
	<-ended
}
