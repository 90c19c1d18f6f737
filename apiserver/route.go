package apiserver

import (
	"net/http"
	"strings"

	"github.com/emicklei/go-restful/v3"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
)

// router sends an authorized request to the part that serves its path.
type router struct {
	container *restful.Container
	// builtin are the group versions in container.
	builtin map[schema.GroupVersion]describe
	// groups are the names of the built-in groups.
	groups map[string]bool
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
		r.container.Dispatch(w, req)
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
	case r.builtin[gv] != nil || !deep && r.groups[group]:
		r.container.Dispatch(w, req)
	case below == "" && r.custom.serveDiscovery(w, req, gv):
	case below == "" && !deep && r.aggregator.serveGroup(w, req, group):
	case below == "":
		http.NotFound(w, req)
	default:
		r.custom.handler.ServeHTTP(w, req)
	}
}

// containerError answers what go-restful itself refuses (no such route, method or content type) as a Status.
func containerError(codecs runtime.NegotiatedSerializer) restful.ServiceErrorHandleFunction {
	return func(e restful.ServiceError, req *restful.Request, resp *restful.Response) {
		err := apierrors.NewGenericServerResponse(e.Code, "", schema.GroupResource{}, "", e.Message, 0, false)
		responsewriters.ErrorNegotiated(err, codecs, schema.GroupVersion{}, resp, req.Request)
	}
}
