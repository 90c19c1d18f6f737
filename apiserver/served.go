package apiserver

import (
	"net/http"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	apiextensionshelpers "k8s.io/apiextensions-apiserver/pkg/apihelpers"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	structuralschema "k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	listers "k8s.io/apiextensions-apiserver/pkg/client/listers/apiextensions/v1"
	"k8s.io/apiextensions-apiserver/pkg/controller/finalizer"
	"k8s.io/apiextensions-apiserver/pkg/registry/customresource"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apiserver/pkg/endpoints/handlers"
	"k8s.io/apiserver/pkg/registry/rest"

	"knarr/api"
	"knarr/apiserver/structural"
)

// served is what is known of one definition's instances in the version that is stored, as upstream's handler serves them. It is immutable.
type served struct {
	// uid and revision name the definition that this is true of; with any other it is of no use.
	uid      types.UID
	revision string
	// kind is nil where only upstream's handler knows how to serve the instances.
	kind       *api.Kind
	listKind   string
	namespaced bool
	storage    *customresource.REST
	scope      *handlers.RequestScope
	// main and status are how the instances are written; status is nil where it is not written apart.
	main, status *hot
	// schema is what the instances are made of.
	schema *structural.Schema
	// closed says that there are to be no new instances, fresh until when upstream's handler holds them up for the sake of other servers.
	closed bool
	fresh  time.Time
}

// is says whether this is about the definition as it is.
func (s *served) is(crd *apiextensionsv1.CustomResourceDefinition) bool {
	return s != nil && s.uid == crd.UID && s.revision == crd.ResourceVersion
}

// crdHandler is upstream's handler of custom resources.
type crdHandler interface {
	http.Handler
	GetCustomResourceListerCollectionDeleter(*apiextensionsv1.CustomResourceDefinition) (finalizer.ListerCollectionDeleter, error)
}

// servedResources finds how the instances of definitions are served. What it gives is true of the definition that readers of the store see at the
// moment of the call: a change of it switches from one answer to another, none of which is older.
type servedResources struct {
	upstream crdHandler
	lister   listers.CustomResourceDefinitionLister
	// gone is told of kinds that are no more in use; it may be nil.
	gone func(*api.Kind)
	// elsewhere says that another server has a group version; nil: none has.
	elsewhere func(schema.GroupVersion) bool

	mu    sync.RWMutex
	known map[string]*served // guarded by mu; by the definition's name
}

// find gives how a resource is served in a version; nil where upstream's handler must answer.
func (r *servedResources) find(group, version, resource string) *served {
	crd, s := r.peek(group, resource)
	if crd != nil && s == nil {
		s = r.learn(crd)
	}
	return r.in(s, version)
}

// remembered is find for who must not wait: it gives nil also for what nobody has asked for yet.
func (r *servedResources) remembered(group, version, resource string) *served {
	_, s := r.peek(group, resource)
	return r.in(s, version)
}

// in gives what is served if that is the version, and here.
func (r *servedResources) in(s *served, version string) *served {
	if s == nil || s.kind == nil || s.kind.Stored.Version != version || r.elsewhere != nil && r.elsewhere(s.kind.Stored.GroupVersion()) {
		return nil
	}
	return s
}

// peek gives the definition of a resource and what is known of it.
func (r *servedResources) peek(group, resource string) (*apiextensionsv1.CustomResourceDefinition, *served) {
	name := resource + "." + group
	crd, err := r.lister.Get(name)
	if err != nil {
		return nil, nil
	}
	r.mu.RLock()
	s := r.known[name]
	r.mu.RUnlock()
	if !s.is(crd) {
		return crd, nil
	}
	return crd, s
}

// learn asks upstream's handler how it serves a definition's instances, and remembers it.
func (r *servedResources) learn(crd *apiextensionsv1.CustomResourceDefinition) *served {
	s := &served{uid: crd.UID, revision: crd.ResourceVersion}
	if isServedAsStored(crd) && !r.fill(s, crd) {
		return nil // upstream's handler does not know of the definition's newest form yet
	}
	r.mu.Lock()
	old := r.known[crd.Name]
	r.known[crd.Name] = s
	r.mu.Unlock()
	r.dropped(old, s)
	return s
}

// forget drops what is known of a definition that is gone.
func (r *servedResources) forget(crd *apiextensionsv1.CustomResourceDefinition) {
	r.mu.Lock()
	old := r.known[crd.Name]
	delete(r.known, crd.Name)
	r.mu.Unlock()
	r.dropped(old, nil)
}

func (r *servedResources) dropped(old, s *served) {
	if r.gone != nil && old != nil && old.kind != nil && (s == nil || s.kind != old.kind) {
		r.gone(old.kind)
	}
}

// isServedAsStored tells definitions whose instances are served, without a warning, in the version in which they are stored.
func isServedAsStored(crd *apiextensionsv1.CustomResourceDefinition) bool {
	if !apiextensionshelpers.IsCRDConditionTrue(crd, apiextensionsv1.NamesAccepted) && !isEstablished(crd) {
		return false
	}
	at := slices.IndexFunc(crd.Spec.Versions, func(v apiextensionsv1.CustomResourceDefinitionVersion) bool { return v.Storage })
	return at >= 0 && crd.Spec.Versions[at].Served && !crd.Spec.Versions[at].Deprecated && !crd.Spec.PreserveUnknownFields
}

// fill gathers what upstream's handler has made of the definition; false where it has made it of another form of it, or keeps it in a way that
// we do not know.
func (r *servedResources) fill(s *served, crd *apiextensionsv1.CustomResourceDefinition) bool {
	made, err := r.upstream.GetCustomResourceListerCollectionDeleter(crd)
	if err != nil {
		return false
	}
	storage, ok := made.(*customresource.REST)
	if !ok {
		return false
	}
	below, ok := storage.Storage.Storage.(*api.Storage)
	if !ok {
		return false
	}
	info, ok := infoOf(r.upstream, crd.UID)
	if !ok || info.storages[below.Kind().Stored.Version].CustomResource != storage || !info.isOf(crd) {
		return false
	}
	s.listKind = crd.Status.AcceptedNames.ListKind
	s.namespaced, s.storage = crd.Spec.Scope == apiextensionsv1.NamespaceScoped, storage
	version := below.Kind().Stored.Version
	if s.scope = info.scopes[version]; s.scope == nil {
		return true
	}
	s.kind, s.schema = below.Kind(), schemaOf(storage)
	s.kind.Trust(s.schema.Holds)
	s.main = s.hot(storage, s.scope)
	if status := info.storages[version].Status; status != nil && info.status[version] != nil {
		s.status = s.hot(statusStorage{status}, info.status[version])
	}
	s.closed = apiextensionshelpers.IsCRDConditionTrue(crd, apiextensionsv1.Terminating)
	if c := apiextensionshelpers.FindCRDCondition(crd, apiextensionsv1.Established); c != nil {
		s.fresh = c.LastTransitionTime.Add(justEstablished)
	}
	return true
}

// justEstablished is how long after a definition is established its instances are held up, so that no other server lacks it still.
// Source: serveResource in k8s.io/apiextensions-apiserver/pkg/apiserver/customresource_handler.go.
const justEstablished = 2 * time.Second

// statusStorage is upstream's storage of statuses, which has nothing to end.
type statusStorage struct{ *customresource.StatusREST }

// Destroy implements rest.Storage.
func (statusStorage) Destroy() {}

func (s *served) hot(storage rest.Storage, scope *handlers.RequestScope) *hot {
	return &hot{hotName: hotName{scope.Resource, scope.Subresource}, kind: s.kind, hub: s.kind.Stored.GroupVersion(), storage: storage, scope: scope,
		namespaced: s.namespaced, custom: s}
}

// takesNew says whether instances may be made by our own path.
func (s *served) takesNew() bool {
	return !s.closed && (!s.kind.Shared() || time.Now().After(s.fresh))
}

// schemaOf is the structural schema that upstream's storage of instances prunes by, which it keeps to itself; nil where it has none that we find. Then nothing
// is known of any instance.
func schemaOf(storage *customresource.REST) *structural.Schema {
	strategy := reflect.ValueOf(storage.CreateStrategy)
	if strategy.Kind() != reflect.Struct {
		return nil
	}
	f := strategy.FieldByName("structuralSchema")
	if !f.IsValid() || f.Type() != reflect.TypeFor[*structuralschema.Structural]() {
		return nil
	}
	return structural.New((*structuralschema.Structural)(f.UnsafePointer()))
}

// crdInfo is what upstream's handler knows of a definition, by its names.
type crdInfo struct {
	spec           *apiextensionsv1.CustomResourceDefinitionSpec
	names          *apiextensionsv1.CustomResourceDefinitionNames
	storages       map[string]customresource.CustomResourceStorage
	scopes, status map[string]*handlers.RequestScope
}

// isOf says whether this was made of the definition as it is.
func (i *crdInfo) isOf(crd *apiextensionsv1.CustomResourceDefinition) bool {
	return apiequality.Semantic.DeepEqual(i.spec, &crd.Spec) && apiequality.Semantic.DeepEqual(i.names, &crd.Status.AcceptedNames)
}

// infoOf reads what upstream's handler has made of a definition, which it keeps to itself. Where this version of it keeps something else than we
// know, upstream serves all custom resources; a test tells.
// Source: crdHandler and crdInfo in k8s.io/apiextensions-apiserver/pkg/apiserver/customresource_handler.go.
func infoOf(handler crdHandler, uid types.UID) (out crdInfo, ok bool) {
	h := reflect.ValueOf(handler)
	if h.Kind() != reflect.Pointer || h.Elem().Kind() != reflect.Struct {
		return out, false
	}
	f := h.Elem().FieldByName("customStorage")
	if !f.IsValid() || f.Type() != reflect.TypeFor[atomic.Value]() {
		return out, false
	}
	all := reflect.ValueOf((*atomic.Value)(unsafe.Pointer(f.UnsafeAddr())).Load())
	if all.Kind() != reflect.Map || all.Type().Key() != reflect.TypeFor[types.UID]() {
		return out, false
	}
	one := all.MapIndex(reflect.ValueOf(uid))
	if one.Kind() != reflect.Pointer || one.Elem().Kind() != reflect.Struct {
		return out, false
	}
	one = one.Elem()
	return out, field(one, "spec", &out.spec) && field(one, "acceptedNames", &out.names) && field(one, "storages", &out.storages) &&
		field(one, "requestScopes", &out.scopes) && field(one, "statusRequestScopes", &out.status)
}

// field copies a field that another package keeps to itself.
func field[T any](of reflect.Value, name string, into *T) bool {
	f := of.FieldByName(name)
	if !f.IsValid() || f.Type() != reflect.TypeFor[T]() {
		return false
	}
	*into = *(*T)(unsafe.Pointer(f.UnsafeAddr()))
	return true
}
