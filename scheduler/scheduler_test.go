package scheduler

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"runtime/pprof"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

// testTimeout bounds waits of tests; it is only reached when a test fails.
const testTimeout = 30 * time.Second

// The recorder of metrics notices its end within a second, and the goroutine of the scheduling loop when its queue is closed.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("k8s.io/kubernetes/pkg/scheduler/metrics.(*MetricAsyncRecorder).run"))
}

// apiStub takes bindings and events over HTTP; everything else is read through informers.
type apiStub struct {
	bound chan string // namespace/name -> node

	mu     sync.Mutex
	events int // guarded by mu
}

func (s *apiStub) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	switch {
	case strings.HasSuffix(r.URL.Path, "/binding"):
		var b corev1.Binding
		if err := json.NewDecoder(r.Body).Decode(&b); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.WriteHeader(http.StatusCreated)
		_ = json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusSuccess})
		s.bound <- b.Name + " -> " + b.Target.Name
	case strings.HasSuffix(r.URL.Path, "/events"):
		s.mu.Lock()
		s.events++
		s.mu.Unlock()
		w.WriteHeader(http.StatusCreated)
		_, _ = w.Write([]byte(`{"apiVersion":"events.k8s.io/v1","kind":"Event"}`))
	default:
		_, _ = w.Write([]byte(`{"apiVersion":"v1","kind":"Pod"}`))
	}
}

func newPod(name, node string, phase corev1.PodPhase, cpu string) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: name, UID: types.UID("u-" + name)},
		Spec: corev1.PodSpec{NodeName: node, SchedulerName: corev1.DefaultSchedulerName, Containers: []corev1.Container{{Name: "c", Image: "i",
			Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(cpu)}}}}},
		Status: corev1.PodStatus{Phase: phase}}
}

// A pod is bound to the node that has room, over ordinary informers.
func TestSchedules(t *testing.T) {
	stub := &apiStub{bound: make(chan string, 10)}
	server := httptest.NewServer(stub)
	defer server.Close()
	room := func(cpu string) corev1.NodeStatus {
		l := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(cpu), corev1.ResourceMemory: resource.MustParse("1Gi"), corev1.ResourcePods: resource.MustParse("10")}
		return corev1.NodeStatus{Capacity: l, Allocatable: l}
	}
	objects := []runtime.Object{
		&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "small"}, Status: room("1")},
		&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "full"}, Status: room("4")},
		&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "big"}, Status: room("4")},
		newPod("there", "full", corev1.PodRunning, "3"),
		newPod("new", "", corev1.PodPending, "2"),
	}
	f := factory(fake.NewClientset(objects...))
	ctx, cancel := context.WithCancel(t.Context())
	ready, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- Run(ctx, Options{Config: &rest.Config{Host: server.URL}, Informers: f, Ready: func() { close(ready) }})
	}()
	select {
	case <-ready:
	case <-time.After(testTimeout):
		t.Fatal("not ready")
	}
	select {
	case got := <-stub.bound:
		require.Equal(t, "new -> big", got)
	case <-time.After(testTimeout):
		t.Fatal("not bound")
	}
	cancel()
	require.NoError(t, <-ended)
	http.DefaultClient.CloseIdleConnections()
}

// factory makes informers on a fake cluster.
func factory(kube kubernetes.Interface) func() informers.SharedInformerFactory {
	return func() informers.SharedInformerFactory { return informers.NewSharedInformerFactory(kube, 0) }
}

// runs says whether there is a scheduler in this process.
func runs(t *testing.T) bool {
	var all bytes.Buffer
	require.NoError(t, pprof.Lookup("goroutine").WriteTo(&all, 2))
	return bytes.Contains(all.Bytes(), []byte("created by k8s.io/kubernetes/pkg/scheduler/backend/queue.(*PriorityQueue).Run"))
}

// TestRests: the scheduler exists while pods of its own wait, and not much longer.
func TestRests(t *testing.T) {
	stub := &apiStub{bound: make(chan string, 10)}
	server := httptest.NewServer(stub)
	defer server.Close()
	room := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("8"), corev1.ResourceMemory: resource.MustParse("1Gi"), corev1.ResourcePods: resource.MustParse("10")}
	other := newPod("of-another-scheduler", "", corev1.PodPending, "1")
	other.Spec.SchedulerName = "other"
	kube := fake.NewClientset(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node"}, Status: corev1.NodeStatus{Capacity: room, Allocatable: room}},
		other, newPod("bound", "node", corev1.PodRunning, "1"))
	ctx, cancel := context.WithCancel(t.Context())
	ready, ended := make(chan struct{}, 10), make(chan error, 1)
	o := Options{Config: &rest.Config{Host: server.URL}, Informers: factory(kube), Ready: func() { ready <- struct{}{} }}
	go func() { ended <- run(ctx, o, 20*time.Millisecond) }()
	for _, name := range []string{"one", "two", "three"} {
		require.False(t, runs(t))
		p, err := kube.CoreV1().Pods("n").Create(ctx, newPod(name, "", corev1.PodPending, "1"), metav1.CreateOptions{})
		require.NoError(t, err)
		select {
		case got := <-stub.bound:
			require.Equal(t, name+" -> node", got)
		case <-time.After(testTimeout):
			t.Fatal("not bound")
		}
		require.True(t, runs(t))
		require.Len(t, ready, 1)
		<-ready
		switch name {
		case "one":
			p.Spec.NodeName = "node"
			_, err = kube.CoreV1().Pods("n").Update(ctx, p, metav1.UpdateOptions{})
		case "two":
			err = kube.CoreV1().Pods("n").Delete(ctx, name, metav1.DeleteOptions{})
		case "three":
			p.Status.Phase = corev1.PodFailed
			_, err = kube.CoreV1().Pods("n").Update(ctx, p, metav1.UpdateOptions{})
		}
		require.NoError(t, err)
		require.Eventually(t, func() bool { return !runs(t) }, testTimeout, 5*time.Millisecond)
	}
	cancel()
	require.NoError(t, <-ended)
	http.DefaultClient.CloseIdleConnections()
}

func TestEndsWhileWaiting(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.NoError(t, Run(ctx, Options{Config: &rest.Config{Host: "http://127.0.0.1:1"}, Informers: factory(fake.NewClientset())}))
	require.Error(t, Run(ctx, Options{}))
}

// Pods that have ended take no room: the scheduler must not be shown them.
func TestPodInformerSelectsPodsThatHaveNotEnded(t *testing.T) {
	seen := make(chan string, 1)
	kube, err := kubernetes.NewForConfig(&rest.Config{Host: "http://knarr.internal", Transport: tripper(func(r *http.Request) {
		select {
		case seen <- r.URL.Query().Get("fieldSelector"):
		default:
		}
	})})
	require.NoError(t, err)
	informer := podInformer(kube, 0)
	require.NoError(t, informer.SetWatchErrorHandler(func(*cache.Reflector, error) {}))
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); informer.RunWithContext(ctx) }()
	require.Equal(t, "status.phase!=Succeeded,status.phase!=Failed", <-seen)
	cancel()
	<-ended
	require.Contains(t, informer.GetIndexer().GetIndexers(), cache.NamespaceIndex)
}

type tripper func(*http.Request)

func (f tripper) RoundTrip(r *http.Request) (*http.Response, error) {
	f(r)
	return nil, http.ErrServerClosed
}
