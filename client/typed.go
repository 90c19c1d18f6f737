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
	"k8s.io/client-go/informers/admissionregistration"
	"k8s.io/client-go/informers/apiserverinternal"
	"k8s.io/client-go/informers/apps"
	"k8s.io/client-go/informers/autoscaling"
	"k8s.io/client-go/informers/batch"
	"k8s.io/client-go/informers/certificates"
	"k8s.io/client-go/informers/coordination"
	"k8s.io/client-go/informers/core"
	"k8s.io/client-go/informers/discovery"
	"k8s.io/client-go/informers/events"
	"k8s.io/client-go/informers/extensions"
	"k8s.io/client-go/informers/flowcontrol"
	"k8s.io/client-go/informers/internalinterfaces"
	"k8s.io/client-go/informers/networking"
	"k8s.io/client-go/informers/node"
	"k8s.io/client-go/informers/policy"
	"k8s.io/client-go/informers/rbac"
	"k8s.io/client-go/informers/resource"
	"k8s.io/client-go/informers/scheduling"
	"k8s.io/client-go/informers/storage"
	"k8s.io/client-go/informers/storagemigration"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

// factory is client-go's SharedInformerFactory over tables.
type factory struct {
	typedSet
	types typesByResource
}

var _ informers.SharedInformerFactory = (*factory)(nil)

// NewFactory makes client-go's informers of the built-in kinds over the store's tables.
func NewFactory(o Options) informers.SharedInformerFactory {
	return &factory{typedSet: typedSet{newInformerSet[reflect.Type](o)}}
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

// tweak has the type that the generated code wants.
func (f *factory) tweak() internalinterfaces.TweakListOptionsFunc {
	if f.options.Tweak == nil {
		return nil
	}
	return f.options.Tweak
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

// Admissionregistration implements informers.SharedInformerFactory.
func (f *factory) Admissionregistration() admissionregistration.Interface {
	return admissionregistration.New(f, f.options.Namespace, f.tweak())
}

// Internal implements informers.SharedInformerFactory.
func (f *factory) Internal() apiserverinternal.Interface {
	return apiserverinternal.New(f, f.options.Namespace, f.tweak())
}

// Apps implements informers.SharedInformerFactory.
func (f *factory) Apps() apps.Interface {
	return apps.New(f, f.options.Namespace, f.tweak())
}

// Autoscaling implements informers.SharedInformerFactory.
func (f *factory) Autoscaling() autoscaling.Interface {
	return autoscaling.New(f, f.options.Namespace, f.tweak())
}

// Batch implements informers.SharedInformerFactory.
func (f *factory) Batch() batch.Interface {
	return batch.New(f, f.options.Namespace, f.tweak())
}

// Certificates implements informers.SharedInformerFactory.
func (f *factory) Certificates() certificates.Interface {
	return certificates.New(f, f.options.Namespace, f.tweak())
}

// Coordination implements informers.SharedInformerFactory.
func (f *factory) Coordination() coordination.Interface {
	return coordination.New(f, f.options.Namespace, f.tweak())
}

// Core implements informers.SharedInformerFactory.
func (f *factory) Core() core.Interface {
	return core.New(f, f.options.Namespace, f.tweak())
}

// Discovery implements informers.SharedInformerFactory.
func (f *factory) Discovery() discovery.Interface {
	return discovery.New(f, f.options.Namespace, f.tweak())
}

// Events implements informers.SharedInformerFactory.
func (f *factory) Events() events.Interface {
	return events.New(f, f.options.Namespace, f.tweak())
}

// Extensions implements informers.SharedInformerFactory.
func (f *factory) Extensions() extensions.Interface {
	return extensions.New(f, f.options.Namespace, f.tweak())
}

// Flowcontrol implements informers.SharedInformerFactory.
func (f *factory) Flowcontrol() flowcontrol.Interface {
	return flowcontrol.New(f, f.options.Namespace, f.tweak())
}

// Networking implements informers.SharedInformerFactory.
func (f *factory) Networking() networking.Interface {
	return networking.New(f, f.options.Namespace, f.tweak())
}

// Node implements informers.SharedInformerFactory.
func (f *factory) Node() node.Interface {
	return node.New(f, f.options.Namespace, f.tweak())
}

// Policy implements informers.SharedInformerFactory.
func (f *factory) Policy() policy.Interface {
	return policy.New(f, f.options.Namespace, f.tweak())
}

// Rbac implements informers.SharedInformerFactory.
func (f *factory) Rbac() rbac.Interface {
	return rbac.New(f, f.options.Namespace, f.tweak())
}

// Resource implements informers.SharedInformerFactory.
func (f *factory) Resource() resource.Interface {
	return resource.New(f, f.options.Namespace, f.tweak())
}

// Scheduling implements informers.SharedInformerFactory.
func (f *factory) Scheduling() scheduling.Interface {
	return scheduling.New(f, f.options.Namespace, f.tweak())
}

// Storage implements informers.SharedInformerFactory.
func (f *factory) Storage() storage.Interface {
	return storage.New(f, f.options.Namespace, f.tweak())
}

// Storagemigration implements informers.SharedInformerFactory.
func (f *factory) Storagemigration() storagemigration.Interface {
	return storagemigration.New(f, f.options.Namespace, f.tweak())
}
