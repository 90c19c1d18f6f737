package client

import (
	"context"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/metadata/metadatainformer"
	"k8s.io/client-go/tools/cache"

	"knarr/store"
)

// resourceFactory is a factory of informers by resource: metadatainformer.SharedInformerFactory and
// dynamicinformer.DynamicSharedInformerFactory over tables.
type resourceFactory struct {
	*informerSet[schema.GroupVersionResource]
	project  func(runtime.Object) (runtime.Object, error)
	fallback func(gvr schema.GroupVersionResource) cache.SharedIndexInformer // nil: none
}

var (
	_ metadatainformer.SharedInformerFactory       = (*resourceFactory)(nil)
	_ dynamicinformer.DynamicSharedInformerFactory = (*resourceFactory)(nil)
)

// NewMetadataFactory makes informers of PartialObjectMetadata over the tables of all resources. A resource that has no table when it is first
// asked for gets its informer from fallback (aggregated APIs keep their objects elsewhere); if fallback is nil or returns nil, the informer
// waits for the table to come.
func NewMetadataFactory(o Options, fallback func(gvr schema.GroupVersionResource) cache.SharedIndexInformer) metadatainformer.SharedInformerFactory {
	return &resourceFactory{informerSet: newInformerSet[schema.GroupVersionResource](o), project: metadataOf, fallback: fallback}
}

// NewDynamicFactory makes informers of whole objects by resource: the store's own objects, so *unstructured.Unstructured for custom resources
// and the Go types for built-in ones.
func NewDynamicFactory(o Options) dynamicinformer.DynamicSharedInformerFactory {
	return &resourceFactory{informerSet: newInformerSet[schema.GroupVersionResource](o)}
}

// ForResource implements the two interfaces.
func (f *resourceFactory) ForResource(gvr schema.GroupVersionResource) informers.GenericInformer {
	i := f.get(gvr, func() cache.SharedIndexInformer {
		if _, ok := f.options.Tables.ForResource(gvr); !ok && f.fallback != nil {
			if i := f.fallback(gvr); i != nil {
				return i
			}
		}
		return f.options.resourceInformer(gvr, f.project)
	})
	return genericInformer{i, gvr.GroupResource()}
}

// resourceInformer makes an informer of a resource.
func (o *Options) resourceInformer(gvr schema.GroupVersionResource, project func(runtime.Object) (runtime.Object, error)) cache.SharedIndexInformer {
	tables := o.Tables
	f := filter{namespace: o.Namespace}
	if o.Tweak != nil {
		sc := scopeOf(o.Namespace, o.Tweak)
		var err error
		if f, err = newFilter(sc, MetadataFields, nil); err != nil {
			panic("client: informer of " + gvr.String() + ": " + err.Error()) // a programming error: selectors come from code
		}
	}
	src := source{revision: tables.Revision, changed: tables.Changed, locate: func() *store.Table {
		t, _ := tables.ForResource(gvr)
		return t
	}}
	indexers := cache.Indexers{cache.NamespaceIndex: cache.MetaNamespaceIndexFunc}
	return newInformer(newView(gvr.GroupResource().String(), src, f, project, indexers), o.Resync)
}

// WaitForCacheSync implements the two interfaces.
func (f *resourceFactory) WaitForCacheSync(stop <-chan struct{}) map[schema.GroupVersionResource]bool {
	return f.wait(wait.ContextForChannel(stop))
}

// WaitForCacheSyncWithContext is WaitForCacheSync with a context.
func (f *resourceFactory) WaitForCacheSyncWithContext(ctx context.Context) map[schema.GroupVersionResource]bool {
	return f.wait(ctx)
}
