package client

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apiextensionsfake "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset"
	apiextensionsinformers "k8s.io/apiextensions-apiserver/pkg/client/informers/externalversions/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/tools/cache"
	apiregistrationv1 "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"
)

func TestMetadataViews(t *testing.T) {
	w := newWorld(t, 0)
	w.open(widgets.GroupResource())
	f := NewMetadataFactory(Options{Tables: w}, nil)
	pods, wids := f.ForResource(corev1.SchemeGroupVersion.WithResource("pods")), f.ForResource(widgets)
	rec := w.put(pod("n", "a", "Running", "app", "x"))
	w.put(widget("n", "w", "big"))

	got, err := pods.Lister().ByNamespace("n").Get("a")
	require.NoError(t, err)
	m := got.(*metav1.PartialObjectMetadata)
	require.Equal(t, "a", m.Name)
	require.Equal(t, rec.Object.(*corev1.Pod).ResourceVersion, m.ResourceVersion)
	m.Labels["shared"] = "yes" // the shell shares the map, which is why nobody may write to it
	require.Equal(t, "yes", rec.Object.(*corev1.Pod).Labels["shared"])
	delete(m.Labels, "shared")

	list, err := wids.Lister().List(labels.SelectorFromSet(labels.Set{"a": "b"}))
	require.NoError(t, err)
	require.Len(t, list, 1)
	require.EqualValues(t, "u-w", list[0].(*metav1.PartialObjectMetadata).UID)

	j := newJournal()
	_, err = wids.Informer().AddEventHandler(j)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	f.Start(ctx.Done())
	require.Equal(t, map[schema.GroupVersionResource]bool{widgets: true, corev1.SchemeGroupVersion.WithResource("pods"): true}, f.WaitForCacheSync(ctx.Done()))
	first := receive(t, j.lines)
	require.Contains(t, first, "add n/w(PartialObjectMetadata)")
	w.put(widget("n", "w", "small"))
	require.Contains(t, receive(t, j.lines), "update n/w(PartialObjectMetadata)")
	cancel()
	f.Shutdown()
}

func TestMetadataFactoryFallback(t *testing.T) {
	w := newWorld(t, 0)
	elsewhere := schema.GroupVersionResource{Group: "metrics.k8s.io", Version: "v1beta1", Resource: "pods"}
	other := cache.NewSharedIndexInformer(&cache.ListWatch{}, &metav1.PartialObjectMetadata{}, 0, nil)
	f := NewMetadataFactory(Options{Tables: w}, func(gvr schema.GroupVersionResource) cache.SharedIndexInformer {
		if gvr == elsewhere {
			return other
		}
		return nil
	})
	require.Same(t, other, f.ForResource(elsewhere).Informer())
	require.NotSame(t, other, f.ForResource(widgets).Informer(), "its table will come")
}

// Custom resources come, go and come back.
func TestTableComesAndGoes(t *testing.T) {
	w := newWorld(t, 0)
	i := NewDynamicFactory(Options{Tables: w}).ForResource(widgets).Informer()
	require.NoError(t, i.AddIndexers(cache.Indexers{"size": func(obj any) ([]string, error) {
		s, _, _ := unstructured.NestedString(obj.(*unstructured.Unstructured).Object, "size")
		return []string{s}, nil
	}}))
	j := newJournal()
	reg, err := i.AddEventHandler(j)
	require.NoError(t, err)
	start(t, i)
	require.False(t, i.HasSynced())
	require.Empty(t, i.GetStore().List())
	require.Empty(t, i.GetStore().LastStoreSyncResourceVersion())

	w.open(widgets.GroupResource())
	await(t, "informer", i.HasSyncedChecker().Done())
	await(t, "handler", reg.HasSyncedChecker().Done())
	a := w.put(widget("n", "a", "big")).Revision
	j.expect(t, at("add n/a(Unstructured)@%s initial=false", a))
	objs, err := i.GetIndexer().ByIndex("size", "big")
	require.NoError(t, err)
	require.Len(t, objs, 1)

	w.drop(widgets.GroupResource())
	j.expect(t, at("delete unknown n/a(Unstructured)@%s", a))
	require.Eventually(t, func() bool { return len(i.GetStore().List()) == 0 }, testTimeout, time.Millisecond)

	w.open(widgets.GroupResource())
	b := w.put(widget("n", "b", "big")).Revision
	j.expect(t, at("add n/b(Unstructured)@%s initial=false", b))
	keys, err := i.GetIndexer().IndexKeys("size", "big")
	require.NoError(t, err)
	require.Equal(t, []string{"n/b"}, keys)
}

func TestExtensionsAndAggregatorFactories(t *testing.T) {
	w := newWorld(t, 0)
	e, a := NewExtensionsFactory(Options{Tables: w}), NewAggregatorFactory(Options{Tables: w})
	w.put(&apiextensionsv1.CustomResourceDefinition{ObjectMeta: metav1.ObjectMeta{Name: "widgets.example.com"}})
	w.put(&apiregistrationv1.APIService{ObjectMeta: metav1.ObjectMeta{Name: "v1."}})
	crd, err := e.Apiextensions().V1().CustomResourceDefinitions().Lister().Get("widgets.example.com")
	require.NoError(t, err)
	require.Equal(t, "widgets.example.com", crd.Name)
	svc, err := a.Apiregistration().V1().APIServices().Lister().Get("v1.")
	require.NoError(t, err)
	require.Equal(t, "v1.", svc.Name)
	g, err := e.ForResource(apiextensionsv1.SchemeGroupVersion.WithResource("customresourcedefinitions"))
	require.NoError(t, err)
	require.Same(t, e.Apiextensions().V1().CustomResourceDefinitions().Informer(), g.Informer())
	_, err = a.ForResource(apiregistrationv1.SchemeGroupVersion.WithResource("apiservices"))
	require.NoError(t, err)
	_, err = e.ForResource(widgets)
	require.Error(t, err)
	hand := NewExtensionsFactory(Options{Tables: w}).InformerFor(&apiextensionsv1.CustomResourceDefinition{},
		func(cs apiextensionsfake.Interface, resync time.Duration) cache.SharedIndexInformer {
			return apiextensionsinformers.NewFilteredCustomResourceDefinitionInformer(cs, resync, nil,
				func(o *metav1.ListOptions) { o.FieldSelector = "metadata.name=other" })
		})
	require.Empty(t, hand.GetStore().List())
	ctx, cancel := context.WithCancel(context.Background())
	e.StartWithContext(ctx)
	a.StartWithContext(ctx)
	require.NoError(t, e.WaitForCacheSyncWithContext(ctx).AsError())
	require.NoError(t, a.WaitForCacheSyncWithContext(ctx).AsError())
	cancel()
	e.Shutdown()
	a.Shutdown()
}
