package apiserver_test

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"path"
	"strings"
	"testing"
	"unicode/utf8"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/authentication/user"

	"knarr/client"
)

// Fuzz targets: see docs/fuzzing.md. Each sends requests through the whole pipeline, and the harness holds every answer to
// what must be true of all; what a target asserts beyond that stands at the target.

var fieldValidations = []string{"", "?fieldValidation=Ignore", "?fieldValidation=Warn", "?fieldValidation=Strict"}

// and appends a parameter to a query.
func and(query, parameter string) string {
	if query == "" {
		return "?" + parameter
	}
	return query + "&" + parameter
}

// FuzzWrite sends bodies in every encoding to create and update objects of many kinds. What is created can be read and
// deleted again.
func FuzzWrite(f *testing.F) {
	c := fuzzCluster(f)
	for i, k := range c.kinds {
		for j, e := range c.encodings {
			if body := k.encode(f, e); body != nil {
				f.Add(uint8(i), uint8(j), uint8(i+j)%4, false, body)
				f.Add(uint8(i), uint8(j), uint8(i+j)%4, true, body)
			}
		}
	}
	f.Fuzz(func(t *testing.T, kind, encoding, validation uint8, update bool, body []byte) {
		k, e := c.kinds[int(kind)%len(c.kinds)], c.encodings[int(encoding)%len(c.encodings)]
		query := fieldValidations[int(validation)%len(fieldValidations)]
		if update && !k.passing {
			c.do(t, "PUT", k.path+"/"+fuzzName+and(query, "dryRun=All"), e.contentType, jsonType, body)
			return
		}
		if k.dry || !utf8.Valid(body) { // a name that is no UTF-8 cannot be told from the answer
			k.dry = true
			query = and(query, "dryRun=All")
		}
		w := c.do(t, "POST", k.path+query, e.contentType, jsonType, body)
		if w.Code != http.StatusCreated || k.dry || k.passing {
			return
		}
		made := k.path + "/" + url.PathEscape(metaOf(t, w).Name)
		if w := c.do(t, "GET", made, jsonType, "application/json;q=1", nil); w.Code != http.StatusOK {
			t.Fatalf("%s was made and cannot be read: %d %s", made, w.Code, w.Body)
		}
		c.remove(t, made)
	})
}

// patchTypes are the ways of patching.
var patchTypes = []string{"application/json-patch+json", "application/merge-patch+json", "application/strategic-merge-patch+json", "application/apply-patch+yaml"}

// patchSeeds are patches that work on objects of most kinds, by patch type.
var patchSeeds = [][]string{
	{
		`[{"op":"add","path":"/metadata/labels/x","value":"y"},{"op":"test","path":"/metadata/name","value":"seed"}]`,
		`[{"op":"copy","from":"/metadata/labels","path":"/metadata/annotations"},{"op":"move","from":"/metadata/labels/app","path":"/metadata/labels/a~1b~0"}]`,
		`[{"op":"remove","path":"/metadata/labels/tier"},{"op":"replace","path":"/spec/containers/0/image","value":"x"}]`,
		`[{"op":"add","path":"/metadata/finalizers","value":["example.com/f"]},{"op":"add","path":"/metadata/finalizers/-","value":"example.com/g"}]`,
		`[{"op":"copy","from":"/metadata","path":"/data/a"},{"op":"copy","from":"/data","path":"/data/b"},{"op":"copy","from":"/data","path":"/data/c"}]`,
		copyBomb(),
	},
	{
		`{"metadata":{"labels":{"app":null,"x":"y"},"finalizers":["example.com/f"]}}`, `{"spec":{"crew":8,"holds":[{"name":"aft"}],"sail":null}}`,
		`{"data":{"k":"w"},"spec":{"replicas":2,"ports":[{"port":81}]}}`, `{"metadata":{"managedFields":[{}]}}`,
	},
	{
		`{"spec":{"template":{"spec":{"containers":[{"name":"main","image":"y","ports":[{"containerPort":80,"$patch":"delete"}]}],"$setElementOrder/containers":[{"name":"main"}]}}}}`,
		`{"spec":{"$retainKeys":["a"],"strategy":{"$retainKeys":["type"],"type":"Recreate"}}}`, `{"metadata":{"labels":{"$patch":"replace","a":"b"}}}`,
		`{"metadata":{"$deleteFromPrimitiveList/finalizers":["x"],"$setElementOrder/finalizers":["a","b"],"finalizers":["a"]}}`,
		`{"spec":{"ports":[{"$patch":"replace"},{"port":80,"name":"q"}],"tolerations":[{"$patch":"delete","key":"k"}]}}`,
	},
	{
		`{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"seed"},"data":{"k":"v2"}}`,
		"apiVersion: v1\nkind: Pod\nmetadata: {name: seed, labels: {q: r}}\nspec:\n  tolerations: [{key: z, operator: Exists}]\n",
		`{"apiVersion":"fuzz.example.com/v1","kind":"Ship","metadata":{"name":"seed"},"spec":{"holds":[{"name":"aft"},{"name":"fore","tons":null}]}}`,
		"apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: seed}\nspec: {replicas: 3, template: {spec: {containers: [{name: main, env: [{name: B, value: c}]}]}}}\n",
	},
}

// copyBomb is a JSON patch that doubles the object's metadata forty times.
func copyBomb() string {
	var out []string
	for i := range 40 {
		out = append(out, fmt.Sprintf(`{"op":"copy","from":"/metadata","path":"/metadata/x%d"}`, i))
	}
	return "[" + strings.Join(out, ",") + "]"
}

// FuzzPatch patches objects of many kinds. A patch that took effect is undone by making the object anew.
func FuzzPatch(f *testing.F) {
	c := fuzzCluster(f)
	for i, k := range c.kinds {
		for j := range patchTypes {
			for n, seed := range patchSeeds[j] {
				f.Add(uint8(i), uint8(j), uint8(n), n%2 == 0, []byte(seed))
			}
		}
		f.Add(uint8(i), uint8(3), uint8(0), true, k.encode(f, c.encodings[0]))
		f.Add(uint8(i), uint8(3), uint8(1), true, k.encode(f, c.encodings[1]))
	}
	f.Fuzz(func(t *testing.T, kind, patch, validation uint8, force bool, body []byte) {
		k, contentType := c.kinds[int(kind)%len(c.kinds)], patchTypes[int(patch)%len(patchTypes)]
		query := and(fieldValidations[int(validation)%len(fieldValidations)], "fieldManager=fuzz")
		if contentType == patchTypes[3] && force {
			query = and(query, "force=true")
		}
		object := k.path + "/" + fuzzName
		if k.passing {
			object = k.path // subresources that can be patched, and such that refuse it
		}
		if k.dry {
			query = and(query, "dryRun=All")
		}
		w := c.do(t, "PATCH", object+query, contentType, jsonType, body)
		if k.dry || k.passing || w.Code != http.StatusOK && w.Code != http.StatusCreated {
			return
		}
		c.remove(t, object)
		if w := c.do(t, "POST", k.path, jsonType, jsonType, k.encode(t, c.encodings[0])); w.Code != http.StatusCreated {
			t.Fatalf("%s cannot be made anew: %d %s", object, w.Code, w.Body)
		}
	})
}

// readPaths are what can be read: with rules of selection of their own, cluster-scoped, single objects, custom resources.
var readPaths = []string{
	"/api/v1/namespaces", "/api/v1/namespaces/fuzz/pods", "/api/v1/pods", "/api/v1/namespaces/fuzz/secrets", "/api/v1/namespaces/fuzz/services",
	"/apis/batch/v1/jobs", "/api/v1/events", "/apis/rbac.authorization.k8s.io/v1/clusterroles", "/apis/apps/v1/namespaces/fuzz/deployments",
	"/apis/flowcontrol.apiserver.k8s.io/v1/flowschemas", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", "/apis/fuzz.example.com/v1/namespaces/fuzz/ships",
	"/api/v1/namespaces/fuzz/configmaps/seed", "/api/v1/nodes/seed", "/api/v1/namespaces/fuzz/pods/seed", "/api/v1/namespaces/default", "/apis/coordination.k8s.io/v1/leases",
}

// querySeeds are the options of reads and their usual mistakes.
var querySeeds = []string{
	"", "limit=2", "limit=-1", "limit=9223372036854775808", "labelSelector=app%3Dknarr", "labelSelector=app+in+(knarr,x),!y,z+notin+(a),tier", "labelSelector=a%3D%3D%3Db", "labelSelector=x%3E5,y%3C-3",
	"fieldSelector=metadata.name%3Dseed", "fieldSelector=metadata.name!%3Dseed,metadata.namespace%3Dfuzz", "fieldSelector=spec.nodeName%3D,status.phase!%3DRunning", "fieldSelector=spec.sail%3Dsquare",
	"fieldSelector=type%3Dexample.com/x", "fieldSelector=a%5C%2Cb%3Dc", "fieldSelector=nothing%3Dx", "resourceVersion=0", "resourceVersion=1", "resourceVersion=99999999", "resourceVersion=-1", "resourceVersion=0x10",
	"resourceVersion=1&resourceVersionMatch=Exact", "resourceVersion=0&resourceVersionMatch=NotOlderThan", "resourceVersionMatch=Exact", "resourceVersion=0&resourceVersionMatch=Exact", "resourceVersionMatch=Wrong&resourceVersion=3",
	"continue=x", "continue=eyJ2IjoibWV0YS5rOHMuaW8vdjEiLCJydiI6LTEsInN0YXJ0Ijoic2VlZFx1MDAwMCJ9", "limit=1&continue=x&resourceVersion=5", "watch=1&resourceVersion=0", "watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true",
	"watch=1&sendInitialEvents=true", "watch=1&timeoutSeconds=1&labelSelector=app", "watch=1&fieldSelector=metadata.name%3Dseed&resourceVersion=99999999", "watch=nonsense", "sendInitialEvents=false&resourceVersionMatch=NotOlderThan",
	"timeoutSeconds=x", "timeoutSeconds=-5&watch=1", "pretty=true", "export=true", "watch=1&resourceVersion=x", "shardSelector=x", "limit=1&limit=2", "a;b", "%zz", "watch=1&watch=0", "allowWatchBookmarks=3", "fieldSelector=metadata.name%3Dseed&labelSelector=%2C",
}

// FuzzRead reads with any parameters, by our own path and by upstream's handlers, which must answer with the same bytes.
func FuzzRead(f *testing.F) {
	c := fuzzCluster(f)
	for i := range readPaths {
		for _, seed := range querySeeds {
			f.Add(uint8(i), seed)
		}
	}
	f.Fuzz(func(t *testing.T, place uint8, query string) {
		c.compare(t, readPaths[int(place)%len(readPaths)]+"?"+query)
	})
}

// compare reads by our own path and by upstream's handlers and gives the answer.
func (c *fuzzed) compare(t *testing.T, uri string) (status int, body string) {
	t.Helper()
	ours := c.do(t, "GET", uri, "", readFormats[0].ours, nil)
	if ours == nil {
		return 0, ""
	}
	theirs := c.do(t, "GET", uri, "", readFormats[0].upstream, nil)
	if ours.Code != theirs.Code {
		t.Fatalf("%s: upstream %d %s, ours %d %s", uri, theirs.Code, theirs.Body, ours.Code, ours.Body)
	}
	if ours.Flushed { // a watch, which ends somewhere in its first events
		return ours.Code, ""
	}
	if ours.Body.String() != theirs.Body.String() {
		t.Fatalf("%s\nupstream %s\nours     %s", uri, theirs.Body, ours.Body)
	}
	return ours.Code, ours.Body.String()
}

// tokenPaths are lists that span namespaces, lie in one, or have neither, and custom resources; each with its parameters.
var tokenPaths = []string{
	"/apis/rbac.authorization.k8s.io/v1/clusterroles?limit=2", "/apis/rbac.authorization.k8s.io/v1/namespaces/kube-system/roles?limit=1", "/apis/rbac.authorization.k8s.io/v1/rolebindings?",
	"/api/v1/namespaces/fuzz/configmaps?limit=1", "/apis/fuzz.example.com/v1/ships?limit=1", "/apis/rbac.authorization.k8s.io/v1/clusterroles?limit=3&labelSelector=kubernetes.io/bootstrapping",
}

// FuzzContinue lists with forged continue tokens: as they are, and as the JSON inside. No token may lead out of the list
// that it is given to, and both paths must answer the same.
func FuzzContinue(f *testing.F) {
	c := fuzzCluster(f)
	for i, p := range tokenPaths {
		w := c.do(f, "GET", p, "", jsonType, nil)
		var page metav1.PartialObjectMetadataList
		if err := json.Unmarshal(w.Body.Bytes(), &page); err != nil {
			f.Fatal(err)
		}
		f.Add(uint8(i), false, page.Continue)
		plain, err := base64.RawURLEncoding.DecodeString(page.Continue)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(uint8(i), true, string(plain))
		f.Add(uint8(i), false, page.Continue+"==")
		f.Add(uint8(i), false, page.Continue[:len(page.Continue)/2])
		for _, forged := range []string{
			`{"v":"meta.k8s.io/v1","rv":-1,"start":"../../secrets/"}`, `{"v":"meta.k8s.io/v1","rv":0,"start":"a"}`, `{"v":"meta.k8s.io/v2","rv":1,"start":"a"}`, `{"v":"meta.k8s.io/v1","rv":1,"start":"a"}`,
			`{"v":"meta.k8s.io/v1","rv":99999999,"start":"a"}`, `{"v":"meta.k8s.io/v1","rv":-5,"start":"/"}`, `{"v":"meta.k8s.io/v1","rv":-5,"start":"\u0000"}`, `{"v":"meta.k8s.io/v1","rv":9223372036854775807,"start":"zz"}`,
			`{"v":"meta.k8s.io/v1","rv":-9223372036854775808,"start":"` + strings.Repeat("a/", 2000) + `"}`,
		} {
			f.Add(uint8(i), true, forged)
		}
	}
	f.Fuzz(func(t *testing.T, place uint8, inside bool, token string) {
		p := tokenPaths[int(place)%len(tokenPaths)]
		if inside {
			token = base64.RawURLEncoding.EncodeToString([]byte(token))
		}
		status, body := c.compare(t, p+"&continue="+url.QueryEscape(token))
		if status != http.StatusOK {
			return
		}
		var page metav1.PartialObjectMetadataList
		if err := json.Unmarshal([]byte(body), &page); err != nil {
			t.Fatal(err)
		}
		resource := path.Base(strings.TrimSuffix(p[:strings.Index(p, "?")], "/"))
		if !strings.EqualFold(page.Kind, resource[:len(resource)-1]+"List") {
			t.Fatalf("%s gives a %s", p, page.Kind)
		}
		for _, item := range page.Items {
			if _, rest, ok := strings.Cut(p, "/namespaces/"); ok && !strings.HasPrefix(rest, item.Namespace+"/") {
				t.Fatalf("%s gives an object of the namespace %q", p, item.Namespace)
			}
		}
	})
}

// open are the paths that everybody who is somebody may get; all others need a right.
var open = []string{"/healthz", "/livez", "/readyz", "/version", "/api", "/apis", "/openapi", "/.well-known/openid-configuration"}

// FuzzPath asks for any path with any method: as one who may all, but only what changes nothing, and as one who has no
// rights and must get nothing but what is open to all, however the path is written.
func FuzzPath(f *testing.F) {
	c := fuzzCluster(f)
	paths := append([]string{
		"/", "//", "/api//v1/namespaces", "/api/v1/../../apis", "/api/v1/./secrets", "/api/v1/%2e%2e/v1/secrets", "/API/v1", "/api/v1/namespaces/fuzz/secrets/seed/", "/api/v1/secrets#x", "/api/v1/secrets%00", "/api/v1/secrets%2fseed",
		"/api/v1/namespaces/fuzz/pods/seed/log?tailLines=x", "/api/v1/namespaces/fuzz/pods/seed:80/proxy/x", "/api/v1/watch/namespaces/fuzz/secrets", "/api/v1/proxy/nodes/x", "/apis/apps/v1/deployments/seed/scale", "/metrics", "/debug/pprof/",
		"/openapi/v3/apis/apps/v1?hash=x", "/openapi/v2", "/logs/", "/readyz/etcd?exclude=x", "/healthz?verbose&exclude=etcd", "/apis/fuzz.example.com/v1", "/apis/fuzz.example.com", "/version/", "/.well-known/openid-configuration", "/openid/v1/jwks",
		"https://other/api/v1/secrets", "*", "/api/v1/namespaces/fuzz/services/https:seed:http/proxy/", "/healthz/../api/v1/secrets", "/version/../../api/v1/secrets", "/livez/%2e%2e/api/v1/secrets", "/api/v1/secrets?watch=1", "/apis/../api/v1/secrets",
	}, readPaths...)
	for i, p := range paths {
		f.Add(uint8(i), p, i%2 == 0)
	}
	methods := []string{"GET", "HEAD", "OPTIONS", "TRACE", "CONNECT", "BREW"}
	nobody := client.User("nobody", user.AllAuthenticated)
	f.Fuzz(func(t *testing.T, method uint8, uri string, rights bool) {
		if strings.Contains(uri, "pprof") {
			return // profiles take as long as they are asked to
		}
		req := target(methods[int(method)%len(methods)], uri, nil)
		if req == nil {
			return
		}
		who := admin
		if !rights {
			who = nobody
		}
		w := c.send(t, req, len(uri), who)
		if rights || w.Code >= 300 {
			return
		}
		for _, p := range open {
			rest, ok := strings.CutPrefix(req.URL.Path, p)
			if ok && (p != "/api" && p != "/apis" || strings.Count(path.Clean("/"+rest), "/") < 2) {
				return
			}
			if ok && p == "/apis" && strings.Count(path.Clean("/"+rest), "/") < 3 {
				return
			}
		}
		t.Fatalf("nobody may %s %s: %d %s", req.Method, uri, w.Code, fmt.Sprintf("%.300s", w.Body))
	})
}
