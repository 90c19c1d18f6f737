package apiserver

import (
	"net/http"
	"strings"

	"github.com/emicklei/go-restful/v3"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
)

// router sends an authorized request to the part that serves its path.
type router struct {
	builtin map[schema.GroupVersion]*version
	// groups answer the paths of built-in groups without a version, by the group's name.
	groups map[string]http.Handler
	// missing answers what is below no route.
	missing http.Handler
	// coreRoot and namedRoot answer /api and /apis.
	coreRoot, namedRoot http.Handler
	custom              *customResources
	aggregator          *aggregator
	// other serves all that is no API group: health, version, metrics, OpenAPI.
	other http.Handler
}

func (r *router) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	path := strings.TrimSuffix(req.URL.Path, "/")
	switch {
	case path == "/api":
		r.coreRoot.ServeHTTP(w, req)
	case path == "/apis":
		r.namedRoot.ServeHTTP(w, req)
	case strings.HasPrefix(path, "/api/"):
		version, below, _ := strings.Cut(path[len("/api/"):], "/")
		r.serveBuiltin(w, req, schema.GroupVersion{Version: version}, below)
	case strings.HasPrefix(path, "/apis/"):
		r.serveGroup(w, req, path[len("/apis/"):])
	default:
		r.other.ServeHTTP(w, req)
	}
}

// serveGroup serves what is below /apis/: by the server that an APIService names, by a built-in group, or as custom resource.
func (r *router) serveGroup(w http.ResponseWriter, req *http.Request, path string) {
	group, rest, deep := strings.Cut(path, "/")
	version, below, _ := strings.Cut(rest, "/")
	gv := schema.GroupVersion{Group: group, Version: version}
	if deep && r.aggregator.serve(w, req, gv) {
		return
	}
	switch {
	case r.builtin[gv] != nil:
		r.serveBuiltin(w, req, gv, below)
	case !deep && r.groups[group] != nil:
		r.groups[group].ServeHTTP(w, req)
	case below == "" && r.custom.serveDiscovery(w, req, gv):
	case below == "" && !deep && r.aggregator.serveGroup(w, req, group):
	case below == "":
		http.NotFound(w, req)
	default:
		r.custom.handler.ServeHTTP(w, req)
	}
}

// serveBuiltin serves what is below a built-in group version.
func (r *router) serveBuiltin(w http.ResponseWriter, req *http.Request, gv schema.GroupVersion, below string) {
	handler := r.missing
	if v := r.builtin[gv]; v != nil {
		handler = v.handler(below, r.missing)
	}
	handler.ServeHTTP(w, req)
}

// restfulHandler serves web services by themselves.
func restfulHandler(services ...*restful.WebService) http.Handler {
	c := newContainer()
	for _, ws := range services {
		c.Add(ws)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) { c.Dispatch(w, req) })
}

func newContainer() *restful.Container {
	c := restful.NewContainer()
	c.ServeMux = http.NewServeMux()
	c.Router(restful.CurlyRouter{})
	c.DoNotRecover(true)
	c.ServiceErrorHandler(containerError)
	return c
}

// containerError answers what go-restful itself refuses (no such route, method or content type) as a Status.
func containerError(e restful.ServiceError, req *restful.Request, resp *restful.Response) {
	err := apierrors.NewGenericServerResponse(e.Code, "", schema.GroupResource{}, "", e.Message, 0, false)
	responsewriters.ErrorNegotiated(err, legacyscheme.Codecs, schema.GroupVersion{}, resp, req.Request)
}
