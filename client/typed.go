package client

import (
	"fmt"
	"reflect"
	"sync"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/informers/internalinterfaces"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

// factory is client-go's SharedInformerFactory over tables.
type factory struct {
	typedSet
	groups
	types typesByResource
}

var _ informers.SharedInformerFactory = (*factory)(nil)

// NewFactory makes client-go's informers of the built-in kinds over the store's tables.
func NewFactory(o Options) informers.SharedInformerFactory {
	f := &factory{typedSet: typedSet{newInformerSet[reflect.Type](o)}}
	f.groups = groups{f, o.Namespace, o.Tweak}
	return f
}

// InformerFor implements informers.SharedInformerFactory. constructor is not used to make anything; it only says, where it is not the
// generated one, what its informer would have selected.
func (f *factory) InformerFor(obj runtime.Object, constructor internalinterfaces.NewInformerFunc) cache.SharedIndexInformer {
	return f.forObject(obj, constructor, func(c *rest.Config) (cache.SharedIndexInformer, error) {
		cs, err := kubernetes.NewForConfig(c)
		if err != nil {
			return nil, err
		}
		return constructor(cs, f.options.Resync), nil
	})
}

// ForResource implements informers.SharedInformerFactory.
func (f *factory) ForResource(gvr schema.GroupVersionResource) (informers.GenericInformer, error) {
	obj := f.types.object(gvr)
	if obj == nil {
		return nil, fmt.Errorf("no informer found for %v", gvr)
	}
	i := f.get(reflect.TypeOf(obj), func() cache.SharedIndexInformer {
		return f.options.typedInformer(obj, scopeOf(f.options.Namespace, f.options.Tweak), cache.Indexers{cache.NamespaceIndex: cache.MetaNamespaceIndexFunc})
	})
	return genericInformer{i, gvr.GroupResource()}, nil
}

// genericInformer implements informers.GenericInformer.
type genericInformer struct {
	informer cache.SharedIndexInformer
	resource schema.GroupResource
}

func (g genericInformer) Informer() cache.SharedIndexInformer { return g.informer }
func (g genericInformer) Lister() cache.GenericLister {
	return cache.NewGenericLister(g.informer.GetIndexer(), g.resource)
}

// typesByResource finds the Go type of a built-in resource. Filled at the first question.
type typesByResource struct {
	once  sync.Once
	types map[schema.GroupVersionResource]reflect.Type
}

// object returns a new, empty object of the resource's type; nil if client-go has no such type.
func (t *typesByResource) object(gvr schema.GroupVersionResource) runtime.Object {
	t.once.Do(t.fill)
	typ := t.types[gvr]
	if typ == nil {
		return nil
	}
	obj, _ := reflect.New(typ).Interface().(runtime.Object)
	return obj
}

// fill takes every kind that has a list kind and metadata; client-go's own naming rule gives the resource.
func (t *typesByResource) fill() {
	t.types = map[schema.GroupVersionResource]reflect.Type{}
	all := scheme.Scheme.AllKnownTypes()
	for gvk, typ := range all {
		if _, ok := all[gvk.GroupVersion().WithKind(gvk.Kind+"List")]; !ok {
			continue
		}
		if _, ok := reflect.New(typ).Interface().(metav1.ObjectMetaAccessor); ok {
			plural, _ := meta.UnsafeGuessKindToResource(gvk)
			t.types[plural] = typ
		}
	}
}
