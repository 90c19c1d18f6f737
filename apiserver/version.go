package apiserver

import (
	"fmt"
	"maps"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"sync"
	"unsafe"

	"github.com/emicklei/go-restful/v3"
	apidiscoveryv2 "k8s.io/api/apidiscovery/v2"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	genericapi "k8s.io/apiserver/pkg/endpoints"
	"k8s.io/apiserver/pkg/endpoints/discovery"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
	"k8s.io/apiserver/pkg/features"
	"k8s.io/apiserver/pkg/registry/rest"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
)

// version is a built-in version of a group: its REST storage types, what clients are told of them, and the routes to upstream's handlers. The routes of a resource and its
// subresources are made for the first request that is for them: most of what a cluster does goes other ways (read.go, write.go), so that a server has few of the
// 790 routes, each of which is made with 20 KB of garbage and its documentation.
type version struct {
	*genericapi.APIGroupVersion
	resources  []metav1.APIResource
	aggregated []apidiscoveryv2.APIResourceDiscovery
	// list serves the document of the resources, routes upstream's handlers of one.
	list   http.Handler
	routes map[string]http.Handler
}

// newVersion describes all resources, and makes no route.
func newVersion(g *genericapi.APIGroupVersion) (_ *version, err error) {
	v := &version{APIGroupVersion: g, routes: map[string]http.Handler{}}
	for _, path := range slices.Sorted(maps.Keys(g.Storage)) {
		r, kind, err := v.describe(path)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		v.resources = append(v.resources, r)
		resource, subresource, below := strings.Cut(path, "/")
		g.EquivalentResourceRegistry.RegisterKindFor(g.GroupVersion.WithResource(resource), subresource, kind)
		if !below {
			v.routes[resource] = onDemand(func() (*restful.WebService, error) { return v.serviceOf(resource) })
		}
	}
	v.list = onDemand(v.documentService)
	v.aggregated, err = genericapi.ConvertGroupVersionIntoToDiscovery(v.resources)
	return v, err
}

// handler gives what answers a request by what is below the version in its path, or what is to say that there is nothing.
func (v *version) handler(below string, missing http.Handler) http.Handler {
	if below == "" {
		return v.list
	}
	if h := v.routes[resourceAt(below)]; h != nil {
		return h
	}
	return missing
}

// resourceAt gives the resource that a path below a group version is about.
func resourceAt(path string) string {
	first, rest, _ := strings.Cut(strings.TrimPrefix(path, "watch/"), "/")
	if first != "namespaces" {
		return first
	}
	_, rest, _ = strings.Cut(rest, "/")
	switch third, _, _ := strings.Cut(rest, "/"); third {
	case "", "status", "finalize":
		return first
	default:
		return third
	}
}

// onDemand serves a web service that is made for the first request.
func onDemand(make func() (*restful.WebService, error)) http.Handler {
	made := sync.OnceValues(func() (http.Handler, error) {
		service, err := make()
		if err != nil {
			return nil, err
		}
		return restfulHandler(service), nil
	})
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		h, err := made()
		if err != nil {
			responsewriters.ErrorNegotiated(apierrors.NewInternalError(err), legacyscheme.Codecs, schema.GroupVersion{}, w, req)
			return
		}
		h.ServeHTTP(w, req)
	})
}

// root is the path that the version is served below.
func (v *version) root() string {
	return "/" + pathOf(v.GroupVersion)
}

// documentService is the web service that lists the version's resources.
func (v *version) documentService() (*restful.WebService, error) {
	service := new(restful.WebService).Path(v.root()).Consumes("*/*")
	lister := discovery.APIResourceListerFunc(func() []metav1.APIResource { return v.resources })
	discovery.NewAPIVersionHandler(v.Serializer, v.GroupVersion, lister).AddToWebService(service)
	return service, nil
}

// serviceOf makes the web service of one resource.
func (v *version) serviceOf(resource string) (*restful.WebService, error) {
	some := map[string]rest.Storage{}
	for path, storage := range v.Storage {
		if path == resource || strings.HasPrefix(path, resource+"/") {
			some[path] = storage
		}
	}
	service, err := v.service(some)
	if err == nil {
		drop(service, unused)
	}
	return service, err
}

// documented makes a web service of all resources, with the documentation of its routes.
func (v *version) documented() (*restful.WebService, error) {
	return v.service(v.Storage)
}

func (v *version) service(storage map[string]rest.Storage) (*restful.WebService, error) {
	g := *v.APIGroupVersion
	g.Storage, g.EquivalentResourceRegistry = storage, knownKinds{v.EquivalentResourceRegistry}
	to := newContainer()
	if _, _, err := g.InstallREST(to); err != nil {
		return nil, err
	}
	return to.RegisteredWebServices()[0], nil
}

// knownKinds is a registry that has all kinds already: another entry would be a second one.
type knownKinds struct {
	runtime.EquivalentResourceRegistry
}

// RegisterKindFor implements runtime.EquivalentResourceRegistry.
func (knownKinds) RegisterKindFor(schema.GroupVersionResource, string, schema.GroupVersionKind) {}

// describe gives what clients are told of a resource or subresource, and its kind. Upstream's installer tells the same, but makes all routes to find it out.
// Source: k8s.io/apiserver/pkg/endpoints/installer.go.
func (v *version) describe(path string) (r metav1.APIResource, kind schema.GroupVersionKind, err error) {
	storage := v.Storage[path]
	resource, _, isSubresource := strings.Cut(path, "/")
	if kind, err = genericapi.GetResourceKind(v.GroupVersion, storage, v.Typer); err != nil {
		return r, kind, err
	}
	scoper, ok := v.Storage[resource].(rest.Scoper)
	if !ok {
		return r, kind, fmt.Errorf("the storage of %s does not say whether it is namespaced", resource)
	}
	r = metav1.APIResource{Name: path, Namespaced: scoper.NamespaceScoped(), Kind: kind.Kind, Verbs: verbsFor(storage)}
	if p, ok := storage.(rest.KindProvider); ok {
		r.Kind = p.Kind()
	}
	if p, ok := storage.(rest.ShortNamesProvider); ok {
		r.ShortNames = p.ShortNames()
	}
	if p, ok := storage.(rest.CategoriesProvider); ok {
		r.Categories = p.Categories()
	}
	if p, ok := storage.(rest.SingularNameProvider); ok && !isSubresource {
		r.SingularName = p.GetSingularName()
	}
	if p, ok := storage.(rest.GroupVersionKindProvider); ok {
		other := p.GroupVersionKind(v.GroupVersion)
		r.Group, r.Version, r.Kind = other.Group, other.Version, other.Kind
	}
	r.StorageVersionHash, err = v.storageVersionHash(storage)
	return r, kind, err
}

// storageVersionHash identifies the version that objects are stored in; empty where storage does not say.
func (v *version) storageVersionHash(storage rest.Storage) (string, error) {
	p, ok := storage.(rest.StorageVersionProvider)
	if !ok || p.StorageVersion() == nil || !utilfeature.DefaultFeatureGate.Enabled(features.StorageVersionHash) {
		return "", nil
	}
	kinds, _, err := v.Typer.ObjectKinds(storage.New())
	if err != nil {
		return "", err
	}
	stored, ok := p.StorageVersion().KindForGroupVersionKinds(kinds)
	if !ok {
		return "", fmt.Errorf("no version to store %v in", kinds)
	}
	return discovery.StorageVersionHash(stored.Group, stored.Version, stored.Kind), nil
}

// verbsFor lists, in order, what can be done with a resource or subresource.
func verbsFor(storage rest.Storage) []string {
	verbs := map[string]bool{}
	if c, ok := storage.(rest.Connecter); ok {
		ofMethod := map[string]string{http.MethodGet: "get", http.MethodPost: "create", http.MethodPut: "update", http.MethodPatch: "patch", http.MethodDelete: "delete"}
		for _, method := range c.ConnectMethods() {
			verbs[ofMethod[method]] = true
		}
	}
	note := func(verb string, can bool) {
		if can {
			verbs[verb] = true
		}
	}
	note("create", is[rest.Creater](storage) || is[rest.NamedCreater](storage))
	note("delete", is[rest.GracefulDeleter](storage))
	note("deletecollection", is[rest.CollectionDeleter](storage))
	note("get", is[rest.Getter](storage) || is[rest.GetterWithOptions](storage))
	note("list", is[rest.Lister](storage))
	note("patch", is[rest.Patcher](storage))
	note("update", is[rest.Updater](storage))
	note("watch", is[rest.Watcher](storage))
	delete(verbs, "")                                             // of methods that are no verbs
	return append([]string{}, slices.Sorted(maps.Keys(verbs))...) // never nil: clients are told of a list
}

func is[T any](storage rest.Storage) bool {
	_, ok := storage.(T)
	return ok
}

// unused are the fields of a route that a server does not need: the regular expression, which go-restful compiles for a router that is not ours (CurlyRouter matches
// by the parts of a path), and what OpenAPI documents are made of.
var unused = []string{"pathExpr", "Doc", "Notes", "Operation", "ParameterDocs", "ResponseErrors", "DefaultResponse", "ReadSample", "WriteSample", "WriteSamples", "Metadata"}

// drop frees fields of a web service's routes, and counts them. Where the library keeps them elsewhere nothing happens; a test tells.
func drop(service *restful.WebService, fields []string) (dropped int) {
	routes := reflect.ValueOf(service).Elem().FieldByName("routes")
	if routes.Kind() != reflect.Slice {
		return 0
	}
	for i := range routes.Len() {
		for _, name := range fields {
			if f := routes.Index(i).FieldByName(name); f.IsValid() {
				// The routes are the library's own, hence the detour.
				reflect.NewAt(f.Type(), unsafe.Pointer(f.UnsafeAddr())).Elem().SetZero()
				dropped++
			}
		}
	}
	return dropped
}
