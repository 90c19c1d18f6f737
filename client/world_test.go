package client

import (
	"context"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	autoscalingv1 "k8s.io/api/autoscaling/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/tools/cache"
	apiregistrationv1 "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"

	"knarr/store"
)

// memoryEngine decides and publishes at once and keeps nothing: the store's memory is all there is.
type memoryEngine struct {
	mu       sync.Mutex
	host     store.Host
	revision int64
}

func (e *memoryEngine) Start(_ context.Context, host store.Host) (int64, error) {
	e.host, e.revision = host, 1
	return 1, nil
}

func (e *memoryEngine) Load(_ context.Context, _ string, _ store.Class, _ func(store.Entry) error, done func(int64)) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	done(e.revision)
	return nil
}

func (e *memoryEngine) Commit(_ context.Context, p *store.Proposal) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := range p.Writes {
		w := &p.Writes[i]
		rev, created := e.host.Current(w)
		if rev != w.Expect {
			return &store.RefusedError{Index: i}
		}
		e.revision++
		w.Revision, w.CreateRevision = e.revision, created
		if created == 0 {
			w.CreateRevision = e.revision
		}
	}
	e.host.Publish([]*store.Proposal{p})
	return nil
}

func (e *memoryEngine) Close() error { return nil }

// jsonCodec encodes; the memory engine never has anything to decode.
type jsonCodec struct{}

func (jsonCodec) Encode(_ context.Context, _ string, obj runtime.Object) ([]byte, error) {
	return json.Marshal(obj)
}

func (jsonCodec) Decode(context.Context, string, []byte, int64) (runtime.Object, error) {
	return nil, fmt.Errorf("nothing to decode")
}

var widgets = schema.GroupVersionResource{Group: "example.com", Version: "v1", Resource: "widgets"}

// world is a store with a few tables, and the Tables of it.
type world struct {
	t     testing.TB
	store *store.Store

	mu      sync.Mutex
	tables  map[schema.GroupResource]*store.Table
	changed chan struct{}
	window  int // events per table; 0 is the default
}

func newWorld(t testing.TB, window int) *world {
	return newWorldWith(t, store.Options{Engine: &memoryEngine{}, Debug: true}, window)
}

func newWorldWith(t testing.TB, o store.Options, window int) *world {
	s, err := store.Open(t.Context(), o)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	w := &world{t: t, store: s, tables: map[schema.GroupResource]*store.Table{}, changed: make(chan struct{}), window: window}
	for _, r := range []schema.GroupResource{{Resource: "pods"}, {Resource: "nodes"}, {Group: "autoscaling", Resource: "horizontalpodautoscalers"},
		{Group: "apiextensions.k8s.io", Resource: "customresourcedefinitions"}, {Group: "apiregistration.k8s.io", Resource: "apiservices"}} {
		w.open(r)
	}
	return w
}

func (w *world) prefix(r schema.GroupResource) string { return "/registry/" + r.String() + "/" }

func (w *world) open(r schema.GroupResource) {
	table, err := w.store.OpenTable(context.Background(), store.TableOptions{Prefix: w.prefix(r), Codec: jsonCodec{}, WindowEvents: w.window})
	require.NoError(w.t, err)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.tables[r] = table
	close(w.changed)
	w.changed = make(chan struct{})
}

func (w *world) drop(r schema.GroupResource) {
	w.store.CloseTable(w.prefix(r))
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.tables, r)
	close(w.changed)
	w.changed = make(chan struct{})
}

func (w *world) ForObject(obj runtime.Object) (*store.Table, schema.GroupVersionResource, bool) {
	var gvr schema.GroupVersionResource
	switch obj.(type) {
	case *corev1.Pod:
		gvr = corev1.SchemeGroupVersion.WithResource("pods")
	case *corev1.Node:
		gvr = corev1.SchemeGroupVersion.WithResource("nodes")
	case *autoscalingv2.HorizontalPodAutoscaler:
		gvr = autoscalingv2.SchemeGroupVersion.WithResource("horizontalpodautoscalers")
	case *autoscalingv1.HorizontalPodAutoscaler:
		gvr = autoscalingv1.SchemeGroupVersion.WithResource("horizontalpodautoscalers")
	case *apiextensionsv1.CustomResourceDefinition:
		gvr = apiextensionsv1.SchemeGroupVersion.WithResource("customresourcedefinitions")
	case *apiregistrationv1.APIService:
		gvr = apiregistrationv1.SchemeGroupVersion.WithResource("apiservices")
	default:
		return nil, gvr, false
	}
	t, _ := w.ForResource(gvr)
	return t, gvr, true
}

func (w *world) ForResource(gvr schema.GroupVersionResource) (*store.Table, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	t, ok := w.tables[gvr.GroupResource()]
	return t, ok
}

func (w *world) Changed() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.changed
}

func (w *world) Revision() int64 { return w.store.Revision() }

// table of an object that is going to be written.
func (w *world) table(obj runtime.Object) *store.Table {
	if _, ok := obj.(*unstructured.Unstructured); ok {
		t, _ := w.ForResource(widgets)
		return t
	}
	t, _, _ := w.ForObject(obj)
	return t
}

func keyOf(t *store.Table, obj runtime.Object) string {
	key, err := cache.MetaNamespaceKeyFunc(obj)
	if err != nil {
		panic(err)
	}
	return t.Prefix() + key
}

// put creates or replaces an object and returns its record.
func (w *world) put(obj runtime.Object) *store.Record {
	t := w.table(obj)
	key := keyOf(t, obj)
	var expect int64
	if r := t.Get(key); r != nil {
		expect = r.Revision
	}
	out, err := w.store.Txn(context.Background(), store.Op{Table: t, Key: key, Object: obj.DeepCopyObject(), Expect: expect})
	require.NoError(w.t, err)
	return out[0]
}

func (w *world) remove(obj runtime.Object) *store.Record {
	t := w.table(obj)
	key := keyOf(t, obj)
	out, err := w.store.Txn(context.Background(), store.Op{Table: t, Key: key, Expect: t.Get(key).Revision})
	require.NoError(w.t, err)
	return out[0]
}

func pod(ns, name string, phase corev1.PodPhase, labels ...string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}, Status: corev1.PodStatus{Phase: phase}}
	for i := 0; i+1 < len(labels); i += 2 {
		metav1.SetMetaDataLabel(&p.ObjectMeta, labels[i], labels[i+1])
	}
	return p
}

func widget(ns, name, size string) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: map[string]any{"apiVersion": "example.com/v1", "kind": "Widget",
		"metadata": map[string]any{"namespace": ns, "name": name, "labels": map[string]any{"a": "b"}, "uid": "u-" + name}, "size": size}}
}

// start runs an informer until the test ends.
func start(t *testing.T, i cache.SharedIndexInformer) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); i.RunWithContext(ctx) }()
	stop = func() { cancel(); <-ended }
	t.Cleanup(stop)
	return stop
}

// journal is an event handler that writes down what it is told, one line each.
type journal struct {
	lines chan string
	hold  chan struct{} // non-nil: each call waits until it can receive
	calls chan struct{} // non-nil: gets a value as a call begins
}

func newJournal() *journal { return &journal{lines: make(chan string, 4096)} }

func (j *journal) note(format string, args ...any) {
	if j.calls != nil {
		j.calls <- struct{}{}
	}
	if j.hold != nil {
		<-j.hold
	}
	j.lines <- fmt.Sprintf(format, args...)
}

func short(obj any) string {
	prefix := ""
	if d, ok := obj.(cache.DeletedFinalStateUnknown); ok {
		prefix, obj = "unknown ", d.Obj
	}
	m := obj.(metav1.Object)
	what := strings.TrimPrefix(reflect.TypeOf(obj).String(), "*")
	what = what[strings.LastIndex(what, ".")+1:]
	if p, ok := obj.(*corev1.Pod); ok {
		what = string(p.Status.Phase)
	}
	return fmt.Sprintf("%s%s/%s(%s)@%s", prefix, m.GetNamespace(), m.GetName(), what, m.GetResourceVersion())
}

func (j *journal) OnAdd(obj any, initial bool) { j.note("add %s initial=%t", short(obj), initial) }
func (j *journal) OnUpdate(old, obj any)       { j.note("update %s -> %s", short(old), short(obj)) }
func (j *journal) OnDelete(obj any)            { j.note("delete %s", short(obj)) }

// expect takes the given lines, in this order, and then nothing more for now.
func (j *journal) expect(t *testing.T, lines ...string) {
	t.Helper()
	for _, want := range lines {
		require.Equal(t, want, receive(t, j.lines))
	}
	select {
	case more := <-j.lines:
		require.Fail(t, "unexpected event", more)
	default:
	}
}

// await waits for a channel to close.
func await(t *testing.T, what string, ch <-chan struct{}) {
	t.Helper()
	select {
	case <-ch:
	case <-time.After(testTimeout):
		require.FailNow(t, "timed out", what)
	}
}
