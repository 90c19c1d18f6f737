package apiserver

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/emicklei/go-restful/v3"
	apidiscoveryv2 "k8s.io/api/apidiscovery/v2"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"knarr/apiserver/h2"
)

// CountShortcuts counts, from the next Serve on, the requests that no filter has seen.
func CountShortcuts(s *Server) *atomic.Int64 {
	var n atomic.Int64
	next := s.shortcut
	s.shortcut = func(e *h2.Exchange) bool {
		done := next(e)
		if done {
			n.Add(1)
		}
		return done
	}
	return &n
}

// CountLongWays counts the requests that go through the filters.
func CountLongWays(s *Server) *atomic.Int64 {
	var n atomic.Int64
	f := s.handler.(*bypass)
	next := f.next
	f.next = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		n.Add(1)
		next.ServeHTTP(w, req)
	})
	return &n
}

// ServesCustom says whether our own paths serve a custom resource in a version.
func ServesCustom(s *Server, group, version, resource string) bool {
	return s.custom.served.remembered(group, version, resource) != nil
}

// KnowsDefinition says whether upstream's handler serves by a generation of a definition, or knows of its end where that is 0.
func KnowsDefinition(s *Server, name string, generation int64) bool {
	crd, err := s.custom.served.lister.Get(name)
	if err != nil {
		return generation == 0
	}
	info, ok := infoOf(s.custom.served.upstream, crd.UID)
	return ok && crd.Generation == generation && info.isOf(crd)
}

// CountCustomLongWays counts the requests that upstream's handler of custom resources gets.
func CountCustomLongWays(s *Server) *atomic.Int64 {
	var n atomic.Int64
	next := s.custom.handler
	s.custom.handler = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		n.Add(1)
		next.ServeHTTP(w, req)
	})
	return &n
}

// Installed is what is known of a group version's resources when they are served.
type Installed struct {
	Document   metav1.APIResourceList
	Aggregated []apidiscoveryv2.APIResourceDiscovery
	// Routes are methods and paths, in order.
	Routes []string
	// Kinds and Equivalents are by path.
	Kinds       map[string]schema.GroupVersionKind
	Equivalents map[string][]schema.GroupVersionResource
}

// BuiltinVersions gives the built-in group versions as this server installs them, and as upstream's installer does. It fails where a route is not at the resource that its
// requests are sent to.
func BuiltinVersions(s *Server) (own, upstream map[schema.GroupVersion]*Installed, err error) {
	in := newInstaller(s.id, s.admit, s.types)
	if err := in.installAll(s.groups); err != nil {
		return nil, nil, err
	}
	own, upstream = map[schema.GroupVersion]*Installed{}, map[schema.GroupVersion]*Installed{}
	kinds := runtime.NewEquivalentResourceRegistry()
	for gv, v := range in.versions {
		whole := *v.APIGroupVersion
		whole.EquivalentResourceRegistry = kinds
		c := newContainer()
		aggregated, _, err := whole.InstallREST(c)
		if err != nil {
			return nil, nil, err
		}
		upstream[gv] = &Installed{Aggregated: aggregated, Routes: routesOf(c.RegisteredWebServices()[0])}
		if err := upstream[gv].readDocument(http.HandlerFunc(c.Dispatch), v.root()); err != nil {
			return nil, nil, err
		}
		own[gv] = &Installed{Aggregated: v.aggregated}
		if own[gv].Routes, err = v.allRoutes(); err != nil {
			return nil, nil, err
		}
		if err := own[gv].readDocument(v.handler("", nil), v.root()); err != nil {
			return nil, nil, err
		}
	}
	for gv, v := range in.versions { // now that all are registered
		own[gv].readKinds(v, in.equivalents)
		upstream[gv].readKinds(v, kinds)
	}
	return own, upstream, nil
}

func routesOf(service *restful.WebService) (out []string) {
	for _, r := range service.Routes() {
		out = append(out, r.Method+" "+r.Path)
	}
	slices.Sort(out)
	return out
}

// allRoutes gives the routes of all resources' services, and of the document's.
func (v *version) allRoutes() ([]string, error) {
	root := " " + v.root() + "/"
	out := []string{http.MethodGet + root}
	for resource := range v.routes {
		service, err := v.serviceOf(resource)
		if err != nil {
			return nil, err
		}
		for _, route := range routesOf(service) {
			_, below, _ := strings.Cut(route, root)
			if below == "" {
				continue // the document, which is in each
			}
			if at := resourceAt(below); at != resource {
				return nil, fmt.Errorf("%s is a route of %s, its requests go to %s", route, resource, at)
			}
			out = append(out, route)
		}
	}
	slices.Sort(out)
	return out, nil
}

func (i *Installed) readDocument(from http.Handler, path string) error {
	w := httptest.NewRecorder()
	from.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	return json.Unmarshal(w.Body.Bytes(), &i.Document)
}

func (i *Installed) readKinds(v *version, from runtime.EquivalentResourceRegistry) {
	i.Kinds, i.Equivalents = map[string]schema.GroupVersionKind{}, map[string][]schema.GroupVersionResource{}
	for path := range v.Storage {
		resource, subresource, _ := strings.Cut(path, "/")
		i.Kinds[path] = from.KindFor(v.GroupVersion.WithResource(resource), subresource)
		i.Equivalents[path] = from.EquivalentResourcesFor(v.GroupVersion.WithResource(resource), subresource)
		slices.SortFunc(i.Equivalents[path], func(a, b schema.GroupVersionResource) int { return strings.Compare(a.String(), b.String()) })
	}
}

// CountUpstreamWrites counts the requests of a user agent that neither our reads nor our writes answer.
func CountUpstreamWrites(s *Server, agent string) *atomic.Int64 {
	var n atomic.Int64
	w := s.handler.(*bypass).writer
	next := w.next
	w.next = http.HandlerFunc(func(rw http.ResponseWriter, req *http.Request) {
		if req.UserAgent() == agent {
			n.Add(1)
		}
		next.ServeHTTP(rw, req)
	})
	return &n
}

// HotPaths are the paths, without namespaces, of the resources and subresources that our way writes.
func HotPaths() (out []string) {
	for gv, paths := range hotResources {
		for _, path := range paths {
			out = append(out, "/"+pathOf(gv)+"/"+path)
		}
	}
	return out
}
