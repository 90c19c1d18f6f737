package api

import (
	"context"
	"fmt"
	"sync"

	apiextensions "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	apiextensionsserver "k8s.io/apiextensions-apiserver/pkg/apiserver"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/apiserver/pkg/registry/generic"
	serveroptions "k8s.io/apiserver/pkg/server/options"
	serverstorage "k8s.io/apiserver/pkg/server/storage"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/storagebackend"
	"k8s.io/apiserver/pkg/storage/storagebackend/factory"
	"k8s.io/apiserver/pkg/storage/value"
	"k8s.io/client-go/tools/cache"
	"k8s.io/kube-aggregator/pkg/apis/apiregistration"
	aggregatorscheme "k8s.io/kube-aggregator/pkg/apiserver/scheme"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	"k8s.io/kubernetes/pkg/controlplane"
	"k8s.io/kubernetes/pkg/kubeapiserver"

	"knarr/store"
)

// Registry makes the kinds: upstream's REST storage types ask it for storage, one resource at a time, and it opens
// the resource's table. It is safe for concurrent use; custom resources come and go while requests run.
type Registry struct {
	store        *store.Store
	factory      *serverstorage.DefaultStorageFactory
	resources    *serverstorage.ResourceConfig
	transformers func(schema.GroupResource) value.Transformer // never nil

	mu      sync.RWMutex
	kinds   map[schema.GroupResource]*Kind // guarded by mu
	changed chan struct{}                  // guarded by mu; closed and replaced when kinds grows
}

// NewRegistry prepares a registry over a store. transformers gives what encrypts the values of a resource, nil where nothing does; it
// may be nil itself.
func NewRegistry(s *store.Store, transformers func(schema.GroupResource) value.Transformer) (*Registry, error) {
	if transformers == nil {
		transformers = func(schema.GroupResource) value.Transformer { return nil }
	}
	resources := controlplane.DefaultAPIResourceConfigSource()
	config := kubeapiserver.NewStorageFactoryConfig()
	config.APIResourceConfig = resources
	etcd := serveroptions.NewEtcdOptions(storagebackend.NewDefaultConfig(KeyRoot, nil))
	etcd.DefaultStorageMediaType = runtime.ContentTypeProtobuf
	f, err := config.Complete(etcd).New()
	if err != nil {
		return nil, err
	}
	return &Registry{
		store:        s,
		factory:      f,
		resources:    resources,
		transformers: transformers,
		kinds:        map[schema.GroupResource]*Kind{},
		changed:      make(chan struct{}),
	}, nil
}

// Shared reports whether other servers write the same store.
func (r *Registry) Shared() bool { return r.store.Shared() }

// Kind gives the kind of a resource, nil if there is none.
func (r *Registry) Kind(resource schema.GroupResource) *Kind {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.kinds[resource]
}

// Kinds lists all kinds, in no order.
func (r *Registry) Kinds() []*Kind {
	r.mu.RLock()
	defer r.mu.RUnlock()
	out := make([]*Kind, 0, len(r.kinds))
	for _, k := range r.kinds {
		out = append(out, k)
	}
	return out
}

// Changed gives a channel that is closed at the next change of the set of kinds.
func (r *Registry) Changed() <-chan struct{} {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.changed
}

// Forget drops a custom resource's kind after its definition is gone.
func (r *Registry) Forget(resource schema.GroupResource) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.kinds[resource]; ok {
		delete(r.kinds, resource)
		r.announce()
	}
}

func (r *Registry) announce() {
	close(r.changed)
	r.changed = make(chan struct{})
}

// GetRESTOptions implements generic.RESTOptionsGetter: the seam between upstream's REST storage and our store.
func (r *Registry) GetRESTOptions(resource schema.GroupResource, example runtime.Object) (generic.RESTOptions, error) {
	opts := generic.RESTOptions{
		Decorator:               r.decorate,
		EnableGarbageCollection: true,
		DeleteCollectionWorkers: 1,
	}
	if codecs, ok := codecsOf(resource.Group); ok {
		version := schema.GroupVersion{Group: resource.Group, Version: "v1"}
		opts.ResourcePrefix = "/" + resource.Group + "/" + resource.Resource
		opts.StorageConfig = storagebackend.NewDefaultConfig(KeyRoot, codecs.LegacyCodec(version)).ForResource(resource) // dry runs use the codec
		opts.StorageConfig.EncodeVersioner = version
		return opts, nil
	}
	config, err := r.factory.NewConfig(resource, example)
	if err != nil {
		return opts, fmt.Errorf("find the storage version of %s: %w", resource, err)
	}
	opts.StorageConfig = config
	opts.ResourcePrefix = "/" + r.factory.ResourcePrefix(resource)
	return opts, nil
}

// codecsOf gives the codecs of a group that is not in the scheme of the other built-in groups.
func codecsOf(group string) (serializer.CodecFactory, bool) {
	switch group {
	case apiextensions.GroupName:
		return apiextensionsserver.Codecs, true
	case apiregistration.GroupName:
		return aggregatorscheme.Codecs, true
	}
	return serializer.CodecFactory{}, false
}

// CustomResources is the registry as upstream's handler of custom resources asks it.
func (r *Registry) CustomResources() generic.RESTOptionsGetter { return customGetter{r} }

// customGetter gives the storage of custom resources: plain JSON under the key prefix that upstream uses.
type customGetter struct{ registry *Registry }

// GetRESTOptions implements generic.RESTOptionsGetter.
func (g customGetter) GetRESTOptions(resource schema.GroupResource, _ runtime.Object) (generic.RESTOptions, error) {
	config := storagebackend.NewDefaultConfig(KeyRoot, unstructured.UnstructuredJSONScheme)
	return generic.RESTOptions{
		StorageConfig:           config.ForResource(resource),
		Decorator:               g.registry.decorate,
		EnableGarbageCollection: true,
		DeleteCollectionWorkers: 1,
		ResourcePrefix:          "/" + resource.Group + "/" + resource.Resource,
	}, nil
}

func isUnstructured(example runtime.Object) bool {
	_, ok := example.(*unstructured.Unstructured)
	return ok
}

// decorate is the generic.StorageDecorator that puts our Storage under a REST storage type.
func (r *Registry) decorate(config *storagebackend.ConfigForResource, resourcePrefix string, _ func(runtime.Object) (string, error),
	newFunc, newListFunc func() runtime.Object, attrs storage.AttrFunc, _ storage.IndexerFuncs, _ *cache.Indexers,
) (storage.Interface, factory.DestroyFunc, error) {
	kind, err := r.open(config, resourcePrefix, newFunc(), attrs)
	if err != nil {
		return nil, nil, err
	}
	return NewStorage(kind, newFunc, newListFunc), func() {}, nil
}

// open makes the kind of a resource and opens its table, for everybody to find.
func (r *Registry) open(config *storagebackend.ConfigForResource, resourcePrefix string, example runtime.Object, attrs storage.AttrFunc) (*Kind, error) {
	kind, err := r.openAlone(config, resourcePrefix, example, attrs)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if old := r.kinds[kind.Resource]; old == nil || old.Stored != kind.Stored {
		r.kinds[kind.Resource] = kind
		r.announce()
	}
	return kind, nil
}

// openAlone is open for a kind that only the caller knows.
func (r *Registry) openAlone(config *storagebackend.ConfigForResource, resourcePrefix string, example runtime.Object, attrs storage.AttrFunc) (*Kind, error) {
	kind := &Kind{Resource: config.GroupResource, store: r.store, prefix: KeyRoot + resourcePrefix + "/", attrs: attrs,
		transformer: r.transformers(config.GroupResource)}
	codec := &tableCodec{transformer: kind.transformer}
	kind.codec = codec
	if isUnstructured(example) {
		kind.Stored = example.GetObjectKind().GroupVersionKind()
		kind.form = newCodecForm(config.Codec, kind.Stored)
		codec.encode = func(obj runtime.Object) ([]byte, error) { return obj.(*unstructured.Unstructured).MarshalJSON() }
		codec.decode = decodeUnstructured
	} else if err := bindScheme(kind, codec, config, example); err != nil {
		return nil, err
	}
	table, err := r.store.OpenTable(context.Background(), store.TableOptions{Prefix: kind.prefix, Codec: codec, Class: classOf(config.GroupResource)})
	if err != nil {
		return nil, fmt.Errorf("open the table of %s: %w", config.GroupResource, err)
	}
	kind.Table = table
	return kind, nil
}

// bindScheme sets up a kind whose types live in one of the three schemes.
func bindScheme(kind *Kind, codec *tableCodec, config *storagebackend.ConfigForResource, example runtime.Object) error {
	scheme, deserializer, binary := schemeOf(config.GroupResource.Group)
	kinds, _, err := scheme.ObjectKinds(example)
	if err != nil {
		return err
	}
	stored, ok := config.EncodeVersioner.KindForGroupVersionKinds(kinds)
	if !ok {
		return fmt.Errorf("no storage version for %v", kinds)
	}
	kind.Stored = stored
	codec.decode = decodeInto(scheme, deserializer, stored)
	var s runtime.Serializer = json.NewSerializerWithOptions(json.DefaultMetaFactory, scheme, scheme, json.SerializerOptions{})
	if binary {
		s = protobuf.NewSerializer(scheme, scheme)
	}
	codec.encode = encoder(s)
	kind.form = &hubForm{scheme: scheme, stored: stored, hub: kinds[0].GroupVersion(), binary: binary, encode: codec.encode, decode: codec.decode}
	return nil
}

// schemeOf gives the scheme of a group, its decoder, and whether upstream stores the group as protobuf.
func schemeOf(group string) (*runtime.Scheme, runtime.Decoder, bool) {
	switch group {
	case apiextensions.GroupName:
		return apiextensionsserver.Scheme, apiextensionsserver.Codecs.UniversalDeserializer(), false
	case apiregistration.GroupName:
		return aggregatorscheme.Scheme, aggregatorscheme.Codecs.UniversalDeserializer(), false
	}
	return legacyscheme.Scheme, legacyscheme.Codecs.UniversalDeserializer(), true
}

// classOf says which resources may lose their last writes to a power cut.
func classOf(resource schema.GroupResource) store.Class {
	switch resource {
	case schema.GroupResource{Resource: "events"}, schema.GroupResource{Group: "events.k8s.io", Resource: "events"},
		schema.GroupResource{Group: "coordination.k8s.io", Resource: "leases"}:
		return store.Lossy
	}
	return store.Durable
}

// Resources says which built-in resources are served.
func (r *Registry) Resources() *serverstorage.ResourceConfig { return r.resources }
