package api

import (
	"reflect"

	apiextensionsserver "k8s.io/apiextensions-apiserver/pkg/apiserver"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	aggregatorscheme "k8s.io/kube-aggregator/pkg/apiserver/scheme"
	"k8s.io/kubernetes/pkg/api/legacyscheme"

	"knarr/store"
)

// Tables shows a registry to in-process readers: which table holds the objects of a Go type or of a resource.
type Tables struct{ registry *Registry }

// Tables gives the readers' view.
func (r *Registry) Tables() *Tables { return &Tables{r} }

// ForObject finds the table of a Go type and the resource that the type stands for.
func (t *Tables) ForObject(obj runtime.Object) (*store.Table, schema.GroupVersionResource, bool) {
	gvk, ok := kindOf(obj)
	if !ok {
		return nil, schema.GroupVersionResource{}, false
	}
	for _, k := range t.registry.Kinds() {
		if k.Stored.Kind == gvk.Kind && k.Resource.Group == gvk.Group {
			return k.Table, k.Resource.WithVersion(gvk.Version), true
		}
	}
	if len(gvk.Kind) == 0 {
		return nil, schema.GroupVersionResource{}, false
	}
	resource, _ := meta.UnsafeGuessKindToResource(gvk)
	return nil, resource, true
}

// kindOf finds the versioned kind of a Go type in the three schemes.
func kindOf(obj runtime.Object) (schema.GroupVersionKind, bool) {
	for _, scheme := range []*runtime.Scheme{legacyscheme.Scheme, apiextensionsserver.Scheme, aggregatorscheme.Scheme} {
		kinds, _, err := scheme.ObjectKinds(reflect.New(reflect.TypeOf(obj).Elem()).Interface().(runtime.Object))
		if err == nil && len(kinds) > 0 {
			return kinds[0], true
		}
	}
	return schema.GroupVersionKind{}, false
}

// ForResource finds the table of a resource, whatever version is asked for.
func (t *Tables) ForResource(gvr schema.GroupVersionResource) (*store.Table, bool) {
	k := t.registry.Kind(gvr.GroupResource())
	if k == nil {
		return nil, false
	}
	return k.Table, true
}

// Changed gives a channel that is closed the next time that a table comes or goes.
func (t *Tables) Changed() <-chan struct{} { return t.registry.Changed() }

// Revision is the newest published revision of the store.
func (t *Tables) Revision() int64 { return t.registry.store.Revision() }

// Convert gives a private copy of a built-in object in another version of its group. Versions know only the internal one
// that all share, so the way leads through it.
func Convert(obj runtime.Object, gv schema.GroupVersion) (runtime.Object, error) {
	return convertThroughHub(legacyscheme.Scheme, obj, gv)
}
