package apiserver_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/authentication/user"

	"knarr/apiserver"
	"knarr/client"
)

// Media types that our own reads answer, and spellings of the same that only upstream's handlers take.
var readFormats = []struct{ ours, upstream string }{
	{"application/json", "application/json;q=1"},
	{"application/vnd.kubernetes.protobuf", "application/vnd.kubernetes.protobuf;q=1"},
}

// fetch answers a request as the most privileged user.
func fetch(t testing.TB, c *cluster, path, accept string) *httptest.ResponseRecorder {
	t.Helper()
	return fetchFrom(c, path, accept, "", "192.0.2.1:1234")
}

// fetchFrom is a GET by an administrator at an address who takes what encoding says.
func fetchFrom(c *cluster, path, accept, encoding, remote string) *httptest.ResponseRecorder {
	req := httptest.NewRequest(http.MethodGet, path, nil)
	req.Header.Set("Accept", accept)
	if encoding != "" {
		req.Header.Set("Accept-Encoding", encoding)
	}
	req.RemoteAddr = remote
	req = req.WithContext(client.WithUser(req.Context(), client.User("admin", user.SystemPrivilegedGroup)))
	w := httptest.NewRecorder()
	c.handler.ServeHTTP(w, req)
	return w
}

// TestReadsAreUpstreamsByteForByte compares our own path with upstream's handlers for every resource that is served.
func TestReadsAreUpstreamsByteForByte(t *testing.T) {
	c := startCluster(t, vfs.NewMem(), nil)
	defer c.stop()
	ctx := context.Background()
	_, err := c.CoreV1().Pods("default").Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", Labels: map[string]string{"a<b": "c"}},
		Spec: corev1.PodSpec{ServiceAccountName: "none", NodeName: "n", Containers: []corev1.Container{{Name: "c", Image: "i"}}}}, metav1.CreateOptions{})
	require.Error(t, err, "a label that is no label")
	_, err = c.CoreV1().ConfigMaps("default").Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "html"},
		Data: map[string]string{"page": "<a href=\"x\">&</a>\u2028"}, BinaryData: map[string][]byte{"b": {0, 255}}}, metav1.CreateOptions{})
	require.NoError(t, err)
	lists, err := c.Discovery().ServerPreferredResources()
	require.NoError(t, err)
	compared := 0
	for _, list := range lists {
		root := "/apis/" + list.GroupVersion
		if list.GroupVersion == "v1" {
			root = "/api/v1"
		}
		for _, r := range list.APIResources {
			if !strings.Contains(strings.Join(r.Verbs, ","), "list") {
				continue
			}
			for _, f := range readFormats {
				for _, query := range []string{"", "?limit=2", "?labelSelector=kubernetes.io/bootstrapping%3Drbac-defaults", "?fieldSelector=metadata.name%3Dhtml"} {
					ours, theirs := fetch(t, c, root+"/"+r.Name+query, f.ours), fetch(t, c, root+"/"+r.Name+query, f.upstream)
					require.Equal(t, theirs.Code, ours.Code, "%s/%s%s %s", root, r.Name, query, f.ours)
					require.Equal(t, theirs.Header().Get("Content-Type"), ours.Header().Get("Content-Type"))
					require.True(t, bytes.Equal(theirs.Body.Bytes(), ours.Body.Bytes()), "%s/%s%s %s\nupstream %.2000q\nours     %.2000q", root, r.Name, query, f.ours,
						theirs.Body.String(), ours.Body.String())
					compared++
				}
			}
		}
	}
	require.Greater(t, compared, 200)
	for _, f := range readFormats {
		for _, path := range []string{"/api/v1/namespaces/default/configmaps/html", "/apis/rbac.authorization.k8s.io/v1/clusterroles/admin",
			"/api/v1/namespaces/default", "/api/v1/namespaces?fieldSelector=metadata.name%3Ddefault", "/api/v1/namespaces/missing",
			"/api/v1/namespaces/default/configmaps/missing", "/api/v1/namespaces/default/configmaps?fieldSelector=x%3Dy",
			"/api/v1/namespaces/default/configmaps?continue=x", "/api/v1/namespaces/default/configmaps?resourceVersion=x"} {
			ours, theirs := fetch(t, c, path, f.ours), fetch(t, c, path, f.upstream)
			require.Equal(t, theirs.Code, ours.Code, path)
			require.Equal(t, theirs.Body.String(), ours.Body.String(), path)
		}
	}
}

// TestWatchFramesAreUpstreams compares the bytes of watches: initial events, their end, changes, objects that leave.
func TestWatchFramesAreUpstreams(t *testing.T) {
	s := serve(t, func(*apiserver.Config) {})
	for _, http2 := range []bool{false, true} {
		compareWatches(t, s, newClient(t, http2), fmt.Sprint("m", http2))
	}
}

func compareWatches(t *testing.T, c *served, over *http.Client, name string) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	maps := c.CoreV1().ConfigMaps("default")
	m, err := maps.Create(ctx, configMap(name, map[string]string{"team": "a"}), metav1.CreateOptions{})
	require.NoError(t, err)
	streams := openWatches(ctx, t, c, over)
	for _, team := range []string{"a", "b", "a"} {
		m.Labels["team"], m.Data["k"] = team, team+m.Data["k"]
		m, err = maps.Update(ctx, m, metav1.UpdateOptions{})
		require.NoError(t, err)
	}
	require.NoError(t, maps.Delete(ctx, name, metav1.DeleteOptions{}))
	var bodies [][]byte
	for _, s := range streams {
		data, err := io.ReadAll(s.body)
		require.NoError(t, err)
		require.NoError(t, s.body.Close())
		bodies = append(bodies, data)
	}
	require.Equal(t, string(bodies[1]), string(bodies[0]))
	require.Equal(t, bodies[3], bodies[2])
	require.Equal(t, 6, strings.Count(string(bodies[0]), "\n"))
}

// watchStream is the answer to a watch.
type watchStream struct {
	accept string
	body   io.ReadCloser
}

// openWatches opens the same watches twice each, answered by us and by upstream's handlers, all at one revision of the store: the bookmarks at the
// end of the initial events tell it.
func openWatches(ctx context.Context, t *testing.T, c *served, over *http.Client) (streams []watchStream) {
	const query = "?watch=1&labelSelector=team%3Da&timeoutSeconds=1&allowWatchBookmarks=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan"
	revision := func() string {
		list, err := c.CoreV1().ConfigMaps("default").List(ctx, metav1.ListOptions{Limit: 1})
		require.NoError(t, err)
		return list.ResourceVersion
	}
	before := revision()
	for _, accept := range []string{"application/json", "application/json;q=1",
		"application/vnd.kubernetes.protobuf;stream=watch", "application/vnd.kubernetes.protobuf;stream=watch;q=1"} {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.url+"/api/v1/namespaces/default/configmaps"+query, nil)
		require.NoError(t, err)
		req.Header.Set("Accept", accept)
		req.Header.Set("Authorization", "Bearer "+adminToken)
		resp, err := over.Do(req)
		require.NoError(t, err)
		require.Equal(t, http.StatusOK, resp.StatusCode)
		streams = append(streams, watchStream{fmt.Sprint(accept, " ", resp.Header.Get("Content-Type")), resp.Body})
	}
	if revision() == before {
		return streams
	}
	for _, s := range streams { // somebody wrote meanwhile
		require.NoError(t, s.body.Close())
	}
	return openWatches(ctx, t, c, over)
}

func BenchmarkGet(b *testing.B) {
	c := theCluster(b)
	for _, f := range readFormats {
		b.Run(f.ours, func(b *testing.B) { benchmarkPath(b, c, "/api/v1/namespaces/kube-system/services/kube-dns", f.ours) })
	}
}

func BenchmarkList(b *testing.B) {
	c := theCluster(b)
	for _, f := range readFormats {
		b.Run(f.ours, func(b *testing.B) { benchmarkPath(b, c, "/apis/rbac.authorization.k8s.io/v1/clusterroles", f.ours) })
	}
}

func benchmarkPath(b *testing.B, c *cluster, path, accept string) {
	b.ReportAllocs()
	for b.Loop() {
		if w := fetch(b, c, path, accept); w.Code != http.StatusOK {
			b.Fatal(w.Code)
		}
	}
}
