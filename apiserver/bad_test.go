package apiserver_test

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"crypto/tls"

	"github.com/stretchr/testify/require"

	"knarr/apiserver"
)

const (
	jsonType  = "application/json"
	yamlType  = "application/yaml"
	protoType = "application/vnd.kubernetes.protobuf"

	// badRequests is how many are sent, over badClients connections.
	badRequests, badClients = 2_000, 8
	// heapGrowthBytes is what the heap may have grown after them.
	heapGrowthBytes = 8 << 20
)

// bad is a request that must be refused with one status.
type bad struct {
	request
	want int
}

func withType(contentType string) map[string]string {
	return map[string]string{"Content-Type": contentType}
}

// nested is a document as deep as levels.
func nested(open, middle, end string, levels int) string {
	return strings.Repeat(open, levels) + middle + strings.Repeat(end, levels)
}

// badBodies are bodies that no create takes.
func badBodies() []bad {
	const maps = "/api/v1/namespaces/default/configmaps"
	post := func(contentType, body string, want int) bad {
		return bad{request{method: "POST", path: maps, token: adminToken, body: body, header: withType(contentType)}, want}
	}
	object := func(meta string) string {
		return `{"apiVersion":"v1","kind":"ConfigMap","metadata":{` + meta + `}}`
	}
	deep := nested(`{"a":`, "1", "}", 50000)
	return []bad{
		post(jsonType, "{", 400), post(jsonType, "null", 422), post(jsonType, `"x"`, 400), post(jsonType, "[]", 400), post(jsonType, "\xff\xfe", 400),
		post(jsonType, deep, 400), post(jsonType, nested("[", "", "]", 50000), 400), post(yamlType, deep, 400),
		post(jsonType, object(`"name":"x","annotations":`+nested("[", "", "]", 50000)), 400),
		post(jsonType, object(`"name":5`), 400), post(jsonType, object(`"name":"../x"`), 422), post(jsonType, object(``), 422),
		post(jsonType, object(`"name":"x","namespace":"other"`), 400), post(jsonType, object(`"name":"x","resourceVersion":"5"`), 500),
		post(jsonType, strings.ReplaceAll(object(`"name":"x"`), "v1", "v9"), 400), post(jsonType, strings.ReplaceAll(object(`"name":"x"`), "ConfigMap", "Secret"), 400),
		post(yamlType, "a: [", 400), post(yamlType, "a: &a [*a, *a]", 400), post(yamlType, "\t", 400), post(yamlType, bomb(), 400),
		post(protoType, "k8s\x00\xff\xff\xff\xff\xff", 400), post(protoType, "k8s\x00", 400), post(protoType, "plain", 400), post(protoType, "k8s\x00\x0a\xff\xff\xff\xff\x0f", 400),
		post("text/plain", "x", 415), post("application/cbor", "\xd9\xd9\xf7\xa0", 415), post(";", "x", 415), post(jsonType, strings.Repeat(" ", apiserver.MaxRequestBodyBytes+1), 413),
		{request{method: "POST", path: maps + "?dryRun=x", token: adminToken, body: object(`"name":"x"`), header: withType(jsonType)}, 422},
		{request{method: "POST", path: maps + "?fieldValidation=x", token: adminToken, body: object(`"name":"x"`), header: withType(jsonType)}, 422},
		{request{method: "POST", path: maps + "?fieldValidation=Strict", token: adminToken, body: object(`"name":"x","nope":1`), header: withType(jsonType)}, 400},
		{request{method: "POST", path: maps + "?timeout=x", token: adminToken, body: object(`"name":"x"`), header: withType(jsonType)}, 400},
		{request{method: "DELETE", path: maps + "/x", token: adminToken, body: "{", header: withType(jsonType)}, 400},
		{request{method: "PUT", path: maps + "/x", token: adminToken, body: object(`"name":"y"`), header: withType(jsonType)}, 400},
	}
}

// bomb is YAML that grows a hundred million times when its aliases are followed.
func bomb() string {
	out := "a: &a [x,x,x,x,x,x,x,x,x]\n"
	for c := 'b'; c <= 'i'; c++ {
		out += fmt.Sprintf("%c: &%c [%s]\n", c, c, strings.TrimSuffix(strings.Repeat("*"+string(c-1)+",", 9), ","))
	}
	return out
}

func badPatches() []bad {
	patch := func(kind, body string, want int) bad {
		return bad{request{method: "PATCH", path: "/api/v1/namespaces/default?fieldManager=t", token: adminToken, body: body, header: withType(kind)}, want}
	}
	deep := nested(`{"a":`, "1", "}", 50000)
	const jsonPatch, merge, strategic, apply = "application/json-patch+json", "application/merge-patch+json", "application/strategic-merge-patch+json", "application/apply-patch+yaml"
	return []bad{
		patch(jsonPatch, "{", 400), patch(jsonPatch, deep, 400), patch(jsonPatch, `[{"op":"remove","path":"/none"}]`, 422), patch(jsonPatch, `[{"op":"brew"}]`, 422), patch(jsonPatch, `[{"op":"test","path":""}]`, 422),
		patch(merge, "{", 400), patch(merge, deep, 400), patch(merge, `{"metadata":{"labels":5}}`, 422), patch(merge, `{"metadata":{"name":"other"}}`, 400),
		patch(strategic, "{", 400), patch(strategic, deep, 400),
		patch(apply, "a: [", 400), patch(apply, deep, 400), patch(apply, `{"apiVersion":"v1","kind":"Pod"}`, 400), patch(apply, bomb(), 400),
		patch(jsonType, "{}", 415), patch("text/x", "{}", 415),
		{request{method: "PATCH", path: "/api/v1/namespaces/default", token: adminToken, body: `{"apiVersion":"v1","kind":"Namespace"}`, header: withType(apply)}, 422},
		patch(jsonPatch, copyBomb(), 422),
		patch(jsonPatch, "["+strings.TrimSuffix(strings.Repeat(`{"op":"test","path":"/a","value":1},`, 10001), ",")+"]", 413),
	}
}

// badPlaces are paths, methods, parameters and headers that lead nowhere.
func badPlaces() []bad {
	var out []bad
	get := func(want int, paths ...string) {
		for _, p := range paths {
			out = append(out, bad{request{path: p, token: adminToken}, want})
		}
	}
	get(404, "/nothing", "/api/v2", "/api/v1/nothing", "/apis/none", "/apis/none/v1", "/apis/none/v1/things", "/apis/apps/v9/deployments", "/apis/apps/v1/nothing",
		"/api/v1/namespaces/default/pods/x/nothing", "/api/v1/namespaces/none", "/api/v1/namespaces/default/configmaps/none", "/api/v1/../../etc/passwd",
		"/api/v1/namespaces/%2e%2e/configmaps/x", "/api/v1/namespaces/default/configmaps/a%00b", "/api/v1/namespaces/default/configmaps/..%2f..%2fsecrets%2fx",
		"//api//v1", "/api/v1/"+strings.Repeat("x/", 5000), "/openapi/v3/apis/none/v1", "/readyz/none", "/api/v1/namespaces/default/pods/none/log")
	get(400, "/api/v1/namespaces?labelSelector=a%3D%3D%3Db", "/api/v1/namespaces?fieldSelector=x%3Dy", "/api/v1/namespaces?limit=x", "/api/v1/namespaces?continue=x",
		"/api/v1/namespaces?resourceVersion=-1", "/api/v1/namespaces?timeout=x", "/api/v1/namespaces?watch=1&timeoutSeconds=x",
		"/api/v1/namespaces/default/configmaps/%2e%2e", "/api/v1/namespaces/default/configmaps/a%25b")
	get(422, "/api/v1/namespaces?resourceVersionMatch=Foo&resourceVersion=1", "/api/v1/namespaces?resourceVersionMatch=Exact")
	get(504, "/api/v1/namespaces?resourceVersion=99999999", "/api/v1/namespaces?resourceVersion=99999999&resourceVersionMatch=Exact")
	for _, m := range []struct{ method, path string }{
		{"POST", "/api/v1/namespaces/default"}, {"PUT", "/api/v1/namespaces"}, {"BREW", "/api/v1/namespaces"}, {"TRACE", "/api/v1/namespaces/default"},
		{"PATCH", "/api/v1/namespaces"}, {"DELETE", "/api/v1"}, {"OPTIONS", "/api/v1/namespaces/default"}, {"POST", "/apis/apps/v1/deployments/x/scale"},
	} {
		want := 405
		if m.path == "/apis/apps/v1/deployments/x/scale" {
			want = 404
		}
		out = append(out, bad{request{method: m.method, path: m.path, token: adminToken, body: "{}", header: withType(jsonType)}, want})
	}
	for _, path := range []string{"/api/v1/namespaces", "/api/v1/namespaces/default", "/api/v1", "/apis"} {
		out = append(out, bad{request{path: path, token: adminToken, header: map[string]string{"Accept": "text/x"}}, 406})
	}
	return out
}

// badIdentities are requests of somebody who may not.
func badIdentities() []bad {
	out := []bad{
		{request{path: "/api"}, 403}, {request{path: "/metrics"}, 403}, {request{path: "/api/v1/secrets"}, 403}, {request{path: "/api/v1/secrets", token: nobodyToken}, 403},
		{request{path: "/api/v1/namespaces", token: nobodyToken, header: map[string]string{"Impersonate-User": "admin"}}, 403},
		{request{path: "/api/v1/namespaces", token: adminToken, header: map[string]string{"Impersonate-Group": "admin"}}, 400},
		{request{path: "/api/v1/namespaces", header: map[string]string{"X-Remote-User": "admin", "X-Remote-Group": "system:masters"}}, 403},
		{request{path: "/api/v1/namespaces", header: map[string]string{"Authorization": "Basic eDp5"}}, 403},
	}
	for _, token := range []string{"bad", "eyJhbGciOiJub25lIn0.e30.", "a.b.c", strings.Repeat("x", 100000), "eyJhbGciOiJSUzI1NiJ9." + strings.Repeat("e", 10000) + ".x"} {
		out = append(out, bad{request{path: "/api/v1/namespaces", token: token}, 401}, bad{request{path: "/version", token: token}, 401})
	}
	return out
}

// TestBadRequests sends thousands of requests that must be refused, each with its status, and looks at what they leave behind.
func TestBadRequests(t *testing.T) {
	s := serve(t, func(*apiserver.Config) {})
	all := append(append(append(badBodies(), badPatches()...), badPlaces()...), badIdentities()...)
	clients := []*http.Client{newClient(t, true), newClient(t, false)}
	for _, b := range all { // one each, which also makes what is made once
		a := s.ask(t, clients[0], b.request)
		if a.status != b.want {
			t.Errorf("%s %.200s %.100v %.60q: %d, not %d: %.300s", b.method, b.path, b.header, b.body, a.status, b.want, a.body)
		}
		require.NotEmpty(t, a.header.Get("Audit-Id"))
		require.Equal(t, "no-cache, private", a.header.Get("Cache-Control"))
	}
	require.False(t, t.Failed())
	before := heap()
	start := time.Now()
	var wg sync.WaitGroup
	for worker := range badClients {
		random := rand.New(rand.NewPCG(1, uint64(worker)))
		wg.Go(func() {
			for range badRequests / badClients {
				b := all[random.IntN(len(all))]
				a, err := s.try(clients[worker%2], b.request)
				if err != nil || a.status != b.want {
					t.Errorf("%s %.200s %.60q: %d, not %d: %v %.300s", b.method, b.path, b.body, a.status, b.want, err, a.body)
				}
			}
		})
	}
	wg.Wait()
	took := time.Since(start)
	after := heap()
	t.Logf("%d bad requests in %s, heap %d KiB before, %d KiB after", badRequests, took.Round(time.Millisecond), before>>10, after>>10)
	require.Less(t, after, before+heapGrowthBytes)
	require.Equal(t, 200, s.ask(t, clients[0], request{path: "/readyz"}).status)
}

// heap is what is live.
func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// TestBadConnections talks to the server below HTTP: headers without end, no TLS, nonsense.
func TestBadConnections(t *testing.T) {
	s := serve(t, func(*apiserver.Config) {})
	address := strings.TrimPrefix(s.url, "https://")
	dial := func() *tls.Conn {
		c, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}})
		require.NoError(t, err)
		require.NoError(t, c.SetDeadline(time.Now().Add(timeout)))
		return c
	}
	for _, test := range []struct{ name, send, want string }{
		{"too many headers", "GET / HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 2<<20) + "\r\n\r\n", "HTTP/1.1 431 "},
		{"no request", "hello\r\n\r\n", "HTTP/1.1 400 "},
		{"two lengths", "POST /api HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx", "HTTP/1.1 400 "},
		{"no host", "GET /api HTTP/1.1\r\n\r\n", "HTTP/1.1 400 "},
	} {
		c := dial()
		go func() { _, _ = io.WriteString(c, test.send) }()
		buffer := make([]byte, len(test.want))
		_, err := io.ReadFull(c, buffer)
		require.NoError(t, err, test.name)
		require.Equal(t, test.want, string(buffer), test.name)
		require.NoError(t, c.Close())
	}
	plain, err := net.Dial("tcp", address)
	require.NoError(t, err)
	defer plain.Close()
	_, err = io.WriteString(plain, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	require.NoError(t, err)
	data, err := io.ReadAll(plain)
	require.NoError(t, err)
	require.Contains(t, string(data), "HTTP/1.0 400 Bad Request")
}
