package apiserver_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"knarr/apiserver"
)

// customWrite is a write, the code of its answer, and whether our path gives that.
type customWrite struct {
	method, path, contentType, body string
	code                            int
	ours                            bool
}

// customWrites are the rows of TestCustomWritesAreUpstreams, which build on one another.
var customWrites = []customWrite{
	{"POST", "ships", js, `{HEAD"metadata":{"name":"m","labels":{"a":"b"}},"spec":{"crew":3,"anything":{"x":[1,2.5,null,"<&>"]}}}`, 201, true},
	{"POST", "ships", js, `{HEAD"metadata":{"name":"m"},"spec":{"crew":3}}`, 409, true},
	{"POST", "ships", js, `{HEAD"metadata":{"name":"held","finalizers":["example.com/f","odd"]},"spec":{"crew":3},"status":{"crew":1}}`, 201, true},
	{"POST", "ships", js, `{HEAD"metadata":{"generateName":"gen-"},"spec":{"crew":3,"holds":[{"name":"aft"},{"name":"fore","tons":1}]}}`, 201, true},
	{"POST", "ships?fieldManager=me", js, `{HEAD"metadata":{"name":"fm"},"spec":{"crew":0,"sail":"lateen"}}`, 201, true},
	{"POST", "ships", js, `{HEAD"metadata":{"name":"u"},"spec":{"crew":3,"nothing":1}}`, 201, false},
	{"POST", "ships?fieldValidation=Strict", js, `{HEAD"metadata":{"name":"u2"},"spec":{"crew":3,"nothing":1}}`, 400, false},
	{"POST", "ships?fieldValidation=Ignore", js, `{HEAD"metadata":{"name":"u3"},"nothing":1,"spec":{"crew":3}}`, 201, false},
	{"POST", "ships?fieldValidation=Strict", js, `{HEAD"metadata":{"name":"strict"},"spec":{"crew":3}}`, 201, true},
	{"POST", "ships", js, `{HEAD"metadata":{"name":"d"},"spec":{"crew":3,"crew":4}}`, 201, false},
	{"POST", "ships", js, `{HEAD"metadata":{"name":"n","annotations":null},"spec":{"crew":3,"sail":null,"built":null}}`, 201, false},
	{"POST", "ships", js, `{HEAD"metadata":{"name":"n2"},"spec":{"crew":3,"built":null}}`, 201, true},
	{"POST", "ships", js, `{HEAD"metadata":{"name":"f"},"spec":{"crew":3.0}}`, 422, true},
	{"POST", "ships", js, `{HEAD"metadata":{"name":"big"},"spec":{"crew":300}}`, 422, true},
	{"POST", "ships", js, `{HEAD"metadata":{"name":"typ"},"spec":{"crew":"x"}}`, 422, true},
	{"POST", "ships", js, `{HEAD"metadata":{"name":"two"},"spec":{"crew":1,"holds":[{"name":"aft"},{"name":"aft"}]}}`, 422, true},
	{"POST", "ships", js, `{HEAD"metadata":{"name":"Bad Name"},"spec":{"crew":3}}`, 422, true},
	{"POST", "ships", js, `{HEAD"metadata":{"name":"raw"},"spec":{"crew":3,"raw":{"apiVersion":"v1","kind":"Pod","metadata":{"name":"x","strange":"y"}}}}`, 201, false},
	{"POST", "ships", js, `{HEAD"metadata":{"name":"ns","namespace":"elsewhere"},"spec":{"crew":3}}`, 400, false},
	{"POST", "ships", js, `{HEAD"metadata":{"name":"own","ownerReferences":[{"apiVersion":"v1","kind":"Pod","name":"p","uid":"1"},{"apiVersion":"v1","kind":"Pod","name":"p","uid":"1"}]},"spec":{"crew":3}}`, 201, false},
	{"POST", "ships", js, `{HEAD"metadata":{"name":"mf","managedFields":[{}]},"spec":{"crew":3}}`, 201, false},
	{"POST", "ships", js, `{"kind":"Ship","metadata":{"name":"no"}}`, 400, false},
	{"POST", "ships", js, `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"no"}}`, 400, false},
	{"POST", "ships", js, `{`, 400, false},
	{"POST", "ships", js, ``, 400, false},
	{"POST", "ships", js, `[]`, 400, false},
	{"POST", "ships", "text/plain", `x`, 415, false},
	{"POST", "ships", "application/yaml", "apiVersion: GROUP/v1\nkind: Ship\nmetadata: {name: yaml}\nspec: {crew: 1}\n", 201, false},
	{"POST", "ships", runtime.ContentTypeProtobuf, `x`, 415, false},
	{"POST", "ships?dryRun=All", js, `{HEAD"metadata":{"name":"dry"},"spec":{"crew":3}}`, 201, false},
	{"PATCH", "ships/m", merge, `{"spec":{"crew":4,"sail":null,"anything":{"y":{"z":null,"w":[null]}}}}`, 200, true},
	{"PATCH", "ships/m", merge, `{"spec":{"crew":4}}`, 200, true},
	{"PATCH", "ships/m", merge, `{"spec":{"holds":[{"name":"fore","tons":2.5}],"port":80}}`, 200, true},
	{"PATCH", "ships/m", merge, `{"spec":{"holds":[{"name":"aft"},{"name":"fore"}],"port":"http"}}`, 200, true},
	{"PATCH", "ships/m?fieldManager=other", merge, `{"metadata":{"labels":{"a":null,"c":"d"},"annotations":{"n":"<&>"}},"spec":{"holds":[{"name":"aft","tons":3}]}}`, 200, true},
	{"PATCH", "ships/m", merge, `{"spec":{"crew":300}}`, 422, true},
	{"PATCH", "ships/m", merge, `{"spec":{"crew":"x"}}`, 422, true},
	{"PATCH", "ships/m", merge, `{"spec":{"holds":[{"name":"aft"},{"name":"aft"}]}}`, 422, true},
	{"PATCH", "ships/m", merge, `{"spec":{"holds":[{"tons":1}]}}`, 422, true},
	{"PATCH", "ships/m", merge, `{"spec":{"nothing":1}}`, 200, false},
	{"PATCH", "ships/m", merge, `{"spec":{"crew":5,"crew":6}}`, 200, false},
	{"PATCH", "ships/m", merge, `{"spec":{"crew":5.0}}`, 422, false},
	{"PATCH", "ships/m", merge, `{"spec":null}`, 200, true},
	{"PATCH", "ships/m", merge, `{"spec":{"crew":5}}`, 200, true},
	{"PATCH", "ships/m", merge, `{"metadata":{"name":"other"}}`, 400, false},
	{"PATCH", "ships/m", merge, `{"metadata":{"resourceVersion":"1"}}`, 409, true},
	{"PATCH", "ships/m", merge, `{"metadata":{"uid":"x"}}`, 422, false},
	{"PATCH", "ships/m", merge, `{"metadata":{"managedFields":[{}]}}`, 200, true},
	{"PATCH", "ships/m", merge, `{"metadata":{"labels":{"team":"x"}}}`, 200, true},
	{"PATCH", "ships/m", merge, `{"metadata":null}`, 400, false},
	{"PATCH", "ships/m", merge, `{"apiVersion":"v1"}`, 422, false},
	{"PATCH", "ships/m", merge, `{"status":{"crew":7}}`, 200, true},
	{"PATCH", "ships/m/status", merge, `{"status":{"crew":7},"spec":{"crew":1},"metadata":{"labels":{"by":"status"}}}`, 200, true},
	{"PATCH", "ships/m/status", merge, `{"status":{"crew":8}}`, 200, true},
	{"PATCH", "ships/m/status?fieldManager=controller", merge, `{"status":{"crew":9}}`, 200, true},
	{"PATCH", "ships/m/status", merge, `{"status":{"crew":"x"}}`, 422, true},
	{"PATCH", "ships/m/status", merge, `{"status":{"nothing":1}}`, 200, false},
	{"PATCH", "ships/m/status", merge, `{"status":null}`, 200, true},
	{"PATCH", "ships/m/scale", merge, `{"spec":{"replicas":2}}`, 200, false},
	{"PATCH", "ships/m", merge, `{`, 400, false},
	{"PATCH", "ships/m", smp, `{}`, 415, false},
	{"PATCH", "ships/absent", merge, `{"spec":{"crew":1}}`, 404, true},
	{"PATCH", "ships/absent/status", merge, `{"status":{"crew":1}}`, 404, true},
	{"PATCH", "ships/m", "application/json-patch+json", `[{"op":"add","path":"/spec/crew","value":5}]`, 200, false},
	{"PATCH", "ships/m?fieldManager=a", "application/apply-patch+yaml", `{HEAD"metadata":{"name":"m"},"spec":{"port":1}}`, 200, false},
	{"PATCH", "ships/m", merge, `{"spec":{"port":2}}`, 200, true},
	{"DELETE", "ships/held", js, ``, 200, true},
	{"DELETE", "ships/held", js, ``, 200, true},
	{"PATCH", "ships/held", merge, `{"spec":{"crew":4}}`, 200, true},
	{"PATCH", "ships/held/status", merge, `{"status":{"crew":4}}`, 200, true},
	{"PATCH", "ships/held", merge, `{"metadata":{"finalizers":null}}`, 200, true},
	{"DELETE", "ships/held", js, ``, 404, true},
	{"DELETE", "ships/m", js, `{"kind":"DeleteOptions","apiVersion":"v1","preconditions":{"uid":"not-this"}}`, 409, true},
	{"DELETE", "ships/m", js, `{"preconditions":{"resourceVersion":"1"}}`, 409, true},
	{"DELETE", "ships/m", js, `{"dryRun":["All"]}`, 200, false},
	{"DELETE", "ships/m", js, `{"propagationPolicy":"Nonsense"}`, 422, false},
	{"DELETE", "ships/m", js, `{`, 400, false},
	{"DELETE", "ships/m", "text/plain", `x`, 415, false},
	{"DELETE", "ships/m", js, `{"propagationPolicy":"Foreground"}`, 200, true},
	{"DELETE", "ships/m", js, `{"gracePeriodSeconds":5,"orphanDependents":false}`, 200, true},
	{"DELETE", "ships/fm", js, `{"gracePeriodSeconds":0,"orphanDependents":false}`, 200, true},
}

// TestCustomWritesAreUpstreams: each write of a custom resource, good or bad, by our path and by upstream's handlers.
func TestCustomWritesAreUpstreams(t *testing.T) {
	c := theCluster(t)
	ctx, ns := place(t, c)
	spaces := bothSpaces(t, c)
	group := ns + ".example.com"
	c.define(t, ctx, shipDefinition(group))
	root := "/apis/" + group + "/v1"
	require.Eventually(t, func() bool { return fetch(t, c, root+"/ships", js).Code == http.StatusOK }, timeout, time.Millisecond)
	require.True(t, apiserver.ServesCustom(c.server, group, "v1", "ships"))
	ways := apiserver.CountCustomLongWays(c.server)
	for i, w := range customWrites {
		t.Run(fmt.Sprintf("%d %s %s", i, w.method, w.path), func(t *testing.T) {
			before := ways.Load()
			code := bothAt(t, c, root, spaces, w.method, w.path, w.contentType, js, func(ns string) []byte {
				return []byte(strings.ReplaceAll(strings.ReplaceAll(w.body, "GROUP", group), "HEAD", `"apiVersion":"`+group+`/v1","kind":"Ship",`))
			})
			require.Equal(t, w.code, code)
			require.Equal(t, w.ours, ways.Load() == before+1, "answered by our path")
		})
	}
	for _, name := range []string{"m", "u", "fm", "f", "n", "n2", "d", "raw"} {
		var stored [2]string
		for i, ns := range spaces {
			stored[i] = steady(ordered(fetch(t, c, root+"/namespaces/"+ns+"/ships/"+name, js).Body.Bytes()))
		}
		require.Equal(t, stored[1], stored[0], "what is stored as %s", name)
	}
}

// TestCustomPatchesWithoutEffect: a patch whose effect is taken back leaves the revision as it is, also when its manager's time would be new.
func TestCustomPatchesWithoutEffect(t *testing.T) {
	c := theCluster(t)
	ctx, ns := place(t, c)
	group := ns + ".example.com"
	d := shipDefinition(group)
	for _, v := range d.Spec.Versions {
		v.Schema.OpenAPIV3Schema.Properties["extra"] = apiextensionsv1.JSONSchemaProps{Type: "string"}
	}
	c.define(t, ctx, d)
	ship := "/apis/" + group + "/v1/namespaces/" + ns + "/ships"
	require.Eventually(t, func() bool { return fetch(t, c, ship, js).Code == http.StatusOK }, timeout, time.Millisecond)
	send(t, c, http.MethodPost, ship, js, fmt.Appendf(nil, `{"apiVersion":"%s/v1","kind":"Ship","metadata":{"name":"s"},"spec":{"crew":1}}`, group))
	patch := func(query string) metav1.ObjectMeta { // upstream's strategy of statuses takes extra back, but not who owns it
		w := answerTo(c, http.MethodPatch, ship+"/s/status"+query, merge, js, "x", []byte(`{"extra":"y"}`))
		require.Equal(t, http.StatusOK, w.Code, "%s", w.Body)
		return metaOf(t, w)
	}
	first := patch("")
	require.Len(t, first.ManagedFields, 2)
	written := first.ManagedFields[1].Time.Time
	require.Eventually(t, func() bool { return time.Since(written) > time.Second }, timeout, 10*time.Millisecond, "times have a precision of a second")
	require.Equal(t, first, patch(""))
	require.Equal(t, first, patch("?pretty=false"), "upstream's handler says the same")
}

// TestGeneratedCustomWritesAreUpstreams makes and patches generated ships, good and bad, by our path and by upstream's handlers.
func TestGeneratedCustomWritesAreUpstreams(t *testing.T) {
	c := theCluster(t)
	ctx, ns := place(t, c)
	spaces := bothSpaces(t, c)
	group := ns + ".example.com"
	c.define(t, ctx, shipDefinition(group))
	root := "/apis/" + group + "/v1"
	require.Eventually(t, func() bool { return fetch(t, c, root+"/ships", js).Code == http.StatusOK }, timeout, time.Millisecond)
	ways := apiserver.CountCustomLongWays(c.server)
	writes := int64(0)
	write := func(method, path, contentType string, body any) int {
		data, err := json.Marshal(body)
		require.NoError(t, err)
		writes++
		return bothAt(t, c, root, spaces, method, path, contentType, js, func(string) []byte { return data })
	}
	made := 0
	ship := func(r *rand.Rand, name string) map[string]any {
		out := shipTree(r, group+"/v1", name)
		spec := out["spec"].(map[string]any)
		for _, odd := range []string{"unknown", "raw"} { // for upstream's handlers
			if r.Intn(5) > 0 {
				delete(spec, odd)
			}
		}
		if r.Intn(5) > 0 {
			maps.DeleteFunc(spec, func(_ string, v any) bool { return v == nil })
		}
		return out
	}
	for i := range 150 {
		r := rand.New(rand.NewSource(int64(i)))
		name := fmt.Sprint("s", i)
		if write(http.MethodPost, "ships", js, ship(r, name)) != http.StatusCreated {
			continue
		}
		made++
		for range 3 {
			patch := ship(r, name)
			for _, some := range []string{"spec", "metadata", "status"} {
				if r.Intn(3) == 0 {
					delete(patch, some)
				}
			}
			manager := []string{"a", "b", "c"}[r.Intn(3)]
			write(http.MethodPatch, "ships/"+name+"?fieldManager="+manager, merge, patch)
			write(http.MethodPatch, "ships/"+name+"/status?fieldManager="+manager, merge, map[string]any{"status": []any{nil, map[string]any{"crew": r.Intn(3)}, map[string]any{"crew": "x"}}[r.Intn(3)]})
		}
	}
	require.Greater(t, made, 50)
	long := ways.Load() - writes // upstream's half of each pair goes there anyway
	t.Logf("%d ships, %d writes, of which %d were left to upstream's handlers", made, writes, long)
	require.Less(t, long, writes*2/3)
	for i := range 150 { // what is stored
		path := fmt.Sprint("/ships/s", i)
		var stored [2]string
		for i, ns := range spaces {
			stored[i] = steady(ordered(fetch(t, c, root+"/namespaces/"+ns+path, js).Body.Bytes()))
		}
		require.Equal(t, stored[1], stored[0], path)
	}
}
