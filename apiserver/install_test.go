package apiserver

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/emicklei/go-restful/v3"
	"github.com/stretchr/testify/require"
)

// TestDrop: routes are found, and their parameters read, without their regular expressions and documentation.
func TestDrop(t *testing.T) {
	service := new(restful.WebService)
	service.Path("/api/v1")
	for _, method := range []string{http.MethodGet, http.MethodPut} {
		service.Route(service.Method(method).Path("/pods/{name}/{path:*}").To(func(req *restful.Request, resp *restful.Response) {
			_, _ = resp.Write([]byte(req.PathParameter("name") + " " + req.PathParameter("path")))
		}))
	}
	require.Equal(t, 2*len(unused), drop(service, unused), "the library keeps them elsewhere")
	container := newContainer()
	container.Add(service)
	for _, test := range []struct {
		method, path, answer string
		code                 int
	}{
		{http.MethodGet, "/api/v1/pods/a/b/c", "a b/c", http.StatusOK},
		{http.MethodPut, "/api/v1/pods/a/b", "a b", http.StatusOK},
		{http.MethodPost, "/api/v1/pods/a/b", `"reason":"MethodNotAllowed"`, http.StatusMethodNotAllowed},
		{http.MethodGet, "/api/v1/nodes/a/b", `"reason":"NotFound"`, http.StatusNotFound},
	} {
		w := httptest.NewRecorder()
		container.Dispatch(w, httptest.NewRequest(test.method, test.path, nil))
		require.Equal(t, test.code, w.Code, test)
		require.Contains(t, w.Body.String(), test.answer, test)
	}
}
