package apiserver_test

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	crdclient "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/utils/ptr"

	"knarr/apiserver"
)

// shipDefinition is a custom resource with much of what a structural schema can say, stored as v1 and also served as v2, in a group.
func shipDefinition(group string) *apiextensionsv1.CustomResourceDefinition {
	d := fuzzDefinition()
	d.Name, d.Spec.Group = "ships."+group, group
	d.Spec.Names.ListKind = "Fleet"
	second := *d.Spec.Versions[0].DeepCopy()
	second.Name, second.Storage = "v2", false
	delete(second.Schema.OpenAPIV3Schema.Properties["spec"].Properties, "built")
	second.SelectableFields = []apiextensionsv1.SelectableField{{JSONPath: ".spec.crew"}} // the same for all versions would be refused
	d.Spec.Versions = append(d.Spec.Versions, second)
	return d
}

// tree is a value of any JSON type.
func tree(r *rand.Rand, depth int) any {
	switch n := r.Intn(9); {
	case n == 0:
		return nil
	case n == 1:
		return r.Intn(2) == 0
	case n == 2:
		return r.Int63n(1<<60) - 1<<59
	case n == 3:
		return float64(r.Intn(1000)) / 8
	case n < 6 || depth == 0:
		return []string{"", "a", "<b>&", "\u2028\"\\", "日本", "2026-01-01T00:00:00Z"}[r.Intn(6)]
	case n == 6:
		out := []any{}
		for range r.Intn(3) {
			out = append(out, tree(r, depth-1))
		}
		return out
	}
	out := map[string]any{}
	for range r.Intn(4) {
		out[[]string{"a", "B", "c.d/e", "x<y", "ü", "apiVersion", "kind", "metadata"}[r.Intn(8)]] = tree(r, depth-1)
	}
	return out
}

// shipTree is a ship of a schema like fuzzDefinition's; now and then with something that this does not allow or that it prunes.
func shipTree(r *rand.Rand, apiVersion, name string) map[string]any {
	spec := map[string]any{"crew": int64(r.Intn(9)), "anything": map[string]any{"x": tree(r, 3)}}
	some := func(key string, value any) {
		if r.Intn(2) == 0 {
			spec[key] = value
		}
	}
	some("sail", []any{"square", "lateen", "<&>", nil}[r.Intn(4)])
	some("port", []any{"http", int64(80), nil, 1.5}[r.Intn(4)])
	some("built", []any{"2026-01-01T00:00:00Z", nil}[r.Intn(2)])
	some("unknown", tree(r, 2))
	some("raw", map[string]any{"apiVersion": "v1", "kind": "Pod", "metadata": map[string]any{"name": "p", "labels": map[string]any{"a": "b"}, "strange": "x"}, "spec": tree(r, 2)})
	some("holds", []any{map[string]any{"name": "fore", "tons": []any{1.5, int64(2), nil}[r.Intn(3)]}, map[string]any{"name": []string{"aft", "fore"}[min(r.Intn(8), 1)^1]}})
	meta := map[string]any{"name": name, "labels": map[string]any{"team": []string{"a", "b"}[r.Intn(2)]}}
	if r.Intn(3) == 0 {
		meta["annotations"] = map[string]any{"example.com/note": "<&> \u2028"}
		meta["ownerReferences"] = []any{map[string]any{"apiVersion": "v1", "kind": "Node", "name": "n", "uid": "u", "controller": true}}
	}
	out := map[string]any{"apiVersion": apiVersion, "kind": "Ship", "metadata": meta, "spec": spec}
	if r.Intn(4) == 0 {
		out["status"] = map[string]any{"crew": int64(1)}
	}
	return out
}

// customReads are reads of a collection whose answers have to be upstream's.
var customReads = []string{"", "?limit=2", "?labelSelector=team%3Da", "?fieldSelector=metadata.name%3Ds3", "?fieldSelector=spec.sail%3Dsquare", "?fieldSelector=spec.crew%3D1",
	"?limit=3&labelSelector=team", "?resourceVersion=0", "?resourceVersion=99999999", "?continue=x", "/s1", "/s2", "/s5", "/missing", "/s1?resourceVersion=x", "/s1/status", "/s1/scale"}

// sameReads compares our answers with upstream's.
func sameReads(t *testing.T, c *cluster, collection string) {
	t.Helper()
	or := struct{ ours, upstream string }{readFormats[1].ours + "," + readFormats[0].ours, readFormats[1].upstream + "," + readFormats[0].upstream}
	for _, query := range customReads {
		formats := []struct{ ours, upstream string }{readFormats[0], or}
		if len(query) > len("/s1") {
			formats = formats[:1]
		}
		for _, f := range formats {
			ours, theirs := fetch(t, c, collection+query, f.ours), fetch(t, c, collection+query, f.upstream)
			require.Equal(t, theirs.Code, ours.Code, query)
			require.Equal(t, theirs.Header()["Content-Type"], ours.Header()["Content-Type"], query)
			require.Equal(t, theirs.Body.String(), ours.Body.String(), query)
		}
	}
}

// TestCustomReadsAreUpstreams reads many ships, after each change of their definition, by our path and by upstream's handlers.
func TestCustomReadsAreUpstreams(t *testing.T) {
	c := theCluster(t)
	_, ns := place(t, c)
	ctx := t.Context() // all of it takes long on a busy machine
	group := ns + ".example.com"
	c.define(t, ctx, shipDefinition(group))
	root := "/apis/" + group + "/v1/namespaces/" + ns + "/ships"
	require.Eventually(t, func() bool { return fetch(t, c, root, runtime.ContentTypeJSON).Code == http.StatusOK }, timeout, time.Millisecond)
	made := 0
	for i := range 40 {
		body, err := json.Marshal(shipTree(rand.New(rand.NewSource(int64(i))), group+"/v1", fmt.Sprint("s", i)))
		require.NoError(t, err)
		if answerTo(c, http.MethodPost, root, runtime.ContentTypeJSON, runtime.ContentTypeJSON, "x", body).Code == http.StatusCreated {
			made++
		}
	}
	require.Greater(t, made, 15)
	definitions := crdclient.NewForConfigOrDie(restConfig(c)).ApiextensionsV1().CustomResourceDefinitions()
	changes := []func(*apiextensionsv1.CustomResourceDefinition){
		func(*apiextensionsv1.CustomResourceDefinition) {},
		func(d *apiextensionsv1.CustomResourceDefinition) { // another default, a field less
			spec := d.Spec.Versions[0].Schema.OpenAPIV3Schema.Properties["spec"]
			spec.Properties["sail"] = apiextensionsv1.JSONSchemaProps{Type: "string", Default: &apiextensionsv1.JSON{Raw: []byte(`"none"`)}}
			spec.Properties["deck"] = apiextensionsv1.JSONSchemaProps{Type: "integer", Default: &apiextensionsv1.JSON{Raw: []byte(`1`)}}
			delete(spec.Properties, "port")
		},
		func(d *apiextensionsv1.CustomResourceDefinition) { // what upstream's handler has to warn of
			d.Spec.Versions[0].Deprecated = true
		},
		func(d *apiextensionsv1.CustomResourceDefinition) { // the other version is stored: old objects are converted
			d.Spec.Versions[0].Deprecated = false
			d.Spec.Versions[0].Storage, d.Spec.Versions[1].Storage = false, true
		},
		func(d *apiextensionsv1.CustomResourceDefinition) { d.Spec.Versions[0].Served = false },
	}
	ours := []string{"v1", "v1", "", "v2", "v2"}
	for i, change := range changes {
		d, err := definitions.Get(ctx, "ships."+group, metav1.GetOptions{})
		require.NoError(t, err)
		change(d)
		d, err = definitions.Update(ctx, d, metav1.UpdateOptions{})
		require.NoError(t, err)
		require.Eventually(t, func() bool {
			fetch(t, c, strings.Replace(root, "/v1/", "/v2/", 1), readFormats[0].upstream) // which has upstream's handler look at the definition
			return apiserver.KnowsDefinition(c.server, d.Name, d.Generation)
		}, timeout, time.Millisecond)
		for _, version := range []string{"v1", "v2"} {
			collection := strings.Replace(root, "/v1/", "/"+version+"/", 1)
			sameReads(t, c, collection)
			require.Equal(t, version == ours[i], apiserver.ServesCustom(c.server, group, version, "ships"), "step %d, %s", i, version)
		}
		sameReads(t, c, "/apis/"+group+"/v1/ships")
	}
	require.NoError(t, definitions.Delete(ctx, "ships."+group, metav1.DeleteOptions{}))
	require.Eventually(t, func() bool { return apiserver.KnowsDefinition(c.server, "ships."+group, 0) }, timeout, time.Millisecond)
	sameReads(t, c, root)
}

// TestCustomReadsSwitchAtOnce reads one ship without pause while its definition gets one default after another: no answer is older than one before.
func TestCustomReadsSwitchAtOnce(t *testing.T) {
	c := theCluster(t)
	ctx, ns := place(t, c)
	group := ns + ".example.com"
	d := definition(group)
	root := "/apis/" + group + "/v1/namespaces/" + ns + "/ships"
	c.define(t, ctx, d)
	require.Eventually(t, func() bool { return fetch(t, c, root, runtime.ContentTypeJSON).Code == http.StatusOK }, timeout, time.Millisecond)
	send(t, c, http.MethodPost, root, runtime.ContentTypeJSON, []byte(strings.ReplaceAll(string(shipBody("s")), "budget.example.com", group)))
	const steps = 20
	step := func() int {
		var ship struct {
			Spec struct{ Step *int }
		}
		w := fetch(t, c, root+"/s", runtime.ContentTypeJSON)
		require.NoError(t, json.Unmarshal(w.Body.Bytes(), &ship), "%s", w.Body)
		return ptr.Deref(ship.Spec.Step, 0)
	}
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			for last := 0; last < steps && ctx.Err() == nil; {
				now := step()
				if now < last {
					t.Errorf("step %d after %d", now, last)
					return
				}
				last = now
			}
		})
	}
	definitions := crdclient.NewForConfigOrDie(restConfig(c)).ApiextensionsV1().CustomResourceDefinitions()
	for i := 1; i <= steps; {
		d, err := definitions.Get(ctx, d.Name, metav1.GetOptions{})
		require.NoError(t, err)
		d.Spec.Versions[0].Schema.OpenAPIV3Schema.Properties["spec"].Properties["step"] = apiextensionsv1.JSONSchemaProps{
			Type: "integer", Default: &apiextensionsv1.JSON{Raw: fmt.Append(nil, i)}}
		if _, err := definitions.Update(ctx, d, metav1.UpdateOptions{}); err == nil { // else one of the controllers was before us
			i++
		}
	}
	wg.Wait()
	require.NoError(t, ctx.Err(), "the newest default was never seen")
}

// TestCustomWatchFramesAreUpstreams compares the bytes of watches of a custom resource.
func TestCustomWatchFramesAreUpstreams(t *testing.T) {
	s := serve(t, func(*apiserver.Config) {})
	ctx, ns := place(t, s.cluster)
	s.define(t, ctx, shipDefinition(ns+".example.com"))
	root := "/apis/" + ns + ".example.com/v1/namespaces/" + ns + "/ships"
	require.Eventually(t, func() bool { return fetch(t, s.cluster, root, runtime.ContentTypeJSON).Code == http.StatusOK }, timeout, time.Millisecond)
	write := func(method, path, contentType, body string) {
		send(t, s.cluster, method, path, contentType, []byte(strings.ReplaceAll(body, "GROUP", ns+".example.com")))
	}
	write(http.MethodPost, root, runtime.ContentTypeJSON, `{"apiVersion":"GROUP/v1","kind":"Ship","metadata":{"name":"s","labels":{"team":"a"}},"spec":{"crew":2,"anything":{"x":"<&>"}}}`)
	query := "?watch=1&labelSelector=team%3Da&timeoutSeconds=1&allowWatchBookmarks=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan"
	var bodies []io.ReadCloser
	for _, accept := range []string{readFormats[0].ours, readFormats[0].upstream} {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url+root+query, nil)
		require.NoError(t, err)
		req.Header.Set("Accept", accept)
		req.Header.Set("Authorization", "Bearer "+adminToken)
		resp, err := newClient(t, true).Do(req)
		require.NoError(t, err)
		require.Equal(t, http.StatusOK, resp.StatusCode)
		require.Equal(t, "application/json", resp.Header.Get("Content-Type"))
		bodies = append(bodies, resp.Body)
	}
	require.True(t, apiserver.ServesCustom(s.server, ns+".example.com", "v1", "ships"))
	for _, team := range []string{"a", "b", "a"} {
		write(http.MethodPatch, root+"/s", "application/merge-patch+json", `{"metadata":{"labels":{"team":"`+team+`"},"annotations":{"n":"`+fmt.Sprint(team)+`"}}}`)
	}
	write(http.MethodDelete, root+"/s", runtime.ContentTypeJSON, "")
	var frames [2]string
	for i, b := range bodies {
		data, err := io.ReadAll(b)
		require.NoError(t, err)
		require.NoError(t, b.Close())
		frames[i] = string(data)
	}
	require.Equal(t, frames[1], frames[0])
	require.Equal(t, 6, strings.Count(frames[0], "\n"), frames[0])
}
