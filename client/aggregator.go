package client

import (
	"fmt"
	"reflect"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	clientset "k8s.io/kube-aggregator/pkg/client/clientset_generated/clientset"
	"k8s.io/kube-aggregator/pkg/client/informers/externalversions"
	"k8s.io/kube-aggregator/pkg/client/informers/externalversions/apiregistration"
	"k8s.io/kube-aggregator/pkg/client/informers/externalversions/internalinterfaces"
)

// aggregatorFactory is the factory of informers of APIServices.
type aggregatorFactory struct{ typedSet }

var _ externalversions.SharedInformerFactory = (*aggregatorFactory)(nil)

// NewAggregatorFactory makes informers of APIServices over the store's tables.
func NewAggregatorFactory(o Options) externalversions.SharedInformerFactory {
	return &aggregatorFactory{typedSet{newInformerSet[reflect.Type](o)}}
}

// InformerFor implements externalversions.SharedInformerFactory; see factory.InformerFor.
func (f *aggregatorFactory) InformerFor(obj runtime.Object, constructor internalinterfaces.NewInformerFunc) cache.SharedIndexInformer {
	return f.forObject(obj, constructor, func(c *rest.Config) (cache.SharedIndexInformer, error) {
		cs, err := clientset.NewForConfig(c)
		if err != nil {
			return nil, err
		}
		return constructor(cs, f.options.Resync), nil
	})
}

// ForResource implements externalversions.SharedInformerFactory.
func (f *aggregatorFactory) ForResource(gvr schema.GroupVersionResource) (externalversions.GenericInformer, error) {
	if gvr.Resource != "apiservices" {
		return nil, fmt.Errorf("no informer found for %v", gvr)
	}
	switch gvr.Version {
	case "v1":
		return genericInformer{f.Apiregistration().V1().APIServices().Informer(), gvr.GroupResource()}, nil
	case "v1beta1":
		return genericInformer{f.Apiregistration().V1beta1().APIServices().Informer(), gvr.GroupResource()}, nil
	}
	return nil, fmt.Errorf("no informer found for %v", gvr)
}

// Apiregistration implements externalversions.SharedInformerFactory.
func (f *aggregatorFactory) Apiregistration() apiregistration.Interface {
	return apiregistration.New(f, f.options.Namespace, f.options.Tweak)
}
