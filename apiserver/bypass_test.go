package apiserver_test

import (
	"context"
	"net/http"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
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

// bypassRequests are requests, the codes of their answers, and whether they go through the filters.
var bypassRequests = []struct {
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
	{"GET", "ships", "", ``, 200, false},
	{"GET", "configmaps", "", ``, 200, false},
	{"GET", "configmaps/none", "", ``, 404, false},
	{"GET", "configmaps?limit=1&labelSelector=a%3Db", "", ``, 200, false},
	{"GET", "configmaps?labelSelector=%25%25", "", ``, 400, false},
	{"GET", "configmaps?resourceVersion=999999999", "", ``, 504, false},
	{"GET", "configmaps?timeoutSeconds=7", "", ``, 200, false},
	{"GET", "configmaps?timeout=7s", "", ``, 200, true},
	{"GET", "configmaps?limit=1&%74imeout=x", "", ``, 400, true},
	{"GET", "pods/p/status", "", ``, 200, false},
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

// TestBypass holds that writes past the filters get the answers of those through them.
func TestBypass(t *testing.T) {
	var config *apiserver.Config
	var long *atomic.Int64
	s := serveWith(t, func(c *apiserver.Config) { config = c }, func(s *apiserver.Server) { long = apiserver.CountLongWays(s) })
	defineShips(t, s.cluster, "/apis/fast.example.com/v1/ships", "fast.example.com")
	_, err := s.RbacV1().ClusterRoleBindings().Create(t.Context(), &rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: "writers"},
		RoleRef:  rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "cluster-admin"},
		Subjects: []rbacv1.Subject{{Kind: "User", APIGroup: rbacv1.GroupName, Name: "jane"}, {Kind: "ServiceAccount", Namespace: "default", Name: "robot"}}}, metav1.CreateOptions{})
	require.NoError(t, err)
	for _, w := range []*fastWriter{
		{name: "root", client: clientFor(t, config, "root", "system:masters")},
		{name: "jane", client: clientFor(t, config, "jane")},
		{name: "robot", client: newClient(t, true), token: robotToken(t, s.cluster)},
	} {
		w.served, w.long, w.spaces = s, long, bothSpaces(t, s.cluster)
		t.Run(w.name, w.all)
	}
	joe := &fastWriter{served: s, long: long, client: clientFor(t, config, "joe"), spaces: bothSpaces(t, s.cluster)}
	before := long.Load()
	require.Equal(t, 403, joe.write(t, 0, "POST", "configmaps", js, js, `{"metadata":{"name":"j"}}`).status)
	require.Equal(t, before+1, long.Load(), "the filters refuse")
}

// robotToken is a token of the service account default/robot.
func robotToken(t testing.TB, c *cluster) string {
	t.Helper()
	ctx := context.Background()
	accounts := c.CoreV1().ServiceAccounts("default")
	_, err := accounts.Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "robot"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	token, err := accounts.CreateToken(ctx, "robot", &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	require.NoError(t, err)
	return token.Status.Token
}

// fastWriter is somebody who sends the same to two namespaces, to one of them the long way.
type fastWriter struct {
	*served
	name, token string
	client      *http.Client
	long        *atomic.Int64
	spaces      [2]string
}

// write sends a request that does or does not say that it goes the long way.
func (f *fastWriter) write(t testing.TB, i int, method, path, contentType, accept, body string) answer {
	t.Helper()
	header := map[string]string{"Content-Type": contentType, "Accept": accept, "User-Agent": "both/1"}
	if i == 1 {
		header["X-Long-Way"] = "1"
	}
	root := "/api/v1"
	if strings.HasPrefix(path, "ships") {
		root = "/apis/fast.example.com/v1"
	}
	return f.ask(t, f.client, request{method: method, path: root + "/namespaces/" + f.spaces[i] + "/" + path, body: body, header: header, token: f.token})
}

// known waits until the user may, and makes a token known.
func (f *fastWriter) known(t testing.TB) {
	t.Helper()
	require.Eventually(t, func() bool {
		return f.ask(t, f.client, request{path: "/api/v1/nodes", token: f.token, header: map[string]string{"X-Long-Way": "1"}}).status == 200
	}, timeout, 5*time.Millisecond)
}

func (f *fastWriter) all(t *testing.T) {
	for _, w := range bypassRequests {
		for _, accept := range []string{runtime.ContentTypeJSON, runtime.ContentTypeProtobuf} {
			if accept == runtime.ContentTypeProtobuf && (w.code == 201 || strings.HasPrefix(w.path, "ships")) {
				continue
			}
			f.known(t)
			before := f.long.Load()
			short := f.write(t, 0, w.method, w.path, w.contentType, accept, w.body)
			if w.long {
				require.Equal(t, before+1, f.long.Load(), "%s %s goes past the filters", w.method, w.path)
			} else {
				require.Equal(t, before, f.long.Load(), "%s %s %s takes the long way", w.method, w.path, w.body)
			}
			full := f.write(t, 1, w.method, w.path, w.contentType, accept, w.body)
			require.Equal(t, w.code, short.status, short.body)
			require.Equal(t, full.status, short.status)
			if accept == runtime.ContentTypeJSON {
				require.Equal(t, steady(full.body), steady(short.body))
			}
			for _, a := range []answer{full, short} {
				require.Len(t, a.header.Get("Audit-Id"), 36)
				if w.method != "GET" || strings.HasPrefix(w.path, "ships") { // reads of built-in kinds are classified only where there are many
					require.NotEmpty(t, a.header.Get("X-Kubernetes-Pf-Flowschema-Uid"), w.path)
				}
				for _, varies := range []string{"Audit-Id", "Date", "Content-Length"} {
					a.header.Del(varies)
				}
			}
			require.Equal(t, full.header, short.header, "%s %s", w.method, w.path)
		}
	}
	for i, path := range []string{"configmaps/m", "configmaps/u", "pods/p", "pods/q"} {
		f.known(t)
		before := f.long.Load()
		var answers []answer
		for space := range f.spaces {
			accept := []string{js, runtime.ContentTypeProtobuf, js, js}[i]
			answers = append(answers, f.write(t, space, "DELETE", path, js, accept, []string{``, `{"gracePeriodSeconds":0}`}[i%2]))
		}
		require.Equal(t, before+1, f.long.Load(), path)
		for _, a := range answers {
			require.Equal(t, 200, a.status, a.body)
			require.Equal(t, answers[0].header.Get("Content-Type"), a.header.Get("Content-Type"))
			require.Equal(t, steady(uidPattern.ReplaceAllString(answers[0].body, "")), steady(uidPattern.ReplaceAllString(a.body, "")))
		}
	}
}

var uidPattern = regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`)
