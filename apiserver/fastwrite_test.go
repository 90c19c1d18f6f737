package apiserver_test

import (
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"k8s.io/apimachinery/pkg/runtime"

	"knarr/apiserver"
)

// TestFastWrites holds that writes past the filters get the answers of those through them.
func TestFastWrites(t *testing.T) {
	var config *apiserver.Config
	var long *atomic.Int64
	s := serveWith(t, func(c *apiserver.Config) { config = c }, func(s *apiserver.Server) { long = apiserver.CountLongWays(s) })
	root := clientFor(t, config, "root", "system:masters")
	spaces := bothSpaces(t, s.cluster)
	const strategic, merge = "application/strategic-merge-patch+json", "application/merge-patch+json"
	pod := `{"metadata":{"name":"p"},` + podTail
	// write sends a request that does or does not say that it goes the long way.
	write := func(c *http.Client, i int, method, path, contentType, accept, body string) answer {
		header := map[string]string{"Content-Type": contentType, "Accept": accept, "User-Agent": "both/1"}
		if i == 1 {
			header["X-Long-Way"] = "1"
		}
		return s.ask(t, c, request{method: method, path: "/api/v1/namespaces/" + spaces[i] + "/" + path, body: body, header: header})
	}
	for _, w := range []struct {
		method, path, contentType, body string
		code                            int
		long                            bool
	}{
		{"POST", "configmaps", runtime.ContentTypeJSON, `{"metadata":{"name":"m"},"data":{"x":"y"}}`, 201, false},
		{"POST", "configmaps", runtime.ContentTypeJSON, `{"metadata":{"name":"m"}}`, 409, false},
		{"POST", "configmaps", runtime.ContentTypeJSON, `{"metadata":{"name":"Not"}}`, 422, false},
		{"POST", "configmaps", runtime.ContentTypeJSON, `{"metadata":{"name":"u"},"nothing":1}`, 201, true},
		{"POST", "configmaps", runtime.ContentTypeJSON, `{`, 400, true},
		{"POST", "configmaps?dryRun=All", runtime.ContentTypeJSON, `{"metadata":{"name":"dry"}}`, 201, true},
		{"POST", "configmaps?timeout=10s", runtime.ContentTypeJSON, `{"metadata":{"name":"timely"}}`, 201, true},
		{"POST", "services", runtime.ContentTypeJSON, `{"metadata":{"name":"s"},"spec":{"clusterIP":"None","ports":[{"port":80}]}}`, 201, true},
		{"POST", "pods", runtime.ContentTypeJSON, pod, 201, false},
		{"POST", "pods", runtime.ContentTypeJSON, strings.Replace(pod, `"p"`, `"q"`, 1), 201, false},
		{"PATCH", "pods/p/status", strategic, `{"status":{"phase":"Running"}}`, 200, false},
		{"PATCH", "pods/none/status", strategic, `{"status":{"phase":"Running"}}`, 404, false},
		{"PATCH", "configmaps/m", merge, `{"data":{"z":"1"}}`, 200, false},
		{"PATCH", "configmaps/m", merge, `{"data":`, 400, true},
		{"DELETE", "configmaps/none", runtime.ContentTypeJSON, ``, 404, false},
		{"DELETE", "configmaps/u", runtime.ContentTypeJSON, `{"preconditions":{"uid":"not-this"}}`, 409, false},
		{"DELETE", "configmaps/u", runtime.ContentTypeJSON, `{"dryRun":["All"]}`, 200, true},
	} {
		for _, accept := range []string{runtime.ContentTypeJSON, runtime.ContentTypeProtobuf} {
			if accept == runtime.ContentTypeProtobuf && w.code == 201 {
				continue
			}
			before := long.Load()
			short := write(root, 0, w.method, w.path, w.contentType, accept, w.body)
			if w.long {
				require.Equal(t, before+1, long.Load(), "%s %s goes past the filters", w.method, w.path)
			} else {
				require.Equal(t, before, long.Load(), "%s %s %s takes the long way", w.method, w.path, w.body)
			}
			full := write(root, 1, w.method, w.path, w.contentType, accept, w.body)
			require.Equal(t, w.code, short.status, short.body)
			require.Equal(t, full.status, short.status)
			if accept == runtime.ContentTypeJSON {
				require.Equal(t, steady(full.body), steady(short.body))
			}
			for _, a := range []answer{full, short} {
				require.Len(t, a.header.Get("Audit-Id"), 36)
				require.NotEmpty(t, a.header.Get("X-Kubernetes-Pf-Flowschema-Uid"))
				for _, varies := range []string{"Audit-Id", "Date", "Content-Length"} {
					a.header.Del(varies)
				}
			}
			require.Equal(t, full.header, short.header, "%s %s", w.method, w.path)
		}
	}

	for i, path := range []string{"configmaps/m", "configmaps/u", "pods/p", "pods/q"} {
		before := long.Load()
		for space := range spaces {
			a := write(root, space, "DELETE", path, runtime.ContentTypeJSON, runtime.ContentTypeJSON, []string{``, `{"gracePeriodSeconds":0}`}[i%2])
			require.Equal(t, 200, a.status, a.body)
		}
		require.Equal(t, before+1, long.Load(), path)
	}
	before := long.Load()
	require.Equal(t, 403, write(clientFor(t, config, "jane"), 0, "POST", "configmaps", runtime.ContentTypeJSON, runtime.ContentTypeJSON, `{"metadata":{"name":"j"}}`).status)
	require.Equal(t, before+1, long.Load(), "others pass the filters")
}
