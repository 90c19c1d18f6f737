package client

import (
	"fmt"
	"reflect"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	clientset "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset"
	"k8s.io/apiextensions-apiserver/pkg/client/informers/externalversions"
	"k8s.io/apiextensions-apiserver/pkg/client/informers/externalversions/apiextensions"
	"k8s.io/apiextensions-apiserver/pkg/client/informers/externalversions/internalinterfaces"
)

// extensionsFactory is the factory of informers of CustomResourceDefinitions.
type extensionsFactory struct{ typedSet }

var _ externalversions.SharedInformerFactory = (*extensionsFactory)(nil)

// NewExtensionsFactory makes informers of CustomResourceDefinitions over the store's tables.
func NewExtensionsFactory(o Options) externalversions.SharedInformerFactory {
	return &extensionsFactory{typedSet{newInformerSet[reflect.Type](o)}}
}

// InformerFor implements externalversions.SharedInformerFactory; see factory.InformerFor.
func (f *extensionsFactory) InformerFor(obj runtime.Object, constructor internalinterfaces.NewInformerFunc) cache.SharedIndexInformer {
	return f.forObject(obj, constructor, func(c *rest.Config) (cache.SharedIndexInformer, error) {
		cs, err := clientset.NewForConfig(c)
		if err != nil {
			return nil, err
		}
		return constructor(cs, f.options.Resync), nil
	})
}

// ForResource implements externalversions.SharedInformerFactory.
func (f *extensionsFactory) ForResource(gvr schema.GroupVersionResource) (externalversions.GenericInformer, error) {
	if gvr.Resource != "customresourcedefinitions" {
		return nil, fmt.Errorf("no informer found for %v", gvr)
	}
	switch gvr.Version {
	case "v1":
		return genericInformer{f.Apiextensions().V1().CustomResourceDefinitions().Informer(), gvr.GroupResource()}, nil
	case "v1beta1":
		return genericInformer{f.Apiextensions().V1beta1().CustomResourceDefinitions().Informer(), gvr.GroupResource()}, nil
	}
	return nil, fmt.Errorf("no informer found for %v", gvr)
}

// Apiextensions implements externalversions.SharedInformerFactory.
func (f *extensionsFactory) Apiextensions() apiextensions.Interface {
	return apiextensions.New(f, f.options.Namespace, f.options.Tweak)
}
