package apiserver_test

import (
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"
	"k8s.io/apimachinery/pkg/runtime"

	"knarr/apiserver"
)

// TestVersions: clients are told of the built-in resources what upstream's installer tells, and the routes that are made when they are needed are the ones that it
// makes at once.
func TestVersions(t *testing.T) {
	own, upstream, err := apiserver.BuiltinVersions(theCluster(t).server)
	require.NoError(t, err)
	require.Greater(t, len(own), 20)
	for gv := range upstream {
		t.Run(gv.String(), func(t *testing.T) {
			require.NotEmpty(t, upstream[gv].Document.APIResources)
			require.NotEmpty(t, upstream[gv].Equivalents)
			require.Equal(t, upstream[gv], own[gv])
		})
	}
}

// TestNoRoute: what is below no route is refused as upstream does, whether or not there are other routes of that resource.
func TestNoRoute(t *testing.T) {
	c := theCluster(t)
	const missing, notAllowed = "the server could not find the requested resource", "the server does not allow this method on the requested resource"
	for _, test := range []struct {
		method, path, says string
		code               int
	}{
		{http.MethodGet, "/api/v1", `"kind":"APIResourceList"`, http.StatusOK},
		{http.MethodGet, "/api/v1/", `"kind":"APIResourceList"`, http.StatusOK},
		{http.MethodGet, "/apis/apps", `"kind":"APIGroup"`, http.StatusOK},
		{http.MethodGet, "/apis/apps/v1/", `"kind":"APIResourceList"`, http.StatusOK},
		{http.MethodGet, "/api/v2", missing, http.StatusNotFound},
		{http.MethodGet, "/api/v1/ships", missing, http.StatusNotFound},
		{http.MethodGet, "/api/v1/namespaces/default/ships/a", missing, http.StatusNotFound},
		{http.MethodGet, "/api/v1/namespaces/default/pods/a/nothing", missing, http.StatusNotFound},
		{http.MethodGet, "/apis/apps/v1/namespaces/default", missing, http.StatusNotFound},
		{http.MethodPost, "/api/v1", notAllowed, http.StatusMethodNotAllowed},
		{http.MethodPost, "/apis/apps", notAllowed, http.StatusMethodNotAllowed},
		{http.MethodPost, "/api/v1/pods", notAllowed, http.StatusMethodNotAllowed},
		{http.MethodPut, "/api/v1/namespaces/default/pods", notAllowed, http.StatusMethodNotAllowed},
		{http.MethodPut, "/api", notAllowed, http.StatusMethodNotAllowed},
	} {
		w := answerTo(c, test.method, test.path, "", runtime.ContentTypeJSON, "", nil)
		require.Equal(t, test.code, w.Code, test)
		require.Contains(t, w.Body.String(), test.says, test)
	}
}
