package apiserver_test

import (
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"knarr/apiserver"
)

// What tests of writes send.
const (
	js       = runtime.ContentTypeJSON
	smp      = string(types.StrategicMergePatchType)
	merge    = string(types.MergePatchType)
	fastShip = `{"apiVersion":"fast.example.com/v1","kind":"Ship","metadata":{"name":"knarr"},"spec":{"crew":6,"oars":1}}`
	fastPod  = `{"metadata":{"name":"p"},` + podTail
)

// fastWrites are requests, the codes of their answers, and whether they go through the filters.
var fastWrites = []struct {
	method, path, contentType, body string
	code                            int
	long                            bool
}{
	{"POST", "configmaps", js, `{"metadata":{"name":"m"},"data":{"x":"y"}}`, 201, false},
	{"POST", "configmaps", js, `{"metadata":{"name":"m"}}`, 409, false},
	{"POST", "configmaps", js, `{"metadata":{"name":"Not"}}`, 422, false},
	{"POST", "configmaps", js, `{"metadata":{"name":"u"},"nothing":1}`, 201, false},
	{"POST", "configmaps", js, `{`, 400, false},
	{"POST", "configmaps?dryRun=All", js, `{"metadata":{"name":"dry"}}`, 201, false},
	{"POST", "configmaps?timeout=10s", js, `{"metadata":{"name":"timely"}}`, 201, true},
	{"POST", "services", js, `{"metadata":{"name":"s"},"spec":{"clusterIP":"None","ports":[{"port":80}]}}`, 201, false},
	{"POST", "pods", js, fastPod, 201, false},
	{"POST", "pods", js, strings.Replace(fastPod, `"p"`, `"q"`, 1), 201, false},
	{"PUT", "configmaps/m", js, `{"metadata":{"name":"m"},"data":{"x":"z"}}`, 200, false},
	{"PUT", "configmaps/m", js, `{"metadata":{"name":"m","resourceVersion":"1"}}`, 409, false},
	{"PATCH", "configmaps/m", "application/json-patch+json", `[{"op":"test","path":""}]`, 422, false},
	{"POST", "pods/q/eviction", js, `{"metadata":{"name":"q"},"deleteOptions":{"dryRun":["All"]}}`, 201, true},
	{"POST", "pods/q/binding", js, `{"metadata":{"name":"q"},"target":{"kind":"Node","name":"n"}}`, 201, false},
	{"POST", "ships", js, fastShip, 201, false},
	{"POST", "ships", js, fastShip, 409, false},
	{"POST", "ships", runtime.ContentTypeProtobuf, fastShip, 415, false},
	{"POST", "ships", js, strings.Replace(fastShip, "6", "60", 1), 422, false},
	{"GET", "ships/knarr", "", ``, 200, false},
	{"GET", "ships/none", "", ``, 404, false},
	{"GET", "ships", "", ``, 200, true},
	{"PATCH", "ships/knarr", merge, `{"spec":{"crew":7}}`, 200, false},
	{"DELETE", "ships/knarr", js, ``, 200, false},
	{"DELETE", "ships", js, ``, 200, true},
	{"PATCH", "pods/p/status", smp, `{"status":{"phase":"Running"}}`, 200, false},
	{"PATCH", "pods/none/status", smp, `{"status":{"phase":"Running"}}`, 404, false},
	{"PATCH", "configmaps/m", merge, `{"data":{"z":"1"}}`, 200, false},
	{"PATCH", "configmaps/m", merge, `{"data":`, 400, false},
	{"DELETE", "configmaps/none", js, ``, 404, false},
	{"DELETE", "configmaps/u", js, `{"preconditions":{"uid":"not-this"}}`, 409, false},
	{"DELETE", "configmaps/u", js, `{"dryRun":["All"]}`, 200, false},
}

// TestFastWrites holds that writes past the filters get the answers of those through them.
func TestFastWrites(t *testing.T) {
	var config *apiserver.Config
	var long *atomic.Int64
	s := serveWith(t, func(c *apiserver.Config) { config = c }, func(s *apiserver.Server) { long = apiserver.CountLongWays(s) })
	root := clientFor(t, config, "root", "system:masters")
	spaces := bothSpaces(t, s.cluster)
	// write sends a request that does or does not say that it goes the long way.
	write := func(c *http.Client, i int, method, path, contentType, accept, body string) answer {
		header := map[string]string{"Content-Type": contentType, "Accept": accept, "User-Agent": "both/1"}
		if i == 1 {
			header["X-Long-Way"] = "1"
		}
		root := "/api/v1"
		if strings.HasPrefix(path, "ships") {
			root = "/apis/fast.example.com/v1"
		}
		return s.ask(t, c, request{method: method, path: root + "/namespaces/" + spaces[i] + "/" + path, body: body, header: header})
	}
	defineShips(t, s.cluster, "/apis/fast.example.com/v1/ships", "fast.example.com")
	for _, w := range fastWrites {
		for _, accept := range []string{runtime.ContentTypeJSON, runtime.ContentTypeProtobuf} {
			if accept == runtime.ContentTypeProtobuf && (w.code == 201 || strings.HasPrefix(w.path, "ships")) {
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
