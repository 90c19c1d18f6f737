package client

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	autoscalingv1 "k8s.io/api/autoscaling/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	coreinformers "k8s.io/client-go/informers/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
)

func at(format string, revisions ...int64) string {
	args := make([]any, len(revisions))
	for i, r := range revisions {
		args[i] = strconv.FormatInt(r, 10)
	}
	return fmt.Sprintf(format, args...)
}

// Every view tells each object's story as the view sees it: what begins to match is added, what ceases to match is deleted.
func TestHandlersSeeTheirView(t *testing.T) {
	for name, tc := range map[string]struct {
		tweak     func(*metav1.ListOptions)
		namespace string
		want      []string // %[n]s is the revision of step n
	}{
		"all": {want: []string{
			"add n/a(Pending)@%[1]s initial=true", "update n/a(Pending)@%[1]s -> n/a(Running)@%[2]s", "add m/b(Pending)@%[3]s initial=false",
			"update n/a(Running)@%[2]s -> n/a(Succeeded)@%[4]s", "update n/a(Succeeded)@%[4]s -> n/a(Running)@%[5]s", "delete n/a(Running)@%[6]s",
			"delete m/b(Pending)@%[7]s"}},
		"not terminal": {tweak: func(o *metav1.ListOptions) { o.FieldSelector = "status.phase!=Succeeded,status.phase!=Failed" }, want: []string{
			"add n/a(Pending)@%[1]s initial=true", "update n/a(Pending)@%[1]s -> n/a(Running)@%[2]s", "add m/b(Pending)@%[3]s initial=false",
			"delete n/a(Running)@%[4]s", "add n/a(Running)@%[5]s initial=false", "delete n/a(Running)@%[6]s", "delete m/b(Pending)@%[7]s"}},
		"namespace": {namespace: "m", want: []string{"add m/b(Pending)@%[3]s initial=false", "delete m/b(Pending)@%[7]s"}},
		"labels": {tweak: func(o *metav1.ListOptions) { o.LabelSelector = "app=x" }, want: []string{
			"add n/a(Pending)@%[1]s initial=true", "delete n/a(Pending)@%[2]s", "add n/a(Running)@%[5]s initial=false", "delete n/a(Running)@%[6]s"}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 0)
			f := NewFactory(Options{Tables: w, Tweak: tc.tweak, Namespace: tc.namespace})
			i := f.Core().V1().Pods().Informer()
			j := newJournal()
			reg, err := i.AddEventHandler(j)
			require.NoError(t, err)
			require.False(t, reg.HasSynced())
			revs := []any{w.put(pod("n", "a", "Pending", "app", "x")).Revision}
			start(t, i)
			await(t, "handler", reg.HasSyncedChecker().Done())
			require.True(t, i.HasSynced())
			for _, step := range []func() int64{
				func() int64 { return w.put(pod("n", "a", "Running")).Revision },
				func() int64 { return w.put(pod("m", "b", "Pending")).Revision },
				func() int64 { return w.put(pod("n", "a", "Succeeded")).Revision },
				func() int64 { return w.put(pod("n", "a", "Running", "app", "x")).Revision },
				func() int64 { return w.remove(pod("n", "a", "")).Revision },
				func() int64 { return w.remove(pod("m", "b", "")).Revision },
			} {
				revs = append(revs, step())
			}
			for n, r := range revs {
				revs[n] = strconv.FormatInt(r.(int64), 10)
			}
			for _, format := range tc.want {
				require.Equal(t, fmt.Sprintf(format+"%.0[7]s", revs...), receive(t, j.lines))
			}
			j.expect(t)
		})
	}
}

// The scheduler makes its pod informer by hand; its selector must not be lost.
func TestInformerForHandMadeConstructor(t *testing.T) {
	w := newWorld(t, 0)
	f := NewFactory(Options{Tables: w})
	calls := 0
	constructor := func(cs kubernetes.Interface, resync time.Duration) cache.SharedIndexInformer {
		calls++
		return coreinformers.NewFilteredPodInformer(cs, "n", resync, cache.Indexers{"byPhase": byPhase},
			func(o *metav1.ListOptions) { o.FieldSelector = "status.phase!=Failed"; o.LabelSelector = "app" })
	}
	i := f.InformerFor(&corev1.Pod{}, constructor)
	require.Same(t, i, f.InformerFor(&corev1.Pod{}, constructor), "one informer per type")
	require.Same(t, i, f.Core().V1().Pods().Informer())
	require.Equal(t, 1, calls)
	w.put(pod("n", "a", "Running", "app", "x"))
	w.put(pod("n", "b", "Failed", "app", "x"))
	w.put(pod("n", "c", "Running"))
	w.put(pod("m", "a", "Running", "app", "x"))
	require.Equal(t, []string{"n/a"}, i.GetIndexer().ListKeys())
	keys, err := i.GetIndexer().IndexKeys("byPhase", "Running")
	require.NoError(t, err)
	require.Equal(t, []string{"n/a"}, keys)
	require.Equal(t, []string{"Running"}, i.GetIndexer().ListIndexFuncValues("byPhase"))
}

func byPhase(obj any) ([]string, error) { return []string{string(obj.(*corev1.Pod).Status.Phase)}, nil }

func TestUnknownFieldSelectorPanics(t *testing.T) {
	f := NewFactory(Options{Tables: newWorld(t, 0), Tweak: func(o *metav1.ListOptions) { o.FieldSelector = "spec.nonsense=1" }})
	require.PanicsWithValue(t, `client: informer of /v1, Resource=pods: field selector "spec.nonsense=1": *v1.Pod has no selectable field "spec.nonsense"`,
		func() { f.Core().V1().Pods().Informer() })
}

func TestListersReadTheStore(t *testing.T) {
	w := newWorld(t, 0)
	f := NewFactory(Options{Tables: w})
	pods, nodes := f.Core().V1().Pods(), f.Core().V1().Nodes()
	rec := w.put(pod("n", "a", "Running", "app", "x"))
	w.put(pod("n", "b", "Running"))
	w.put(pod("nn", "a", "Running"))
	w.put(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node"}})

	got, err := pods.Lister().Pods("n").Get("a")
	require.NoError(t, err)
	require.Same(t, rec.Object, got, "the very object of the store")
	all, err := pods.Lister().List(labels.Everything())
	require.NoError(t, err)
	require.Len(t, all, 3)
	in, err := pods.Lister().Pods("n").List(labels.Everything())
	require.NoError(t, err)
	require.Len(t, in, 2)
	in, err = pods.Lister().Pods("n").List(labels.SelectorFromSet(labels.Set{"app": "x"}))
	require.NoError(t, err)
	require.Len(t, in, 1)
	_, err = pods.Lister().Pods("n").Get("zzz")
	require.EqualError(t, err, `pod "zzz" not found`)
	node, err := nodes.Lister().Get("node")
	require.NoError(t, err)
	require.Equal(t, "node", node.Name)

	st := pods.Informer().GetStore()
	obj, ok, err := st.Get(pod("n", "a", ""))
	require.NoError(t, err)
	require.True(t, ok)
	require.Same(t, rec.Object, obj)
	_, ok, err = st.Get(cache.DeletedFinalStateUnknown{Key: "n/zzz"})
	require.NoError(t, err)
	require.False(t, ok)
	_, _, err = st.Get("no object")
	require.Error(t, err)
	require.Equal(t, []string{"n/a", "n/b", "nn/a"}, st.ListKeys())
	for namespace, has := range map[string]bool{"n": true, "nn": true, "": true, "nnn": false, "a": false} {
		require.Equal(t, has, HasObjects(st, namespace), namespace)
	}
	require.Equal(t, strconv.FormatInt(w.Revision(), 10), st.LastStoreSyncResourceVersion())
	require.NoError(t, st.Resync())
	for _, err := range []error{st.Add(obj), st.Update(obj), st.Delete(obj), st.Replace(nil, "")} {
		require.ErrorIs(t, err, errReadOnly)
	}

	generic, err := f.ForResource(corev1.SchemeGroupVersion.WithResource("pods"))
	require.NoError(t, err)
	require.Same(t, pods.Informer(), generic.Informer())
	o, err := generic.Lister().ByNamespace("n").Get("a")
	require.NoError(t, err)
	require.Same(t, rec.Object, o)
	_, err = f.ForResource(widgets)
	require.ErrorContains(t, err, "no informer found")
	require.Nil(t, f.InformerName())
}

func TestIndexers(t *testing.T) {
	w := newWorld(t, 0)
	i := NewFactory(Options{Tables: w}).Core().V1().Pods().Informer()
	w.put(pod("n", "a", "Running"))
	w.put(pod("n", "b", "Pending"))
	w.put(pod("m", "a", "Running"))
	start(t, i)
	await(t, "informer", i.HasSyncedChecker().Done())
	several := func(obj any) ([]string, error) {
		p := obj.(*corev1.Pod)
		return []string{p.Namespace, string(p.Status.Phase)}, nil
	}
	require.NoError(t, i.AddIndexers(cache.Indexers{"phase": byPhase, "several": several}), "any time, running or not")
	x := i.GetIndexer()
	require.ErrorContains(t, x.AddIndexers(cache.Indexers{"phase": byPhase, "new": byPhase}), "indexer conflict: [phase]")
	require.Len(t, x.GetIndexers(), 3)

	for _, tc := range []struct {
		index, value string
		want         []string
	}{
		{"phase", "Running", []string{"m/a", "n/a"}}, {"phase", "Pending", []string{"n/b"}}, {"phase", "Failed", nil},
		{"several", "n", []string{"n/a", "n/b"}}, {"several", "Running", []string{"m/a", "n/a"}},
		{cache.NamespaceIndex, "n", []string{"n/a", "n/b"}}, {cache.NamespaceIndex, "", nil},
	} {
		keys, err := x.IndexKeys(tc.index, tc.value)
		require.NoError(t, err)
		require.Equal(t, tc.want, keys, "%s=%s", tc.index, tc.value)
		objs, err := x.ByIndex(tc.index, tc.value)
		require.NoError(t, err)
		require.Len(t, objs, len(tc.want))
	}
	objs, err := x.Index("several", pod("n", "", "Running"))
	require.NoError(t, err)
	require.Len(t, objs, 3, "each object once")
	require.ElementsMatch(t, []string{"n", "m"}, x.ListIndexFuncValues(cache.NamespaceIndex))
	require.ElementsMatch(t, []string{"Running", "Pending"}, x.ListIndexFuncValues("phase"))
	_, err = x.ByIndex("none", "")
	require.EqualError(t, err, "Index with name none does not exist")

	// An index advances before handlers hear of it.
	seen := make(chan []string, 1)
	reg, err := i.AddEventHandler(cache.ResourceEventHandlerFuncs{UpdateFunc: func(_, _ any) {
		keys, _ := x.IndexKeys("phase", "Failed")
		seen <- append(keys, i.LastSyncResourceVersion())
	}})
	require.NoError(t, err)
	await(t, "handler", reg.HasSyncedChecker().Done())
	rec := w.put(pod("n", "a", "Failed"))
	require.Equal(t, []string{"n/a", strconv.FormatInt(rec.Revision, 10)}, receive(t, seen))
	// A panicking or failing index function harms nobody.
	require.NoError(t, i.AddIndexers(cache.Indexers{"bad": func(any) ([]string, error) { panic("bad") }, "err": func(any) ([]string, error) { return nil, errors.New("no") }}))
	w.put(pod("n", "a", "Running"))
	require.Empty(t, x.ListIndexFuncValues("bad"))
}

func TestRevisionIsGlobal(t *testing.T) {
	w := newWorld(t, 0)
	i := NewFactory(Options{Tables: w}).Core().V1().Pods().Informer()
	require.Empty(t, i.LastSyncResourceVersion(), "not running yet")
	start(t, i)
	await(t, "informer", i.HasSyncedChecker().Done())
	w.put(pod("n", "a", "Running"))
	rec := w.put(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node"}}) // another table
	want := strconv.FormatInt(rec.Revision, 10)
	require.Equal(t, want, i.LastSyncResourceVersion())
	require.Equal(t, want, i.GetStore().LastStoreSyncResourceVersion())
	require.Equal(t, want, i.GetController().LastSyncResourceVersion())
	require.True(t, i.GetController().HasSynced())
}

func TestHandlerThatJoinsLate(t *testing.T) {
	w := newWorld(t, 0)
	i := NewFactory(Options{Tables: w}).Core().V1().Pods().Informer()
	start(t, i)
	await(t, "informer", i.HasSyncedChecker().Done())
	a := w.put(pod("n", "a", "Running")).Revision
	j := newJournal()
	reg, err := i.AddEventHandler(j)
	require.NoError(t, err)
	await(t, "handler", reg.HasSyncedChecker().Done())
	j.expect(t, at("add n/a(Running)@%s initial=true", a))
	b := w.put(pod("n", "b", "Running")).Revision
	j.expect(t, at("add n/b(Running)@%s initial=false", b))

	other := newJournal()
	_, err = i.AddEventHandler(other)
	require.NoError(t, err)
	receive(t, other.lines)
	receive(t, other.lines)
	require.NoError(t, i.RemoveEventHandler(reg))
	require.NoError(t, i.RemoveEventHandler(reg), "idempotent")
	require.Error(t, i.RemoveEventHandler(nil))
	c := w.put(pod("n", "c", "Running")).Revision
	other.expect(t, at("add n/c(Running)@%s initial=false", c))
	j.expect(t)
}

// A handler that is slower than the window gets the difference to what it was told, not the lost events, and nobody else waits for it.
func TestHandlerThatFallsBehind(t *testing.T) {
	const window = 8
	w := newWorld(t, window)
	i := NewFactory(Options{Tables: w}).Core().V1().Pods().Informer()
	slow, quick := newJournal(), newJournal()
	slow.hold, slow.calls = make(chan struct{}), make(chan struct{}, 100)
	kept := w.put(pod("n", "kept", "Running")).Revision
	gone := w.put(pod("n", "gone", "Running")).Revision
	for _, j := range []*journal{slow, quick} {
		_, err := i.AddEventHandler(j)
		require.NoError(t, err)
	}
	start(t, i)
	slow.hold <- struct{}{}
	slow.hold <- struct{}{}
	require.Equal(t, at("add n/gone(Running)@%s initial=true", gone), receive(t, slow.lines))
	require.Equal(t, at("add n/kept(Running)@%s initial=true", kept), receive(t, slow.lines))
	receive(t, quick.lines)
	receive(t, quick.lines)
	receive(t, slow.calls)
	receive(t, slow.calls)

	// One event is under way in the slow handler when everything else happens.
	first := w.put(pod("n", "short", "Running")).Revision
	receive(t, quick.lines)
	receive(t, slow.calls)
	var last int64
	for n := range 10 * window {
		last = w.put(pod("n", "kept", corev1.PodPhase(fmt.Sprint(n)))).Revision
		receive(t, quick.lines)
	}
	w.remove(pod("n", "gone", ""))
	w.remove(pod("n", "short", ""))
	brief := pod("n", "brief", "Running")
	w.put(brief)
	w.remove(brief)
	late := w.put(pod("n", "late", "Running")).Revision
	close(slow.hold)
	require.Equal(t, at("add n/short(Running)@%s initial=false", first), receive(t, slow.lines))
	rest := map[string]bool{}
	for range 4 {
		rest[receive(t, slow.lines)] = true
	}
	require.Equal(t, map[string]bool{
		at("update n/kept(Running)@%s -> n/kept(79)@%s", kept, last): true,
		at("delete unknown n/gone(Running)@%s", gone):                true,
		at("delete unknown n/short(Running)@%s", first):              true,
		at("add n/late(Running)@%s initial=false", late):             true,
	}, rest)
	// And it goes on from there.
	next := w.put(pod("n", "next", "Running")).Revision
	slow.expect(t, at("add n/next(Running)@%s initial=false", next))
}

func TestResync(t *testing.T) {
	w := newWorld(t, 0)
	i := NewFactory(Options{Tables: w}).Core().V1().Pods().Informer()
	rev := w.put(pod("n", "a", "Running")).Revision
	j, never := newJournal(), newJournal()
	_, err := i.AddEventHandlerWithResyncPeriod(j, time.Millisecond) // raised to the minimum
	require.NoError(t, err)
	_, err = i.AddEventHandler(never)
	require.NoError(t, err)
	start(t, i)
	require.Equal(t, at("add n/a(Running)@%s initial=true", rev), receive(t, j.lines))
	begin := time.Now()
	require.Equal(t, at("update n/a(Running)@%s -> n/a(Running)@%s", rev, rev), receive(t, j.lines))
	require.GreaterOrEqual(t, time.Since(begin), minResync/2)
	never.expect(t, at("add n/a(Running)@%s initial=true", rev))
}

func TestLifecycle(t *testing.T) {
	w := newWorld(t, 0)
	i := NewFactory(Options{Tables: w}).Core().V1().Pods().Informer()
	require.NotNil(t, i.GetController())
	require.NoError(t, i.SetTransform(func(any) (any, error) { t.Error("transform called"); return nil, nil }))
	require.NoError(t, i.SetWatchErrorHandler(func(*cache.Reflector, error) {}))
	require.False(t, i.HasSynced())
	require.False(t, i.IsStopped())
	w.put(pod("n", "a", "Running"))
	bad := make(chan struct{})
	_, err := i.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: func(any) { defer close(bad); panic("handler") }})
	require.NoError(t, err)
	stop := start(t, i)
	await(t, "panic", bad)
	await(t, "informer", i.HasSyncedChecker().Done())
	require.Error(t, i.SetTransform(nil), "already started")
	require.Error(t, i.SetWatchErrorHandlerWithContext(nil))
	i.Run(nil) // a second run warns and returns
	stop()
	require.True(t, i.IsStopped())
	_, err = i.AddEventHandler(newJournal())
	require.ErrorContains(t, err, "stopped already")
	require.Error(t, i.AddIndexers(cache.Indexers{"x": byPhase}))
	_, ok, err := i.GetStore().GetByKey("n/a")
	require.NoError(t, err)
	require.True(t, ok, "a lister goes on")
}

// Stop returns only when no handler runs any more.
func TestStopWaitsForHandlers(t *testing.T) {
	w := newWorld(t, 0)
	i := NewFactory(Options{Tables: w}).Core().V1().Pods().Informer()
	entered, leave := make(chan struct{}), make(chan struct{})
	_, err := i.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: func(any) { close(entered); <-leave }})
	require.NoError(t, err)
	w.put(pod("n", "a", "Running"))
	w.put(pod("n", "b", "Running"))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); i.RunWithContext(ctx) }()
	await(t, "handler", entered)
	cancel()
	select {
	case <-ended:
		require.Fail(t, "ended while a handler runs")
	case <-time.After(20 * time.Millisecond):
	}
	close(leave)
	await(t, "end", ended) // and "b" was not delivered: close(entered) would have panicked
}

func TestMutationCache(t *testing.T) {
	w := newWorld(t, 0)
	i := NewFactory(Options{Tables: w}).Core().V1().Pods().Informer()
	mc := cache.NewIntegerResourceVersionMutationCache(klog.Background(), i.GetStore(), i.GetIndexer(), time.Minute, true)
	rec := w.put(pod("n", "a", "Running"))
	newer := pod("n", "a", "Failed")
	newer.ResourceVersion = strconv.FormatInt(rec.Revision+5, 10)
	mc.Mutation(newer)
	got, ok, err := mc.GetByKey("n/a")
	require.NoError(t, err)
	require.True(t, ok)
	require.Same(t, newer, got)
	for range 6 {
		w.put(pod("n", "a", "Running"))
	}
	got, _, err = mc.GetByKey("n/a")
	require.NoError(t, err)
	require.Equal(t, corev1.PodRunning, got.(*corev1.Pod).Status.Phase, "the store has overtaken the mutation")
	in, err := mc.ByIndex(cache.NamespaceIndex, "n")
	require.NoError(t, err)
	require.Len(t, in, 1)
}

// An informer of a version other than the stored one converts what it shows, when it shows it.
func TestOtherVersion(t *testing.T) {
	w := newWorld(t, 0)
	var asked []schema.GroupVersion
	f := NewFactory(Options{Tables: w, Convert: func(obj runtime.Object, gv schema.GroupVersion) (runtime.Object, error) {
		asked = append(asked, gv)
		in := obj.(*autoscalingv2.HorizontalPodAutoscaler)
		if in.Name == "bad" {
			return nil, errors.New("cannot")
		}
		return &autoscalingv1.HorizontalPodAutoscaler{ObjectMeta: in.ObjectMeta, Spec: autoscalingv1.HorizontalPodAutoscalerSpec{MaxReplicas: in.Spec.MaxReplicas}}, nil
	}})
	w.put(&autoscalingv2.HorizontalPodAutoscaler{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "a"}, Spec: autoscalingv2.HorizontalPodAutoscalerSpec{MaxReplicas: 7}})
	w.put(&autoscalingv2.HorizontalPodAutoscaler{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "bad"}})
	require.Empty(t, asked)
	got, err := f.Autoscaling().V1().HorizontalPodAutoscalers().Lister().List(labels.Everything())
	require.NoError(t, err)
	require.Len(t, got, 1, "what cannot be converted is logged and not shown")
	require.EqualValues(t, 7, got[0].Spec.MaxReplicas)
	require.Equal(t, autoscalingv1.SchemeGroupVersion, asked[0])
	same, err := f.Autoscaling().V2().HorizontalPodAutoscalers().Lister().HorizontalPodAutoscalers("n").Get("a")
	require.NoError(t, err)
	require.EqualValues(t, 7, same.Spec.MaxReplicas)
}

// A type that nobody serves is an informer that waits, as a list that is answered with 404 for ever would.
func TestUnservedType(t *testing.T) {
	i := NewFactory(Options{Tables: newWorld(t, 0)}).Scheduling().V1().PriorityClasses().Informer()
	start(t, i)
	require.Empty(t, i.GetStore().List())
	require.False(t, i.HasSynced())
}
