package apiserver_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apiserver/pkg/authentication/user"

	"knarr/client"
)

// answerTo is what a request got: code, body, content type and warnings.
func answerTo(c *cluster, method, path, contentType, accept, agent string, body []byte) *httptest.ResponseRecorder {
	req := httptest.NewRequest(method, path, bytes.NewReader(body))
	req.Header.Set("Content-Type", contentType)
	req.Header.Set("Accept", accept)
	req.Header.Set("User-Agent", agent)
	req = req.WithContext(client.WithUser(req.Context(), client.User("admin", user.SystemPrivilegedGroup)))
	w := httptest.NewRecorder()
	c.handler.ServeHTTP(w, req)
	return w
}

// varying is what differs between two writes of the same.
var varying = regexp.MustCompile(`"(uid|creationTimestamp|resourceVersion|time|namespace)":"[^"]*"|namespaces/[a-z0-9-]+/|in record \([^)]*\)|both-[a-z0-9]+|gen-[a-z0-9]{5}|kube-api-access-[a-z0-9]{5}|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ`)

func steady(s string) string { return varying.ReplaceAllString(s, "~") }

// ordered sorts an object's managed fields by who manages them: by time, two writes of the same have them in another order where a second ended between them.
func ordered(body []byte) string {
	var obj unstructured.Unstructured
	if json.Unmarshal(body, &obj) != nil {
		return string(body)
	}
	fields := obj.GetManagedFields()
	slices.SortStableFunc(fields, func(a, b metav1.ManagedFieldsEntry) int {
		return strings.Compare(fmt.Sprint(a.Manager, a.Operation, a.Subresource), fmt.Sprint(b.Manager, b.Operation, b.Subresource))
	})
	obj.SetManagedFields(fields)
	data, err := json.Marshal(&obj)
	if err != nil {
		return err.Error()
	}
	return string(data)
}

// both sends a write to our path and to upstream's handlers, which take a request that says how to indent, in two
// namespaces, and compares what comes back and what is stored.
func both(t *testing.T, c *cluster, spaces [2]string, method, path, contentType, accept string, body func(namespace string) []byte) int {
	t.Helper()
	return bothAt(t, c, "/api/v1", spaces, method, path, contentType, accept, body)
}

// bothAt is both for a group version's root.
func bothAt(t *testing.T, c *cluster, root string, spaces [2]string, method, path, contentType, accept string, body func(namespace string) []byte) int {
	t.Helper()
	separator := "?"
	if strings.Contains(path, "?") {
		separator = "&"
	}
	var got [2]*httptest.ResponseRecorder
	for i, ns := range spaces {
		p := root + "/namespaces/" + ns + "/" + path
		if i == 1 {
			p += separator + "pretty=false"
		}
		got[i] = answerTo(c, method, p, contentType, accept, "both/1", body(ns))
	}
	require.Equal(t, got[1].Code, got[0].Code, "%s\n%s", got[0].Body, got[1].Body)
	require.Equal(t, got[1].Header()["Content-Type"], got[0].Header()["Content-Type"])
	require.Equal(t, got[1].Header()["Warning"], got[0].Header()["Warning"])
	if accept == runtime.ContentTypeJSON {
		theirs, ours := steady(got[1].Body.String()), steady(got[0].Body.String())
		if theirs != ours {
			theirs, ours = steady(ordered(got[1].Body.Bytes())), steady(ordered(got[0].Body.Bytes()))
		}
		require.Equal(t, theirs, ours, "%s", body(spaces[0]))
	} else {
		require.Equal(t, got[1].Body.Bytes()[:20], got[0].Body.Bytes()[:20])
	}
	return got[0].Code
}

func bothSpaces(t testing.TB, c *cluster) [2]string {
	t.Helper()
	var out [2]string
	for i := range out {
		ns, err := c.CoreV1().Namespaces().Create(context.Background(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "both-"}}, metav1.CreateOptions{})
		require.NoError(t, err)
		_, err = c.CoreV1().ServiceAccounts(ns.Name).Create(context.Background(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{})
		require.NoError(t, err)
		out[i] = ns.Name
	}
	return out
}

const podTail = `"spec":{"containers":[{"name":"c","image":"i:1","ports":[{"containerPort":80},{"containerPort":53,"protocol":"UDP"}],"resources":{"limits":{"cpu":"1500m"}}}],"tolerations":[{"key":"k","operator":"Exists"}]}}`

// bothWrite is a write and the code of its answer.
type bothWrite struct {
	method, path, contentType, body string
	code                            int
}

// bothDeletions remove what the rows of TestWritesAreUpstreams have made.
var bothDeletions = []bothWrite{
	{"DELETE", "configmaps/m", runtime.ContentTypeJSON, ``, 200}, // has a finalizer
	{"DELETE", "configmaps/m", runtime.ContentTypeJSON, ``, 200},
	{"PATCH", "configmaps/m", string(types.MergePatchType), `{"metadata":{"finalizers":null}}`, 200},
	{"DELETE", "configmaps/m", runtime.ContentTypeJSON, ``, 404},
	{"DELETE", "configmaps/u", runtime.ContentTypeJSON, ``, 200},
	{"DELETE", "configmaps/fm", runtime.ContentTypeJSON, `{"kind":"DeleteOptions","apiVersion":"v1","preconditions":{"uid":"not-this"}}`, 409},
	{"DELETE", "configmaps/fm", runtime.ContentTypeJSON, `{"preconditions":{"resourceVersion":"1"}}`, 409},
	{"DELETE", "configmaps/fm", runtime.ContentTypeJSON, `{"propagationPolicy":"Foreground"}`, 200},
	{"DELETE", "configmaps/d", runtime.ContentTypeJSON, `{"propagationPolicy":"Nonsense"}`, 422},
	{"DELETE", "configmaps/d", runtime.ContentTypeJSON, `{"dryRun":["All"]}`, 200},
	{"DELETE", "configmaps/d", runtime.ContentTypeJSON, `{`, 400},
	{"DELETE", "configmaps/d", runtime.ContentTypeJSON, `{"kind":"Pod","apiVersion":"v1"}`, 400},
	{"DELETE", "configmaps/d", "text/plain", `x`, 415},
	{"DELETE", "configmaps/d?propagationPolicy=Orphan", runtime.ContentTypeJSON, ``, 200},
	{"DELETE", "configmaps/own", "application/yaml", `gracePeriodSeconds: 0`, 200},
	{"DELETE", "secrets/s", runtime.ContentTypeJSON, `{"orphanDependents":false}`, 200},
	{"DELETE", "events/e", runtime.ContentTypeJSON, `{"gracePeriodSeconds":-1}`, 200},
	{"POST", "pods", runtime.ContentTypeJSON, `{"metadata":{"name":"placed"},"spec":{"nodeName":"n","containers":[{"name":"c","image":"i"}]}}`, 201},
	{"DELETE", "pods/placed", runtime.ContentTypeJSON, `{"orphanDependents":false}`, 202},
	{"DELETE", "pods/placed", runtime.ContentTypeJSON, `{"gracePeriodSeconds":60}`, 200},
	{"DELETE", "pods/placed", runtime.ContentTypeJSON, `{"gracePeriodSeconds":10}`, 200},
	{"DELETE", "pods/placed", runtime.ContentTypeJSON, `{"gracePeriodSeconds":0}`, 200},
	{"DELETE", "pods/placed", runtime.ContentTypeJSON, `{"gracePeriodSeconds":0}`, 404},
	{"DELETE", "pods/p4", runtime.ContentTypeJSON, ``, 200},
	{"DELETE", "pods/p", runtime.ContentTypeJSON, `{"gracePeriodSeconds":0,"propagationPolicy":"Background"}`, 200},
}

// TestWritesAreUpstreams: each write, good or bad, by our path and by upstream's handlers.
func TestWritesAreUpstreams(t *testing.T) {
	c := theCluster(t)
	spaces := bothSpaces(t, c)
	for i, w := range append([]bothWrite{
		{"POST", "configmaps", js, `{"metadata":{"name":"m","labels":{"a":"b"}},"data":{"x":"y"}}`, 201},
		{"POST", "configmaps", js, `{"metadata":{"name":"m"}}`, 409},
		{"POST", "configmaps", js, `{"metadata":{"generateName":"gen-"},"data":{"x":"y"},"binaryData":{"b":"AAE="}}`, 201},
		{"POST", "configmaps", js, `{"metadata":{"name":"Bad Name"}}`, 422},
		{"POST", "configmaps", js, `{"metadata":{"name":"u"},"nothing":1}`, 201},
		{"POST", "configmaps?fieldValidation=Strict", js, `{"metadata":{"name":"u2"},"nothing":1}`, 400},
		{"POST", "configmaps?fieldValidation=Ignore", js, `{"metadata":{"name":"u3"},"nothing":1}`, 201},
		{"POST", "configmaps?fieldManager=me", js, `{"metadata":{"name":"fm"}}`, 201},
		{"POST", "configmaps", js, `{"metadata":{"name":"d"},"data":{"a":"1","a":"2"}}`, 201},
		{"POST", "configmaps", js, `{"metadata":{"name":"d2","namespace":"elsewhere"}}`, 400},
		{"POST", "configmaps", js, `{"kind":"Secret","apiVersion":"v1","metadata":{"name":"k"}}`, 400},
		{"POST", "configmaps", js, `{`, 400},
		{"POST", "configmaps", js, ``, 400},
		{"POST", "configmaps", "text/plain", `x`, 415},
		{"POST", "configmaps?dryRun=All", js, `{"metadata":{"name":"dry"}}`, 201},
		{"POST", "configmaps", js, `{"metadata":{"name":"own","ownerReferences":[{"apiVersion":"v1","kind":"Pod","name":"p","uid":"1"},{"apiVersion":"v1","kind":"Pod","name":"p","uid":"1"}]}}`, 201},
		{"POST", "configmaps", js, `{"metadata":{"name":"mf","managedFields":[{}]}}`, 201},
		{"POST", "configmaps", js, `{"metadata":{"name":"html","annotations":{"a/b":"<&>","ü":"x"}}}`, 422},
		{"POST", "configmaps", js, `{"metadata":{"name":"html2","annotations":{"a/b":"<&>\u2028"}},"data":{"k":"\u0000é"}}`, 201},
		{"PATCH", "configmaps/m", merge, `{"data":{"z":"1","x":null}}`, 200},
		{"PATCH", "configmaps/m", merge, `{"data":{"z":"1"}}`, 200},
		{"PATCH", "configmaps/m", smp, `{"metadata":{"labels":{"c":"d","a":null}},"data":{"q":"r"}}`, 200},
		{"PATCH", "configmaps/m", smp, `{"metadata":{"name":"other"}}`, 400},
		{"PATCH", "configmaps/m", smp, `{"metadata":{"managedFields":[{}]}}`, 200},
		{"PATCH", "configmaps/m", smp, `{"metadata":{"resourceVersion":"1"}}`, 409},
		{"PATCH", "configmaps/m", smp, `{"immutable":"x"}`, 422},
		{"PATCH", "configmaps/m", smp, `{"nothing":"x"}`, 200},
		{"PATCH", "configmaps/m", smp, `{"data":`, 400},
		{"PATCH", "configmaps/absent", smp, `{"data":{"a":"b"}}`, 404},
		{"PATCH", "configmaps/m", "application/json-patch+json", `[{"op":"add","path":"/data/j","value":"k"}]`, 200},
		{"PATCH", "configmaps/m", smp, `{"metadata":{"finalizers":["a.b/c"]}}`, 200},
		{"POST", "secrets", js, `{"metadata":{"name":"s"},"stringData":{"a":"b"},"data":{"c":"AAE="}}`, 201},
		{"PATCH", "secrets/s", smp, `{"stringData":{"a":"c"}}`, 200},
		{"POST", "pods", js, `{"metadata":{"name":"p"},` + podTail, 201},
		{"POST", "pods", js, `{"metadata":{"name":"p2"},"spec":{"containers":[{"name":"c"}]}}`, 422},
		{"POST", "pods", js, `{"metadata":{"name":"p3"},"spec":{"serviceAccountName":"absent","containers":[{"name":"c","image":"i"}]}}`, 403},
		{"POST", "pods", js, `{"metadata":{"name":"p4"},"spec":{"hostNetwork":true,"nodeSelector":{"beta.kubernetes.io/os":"linux"},"containers":[{"name":"c","image":"i","ports":[{"containerPort":80,"hostPort":80}]}],"securityContext":{"fsGroup":1}}}`, 201},
		{"PATCH", "pods/p/status", smp, `{"status":{"phase":"Running","conditions":[{"type":"Ready","status":"True","lastTransitionTime":"2026-01-01T00:00:00Z"},{"type":"Initialized","status":"True"}]}}`, 200},
		{"PATCH", "pods/p/status", smp, `{"status":{"$setElementOrder/conditions":[{"type":"Initialized"},{"type":"Ready"}],"conditions":[{"type":"Ready","status":"False","reason":"x"}]}}`, 200},
		{"PATCH", "pods/p/status", smp, `{"status":{"conditions":[{"type":"Ready","$patch":"delete"}],"podIPs":[{"ip":"10.0.0.1"}],"podIP":"10.0.0.1"}}`, 200},
		{"PATCH", "pods/p/status", smp, `{"spec":{"nodeName":"n"},"metadata":{"labels":{"by":"status"}},"status":{"message":"m"}}`, 200},
		{"PATCH", "pods/p/status", merge, `{"status":{"containerStatuses":[{"name":"c","ready":true,"restartCount":0,"image":"i","imageID":"x","state":{"running":{"startedAt":"2026-01-01T00:00:00Z"}}}]}}`, 200},
		{"PATCH", "pods/p/status", smp, `{"status":{"phase":"Running"}}`, 200},
		{"PATCH", "pods/p/status", smp, `{"metadata":{"uid":"not-this"},"status":{"phase":"Failed"}}`, 422},
		{"PATCH", "pods/p/status", smp, `{"status":{"phas":"Failed"}}`, 200},
		{"PATCH", "pods/p/status?fieldValidation=Strict", smp, `{"status":{"phas":"Failed"}}`, 422},
		{"PATCH", "pods/p", smp, `{"spec":{"containers":[{"name":"c","image":"i:2"}]}}`, 200},
		{"PATCH", "pods/p", smp, `{"spec":{"containers":[{"name":"d","image":"i:2"}]}}`, 422},
		{"PATCH", "pods/p/status", "application/apply-patch+yaml", `{}`, 422},
		{"POST", "events", js, `{"metadata":{"name":"e"},"involvedObject":{"kind":"Pod","name":"p","namespace":"NS"},"reason":"r","message":"m","type":"Normal","firstTimestamp":"2026-01-01T00:00:00Z"}`, 201},
		{"PATCH", "events/e", smp, `{"count":2}`, 200},
	}, bothDeletions...) {
		t.Run(fmt.Sprintf("%d %s %s", i, w.method, w.path), func(t *testing.T) {
			code := both(t, c, spaces, w.method, w.path, w.contentType, js, func(ns string) []byte {
				return []byte(strings.ReplaceAll(w.body, "NS", ns))
			})
			require.Equal(t, w.code, code)
		})
	}
	for _, kind := range []string{"configmaps", "secrets", "pods", "events"} {
		var lists [2]string
		for i, ns := range spaces {
			w := answerTo(c, http.MethodGet, "/api/v1/namespaces/"+ns+"/"+kind, js, js, "both/1", nil)
			_, lists[i], _ = strings.Cut(steady(w.Body.String()), `"items":`)
		}
		require.NotEmpty(t, lists[0])
		require.Equal(t, lists[1], lists[0], "what is stored")
	}
	require.Equal(t, 201, both(t, c, spaces, "POST", "pods", runtime.ContentTypeProtobuf, runtime.ContentTypeProtobuf,
		func(string) []byte {
			pod := benchPod("proto")
			pod.Spec.ServiceAccountName = ""
			return encodeProto(t, pod)
		}))
}
