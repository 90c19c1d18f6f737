package apiserver_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/authentication/user"

	"knarr/client"
)

// badPlace is a resource that bad requests are sent to.
type badPlace struct {
	collection, kind, version string
	verbs                     []string
}

func (p badPlace) item() string { return p.collection + "/none" }

// object is one of the kind, with the given metadata and more.
func (p badPlace) object(meta, more string) string {
	return fmt.Sprintf(`{"apiVersion":%q,"kind":%q,"metadata":{%s}%s}`, p.version, p.kind, meta, more)
}

// refusal is a bad request and what upstream answers: by the rules of k8s.io/apiserver/pkg/endpoints, a status and a reason.
type refusal struct {
	class  string
	method string
	uri    string
	header map[string]string
	body   string
	// who asks: empty for the administrator, else a token, or anonymous for none.
	who    string
	status int
	reason metav1.StatusReason // empty where the answer is no Status
}

const anonymous = "anonymous"

// allPlaces lists every resource that the server offers.
func allPlaces(t testing.TB, c *cluster) []badPlace {
	t.Helper()
	lists, err := c.Discovery().ServerPreferredResources()
	require.NoError(t, err)
	var out []badPlace
	for _, list := range lists {
		root := "/apis/" + list.GroupVersion
		if list.GroupVersion == "v1" {
			root = "/api/v1"
		}
		for _, r := range list.APIResources {
			if !slices.Contains(r.Verbs, "create") || !slices.Contains(r.Verbs, "list") {
				continue
			}
			if r.Namespaced {
				out = append(out, badPlace{root + "/namespaces/default/" + r.Name, r.Kind, list.GroupVersion, r.Verbs})
				continue
			}
			out = append(out, badPlace{root + "/" + r.Name, r.Kind, list.GroupVersion, r.Verbs})
		}
	}
	return out
}

// wrongVerbs are methods that a resource does not have.
func wrongVerbs(p badPlace) []refusal {
	var out []refusal
	for _, m := range []string{"PUT", "PATCH", "BREW", "TRACE", "OPTIONS", "HEAD"} {
		out = append(out, refusal{method: m, uri: p.collection, body: "{}", header: withType(jsonType), status: 405, reason: metav1.StatusReasonMethodNotAllowed})
	}
	for _, m := range []string{"POST", "BREW", "TRACE", "OPTIONS", "HEAD"} {
		out = append(out, refusal{method: m, uri: p.item(), body: "{}", header: withType(jsonType), status: 405, reason: metav1.StatusReasonMethodNotAllowed})
	}
	return out
}

// absences ask for what is not there, however the path is written.
func absences(p badPlace) []refusal {
	var out []refusal
	add := func(method, uri, contentType, body string, status int, reason metav1.StatusReason) {
		out = append(out, refusal{method: method, uri: uri, header: withType(contentType), body: body, status: status, reason: reason})
	}
	add("GET", p.item(), "", "", 404, metav1.StatusReasonNotFound)
	add("DELETE", p.item(), "", "", 404, metav1.StatusReasonNotFound)
	add("PATCH", p.item(), "application/merge-patch+json", "{}", 404, metav1.StatusReasonNotFound)
	add("PATCH", p.item(), "application/json-patch+json", "[]", 404, metav1.StatusReasonNotFound)
	add("PATCH", p.item(), "application/strategic-merge-patch+json", "{}", 404, metav1.StatusReasonNotFound)
	for _, tail := range []string{"/none/nothing", "/none/nothing/at/all", "/none/status/x"} {
		add("GET", p.collection+tail, "", "", 404, metav1.StatusReasonNotFound)
	}
	for _, name := range []string{"a%20b", "UPPER", "a%5Cb", "%C3%A9", "a_b", "-", strings.Repeat("x", 300), "a;b", "a=b", "%7F", "%3Cscript%3E"} {
		add("GET", p.collection+"/"+name, "", "", 404, metav1.StatusReasonNotFound)
	}
	for _, name := range []string{"a%25b", "%2e%2e", "%2e"} {
		add("GET", p.collection+"/"+name, "", "", 400, metav1.StatusReasonBadRequest)
	}
	return out
}

// badQueries are parameters of lists and watches that say nothing, or too much.
func badQueries(p badPlace) []refusal {
	var out []refusal
	add := func(status int, reason metav1.StatusReason, queries ...string) {
		for _, q := range queries {
			out = append(out, refusal{method: "GET", uri: p.collection + "?" + q, status: status, reason: reason})
		}
	}
	token := func(json string) string { return "continue=" + base64.RawURLEncoding.EncodeToString([]byte(json)) }
	const badRequest, invalid = metav1.StatusReasonBadRequest, metav1.StatusReasonInvalid
	add(400, badRequest, "labelSelector=a%3D%3D%3Db", "labelSelector=a%3Db%3Dc", "labelSelector=%2C", "labelSelector=a+in", "labelSelector=a+in+(b", "labelSelector=a+in+()x", "labelSelector=!!a", "labelSelector=a%3D-b-",
		"labelSelector=-a", "labelSelector=a/b/c", "labelSelector=A..b/c", "labelSelector=a%3Ex", "labelSelector="+strings.Repeat("x", 64), "labelSelector=a%3D"+strings.Repeat("x", 64), "labelSelector=a+notin+b", "labelSelector=(a)",
		"fieldSelector=nothing%3Dx", "fieldSelector=a", "fieldSelector=a%3Db%5C", "fieldSelector=spec.none%3D1,metadata.name%3Dx", "fieldSelector=metadata.nothing!%3Dx",
		"limit=x", "limit=1.5", "limit=9223372036854775808", "limit=1e3", "timeoutSeconds=x", "watch=1&timeoutSeconds=-x", "timeoutSeconds=9223372036854775808",
		"resourceVersion=x", "resourceVersion=-1", "resourceVersion=1.5", "resourceVersion=0x1", "resourceVersion=18446744073709551616", "resourceVersion=%20",
		"continue=x", "continue=e30", "continue=%FF%FE", "continue=bnVsbA", token("[]"), token(`{"v":"meta.k8s.io/v2","rv":1,"start":"a"}`), token(`{"v":"meta.k8s.io/v1","rv":0,"start":"a"}`), token(`{"v":"meta.k8s.io/v1","rv":1}`),
		token(`{"v":"meta.k8s.io/v1","rv":-1,"start":"../x"}`), token(`{"v":"meta.k8s.io/v1","rv":-1,"start":"a/../../x"}`), token(`{"v":"meta.k8s.io/v1","rv":-1,"start":"./x"}`), token(`{"v":"meta.k8s.io/v1","rv":-1,"start":"a//x"}`),
		token(`{"v":"meta.k8s.io/v1","rv":"1","start":"a"}`), token(`{"v":"meta.k8s.io/v1","rv":-1,"start":"a"}`)+"&resourceVersion=5", token(`{"v":"meta.k8s.io/v1","rv":1e99,"start":"a"}`),
		"continue="+strings.Repeat("A", 8000), "watch=1&labelSelector=a%3D%3D%3Db", "watch=1&fieldSelector=nothing%3Dx")
	add(422, invalid, "resourceVersionMatch=Exact", "resourceVersionMatch=NotOlderThan", "resourceVersionMatch=Foo&resourceVersion=1", "resourceVersionMatch=exact&resourceVersion=1", "resourceVersionMatch=Exact&resourceVersion=0",
		"resourceVersionMatch=Exact&resourceVersion=1&continue=x", "sendInitialEvents=true", "sendInitialEvents=true&resourceVersionMatch=NotOlderThan", "watch=1&sendInitialEvents=true", "watch=1&sendInitialEvents=true&resourceVersionMatch=Exact&resourceVersion=1",
		"watch=1&resourceVersionMatch=NotOlderThan&resourceVersion=1", "watch=1&sendInitialEvents=false")
	add(504, metav1.StatusReasonTimeout, "resourceVersion=99999999", "resourceVersion=99999999&resourceVersionMatch=NotOlderThan", "resourceVersion=99999999&resourceVersionMatch=Exact", token(`{"v":"meta.k8s.io/v1","rv":99999999,"start":"a"}`))
	for _, accept := range []string{"text/x", "application/x", "image/png;q=1", "application/json;as=Nope;v=v1;g=meta.k8s.io", "application/json;as=Table;v=v9;g=meta.k8s.io", "application/vnd.kubernetes.protobuf;as=Table;v=v1;g=meta.k8s.io"} {
		out = append(out, refusal{method: "GET", uri: p.collection, header: map[string]string{"Accept": accept}, status: 406, reason: metav1.StatusReasonNotAcceptable})
	}
	return out
}

// badCreates are bodies, encodings and parameters that no create takes.
func badCreates(p badPlace) []refusal {
	var out []refusal
	add := func(status int, reason metav1.StatusReason, query, contentType string, bodies ...string) {
		for _, b := range bodies {
			out = append(out, refusal{method: "POST", uri: p.collection + query, header: withType(contentType), body: b, status: status, reason: reason})
		}
	}
	const badRequest, invalid = metav1.StatusReasonBadRequest, metav1.StatusReasonInvalid
	object := p.object(`"name":"x"`, "")
	other, version := strings.Replace(object, `"kind":"`, `"kind":"Un`, 1), strings.Replace(object, p.version, p.version+"9", 1)
	add(400, badRequest, "", jsonType, "{", `"x"`, "[]", "1", "true", "\xff\xfe", "{\"a\":}", object+"}", object[:len(object)-1], nested(`{"a":`, "1", "}", 20000), nested("[", "", "]", 20000), "{"+strings.Repeat(`"a":[{`, 12000), other, version,
		p.object(`"name":5`, ""), p.object(`"name":"x","labels":5`, ""), p.object(`"name":"x","labels":{"a":1}`, ""), p.object(`"name":"x","ownerReferences":{}`, ""), p.object(`"name":"x","creationTimestamp":"yesterday"`, ""),
		p.object(`"name":"x","annotations":`+nested("[", "", "]", 20000), ""), `{"apiVersion":"v1","kind":"Status"}`, `{"apiVersion":"v1","kind":"List","items":[]}`, `{"apiVersion":7,"kind":[]}`, `{"kind":"`+p.kind+`","apiVersion":"a/b/c"}`)
	add(400, badRequest, "", yamlType, "a: [", "\t", "a: &a [*a, *a]", bomb(), "- x", "%YAML 9", "a: !!binary x\n\tb", nested(`{"a":`, "1", "}", 20000), "kind: "+p.kind+"\napiVersion: "+p.version+"\nmetadata: x\n", "kind: Un"+p.kind+"\napiVersion: "+p.version+"\n")
	add(415, metav1.StatusReasonUnsupportedMediaType, "", "text/plain", object)
	for _, contentType := range []string{"application/cbor", "application/x-www-form-urlencoded", ";", "multipart/form-data; boundary=x", "application/json-patch+json", "text/html", "application/jsonx", "*/*"} {
		add(415, metav1.StatusReasonUnsupportedMediaType, "", contentType, object)
	}
	add(422, invalid, "?dryRun=x", jsonType, object)
	add(422, invalid, "?dryRun=all", jsonType, object)
	add(422, invalid, "?dryRun=All&dryRun=x", jsonType, object)
	add(422, invalid, "?fieldValidation=x", jsonType, object)
	add(422, invalid, "?fieldValidation=strict", jsonType, object)
	add(422, invalid, "?fieldManager="+strings.Repeat("x", 129), jsonType, object)
	add(422, invalid, "?fieldManager=%00", jsonType, object)
	add(400, badRequest, "?fieldValidation=Strict&dryRun=All", jsonType, p.object(`"name":"x"`, `,"nope":1`), p.object(`"name":"x","name":"y"`, ""))
	add(400, badRequest, "?timeout=x", jsonType, object)
	if p.version != "apiregistration.k8s.io/v1" && p.version != "apiextensions.k8s.io/v1" { // those have no protobuf form
		add(400, badRequest, "", protoType, "k8s\x00", "plain", "k8s\x00\xff\xff\xff\xff\xff", "k8s\x00\x0a\xff\xff\xff\xff\x0f", "K8S\x00\x0a\x00", object, "k8s\x00\x12\x02\x0a\xff", "k8s\x00"+strings.Repeat("\x0b", 5000))
	}
	return out
}

// badDeletes are options that no deletion takes.
func badDeletes(p badPlace) []refusal {
	var out []refusal
	const badRequest, invalid = metav1.StatusReasonBadRequest, metav1.StatusReasonInvalid
	uris := []string{p.item()}
	if slices.Contains(p.verbs, "deletecollection") {
		uris = append(uris, p.collection)
	}
	for _, uri := range uris {
		add := func(status int, reason metav1.StatusReason, query, body string) {
			out = append(out, refusal{method: "DELETE", uri: uri + query, header: withType(jsonType), body: body, status: status, reason: reason})
		}
		for _, body := range []string{"{", "[]", `"x"`, `{"gracePeriodSeconds":"x"}`, `{"preconditions":5}`, `{"kind":"Pod","apiVersion":"v1"}`, nested(`{"a":`, "1", "}", 20000), `{"gracePeriodSeconds":1e99}`, `{"orphanDependents":"x"}`} {
			add(400, badRequest, "", body)
		}
		for _, body := range []string{`{"propagationPolicy":"x"}`, `{"propagationPolicy":"orphan"}`, `{"propagationPolicy":"Orphan","orphanDependents":true}`, `{"dryRun":["x"]}`, `{"dryRun":["All","x"]}`, `{"propagationPolicy":""}`} {
			add(422, invalid, "", body)
		}
		add(400, badRequest, "?gracePeriodSeconds=x", "")
		add(422, invalid, "?propagationPolicy=x", "")
		add(422, invalid, "?dryRun=x", "")
	}
	return out
}

// badApplies are patches whose bodies or options are wrong before anybody looks for the object.
func badApplies(p badPlace) []refusal {
	var out []refusal
	add := func(status int, reason metav1.StatusReason, query, contentType, body string) {
		out = append(out, refusal{method: "PATCH", uri: p.item() + query, header: withType(contentType), body: body, status: status, reason: reason})
	}
	const badRequest, invalid, apply = metav1.StatusReasonBadRequest, metav1.StatusReasonInvalid, "application/apply-patch+yaml"
	for _, body := range []string{"a: [", "{", "\t", bomb(), nested(`{"a":`, "1", "}", 20000), p.object(`"name":"other"`, ""), `{"apiVersion":"v1","kind":"Nothing"}`} {
		add(400, badRequest, "?fieldManager=t", apply, body)
	}
	add(422, invalid, "", apply, p.object(`"name":"none"`, ""))
	add(422, invalid, "?fieldManager="+strings.Repeat("x", 129), apply, p.object(`"name":"none"`, ""))
	add(422, invalid, "?force=true", "application/merge-patch+json", "{}")
	add(422, invalid, "?fieldManager=t&dryRun=x", "application/merge-patch+json", "{}")
	add(422, invalid, "?fieldManager=t&fieldValidation=x", "application/json-patch+json", "[]")
	for _, contentType := range []string{jsonType, "text/x", yamlType, "application/apply-patch+cbor", ";"} {
		add(415, metav1.StatusReasonUnsupportedMediaType, "?fieldManager=t", contentType, "{}")
	}
	return out
}

// strangers are requests of somebody who may not, or who says that he is somebody else.
func strangers(p badPlace) []refusal {
	var out []refusal
	const forbidden, unauthorized = metav1.StatusReasonForbidden, metav1.StatusReasonUnauthorized
	for _, r := range []struct{ method, uri, body string }{{"GET", p.collection, ""}, {"GET", p.item(), ""}, {"POST", p.collection, p.object(`"name":"x"`, "")}, {"DELETE", p.item(), ""}} {
		add := func(who string, header map[string]string, status int, reason metav1.StatusReason) {
			out = append(out, refusal{method: r.method, uri: r.uri, body: r.body, who: who, header: header, status: status, reason: reason})
		}
		add(anonymous, nil, 403, forbidden)
		add(nobodyToken, nil, 403, forbidden)
		add(nobodyToken, map[string]string{"Impersonate-User": "admin"}, 403, forbidden)
		add(adminToken, map[string]string{"Impersonate-User": "nobody"}, 403, forbidden)
		add(adminToken, map[string]string{"Impersonate-Group": "system:masters"}, 400, metav1.StatusReasonBadRequest)
		add(anonymous, map[string]string{"X-Remote-User": "admin", "X-Remote-Group": "system:masters"}, 403, forbidden)
		add(anonymous, map[string]string{"Authorization": "Basic YWRtaW46eA=="}, 403, forbidden)
		for _, token := range []string{"bad", "a.b.c", "eyJhbGciOiJub25lIn0.e30.", strings.Repeat("x", 4000), adminToken + "x"} {
			add(token, nil, 401, unauthorized)
		}
	}
	return out
}

// classes are the ways of being wrong.
var classes = []struct {
	name string
	of   func(badPlace) []refusal
}{
	{"wrong verb", wrongVerbs}, {"absent", absences}, {"query", badQueries}, {"create", badCreates}, {"delete", badDeletes}, {"apply", badApplies}, {"stranger", strangers},
}

// refuse sends a bad request through the pipeline, in process.
func (c *cluster) refuse(t testing.TB, r refusal) *httptest.ResponseRecorder {
	t.Helper()
	req := target(r.method, r.uri, []byte(r.body))
	require.NotNil(t, req, r.uri)
	for k, v := range r.header {
		if v != "" {
			req.Header.Set(k, v)
		}
	}
	switch r.who {
	case "":
		req = req.WithContext(client.WithUser(context.Background(), client.User("admin", user.SystemPrivilegedGroup)))
	case anonymous:
	default:
		req.Header.Set("Authorization", "Bearer "+r.who)
	}
	ctx, cancel := context.WithTimeout(req.Context(), timeout)
	defer cancel()
	w := &recorder{httptest.NewRecorder(), cancel}
	c.handler.ServeHTTP(w, req.WithContext(ctx))
	return w.ResponseRecorder
}

// reasonOf reads the reason of a refusal; empty where it is none.
func reasonOf(w *httptest.ResponseRecorder) metav1.StatusReason {
	var s metav1.Status
	if err := json.Unmarshal(w.Body.Bytes(), &s); err != nil || s.Kind != "Status" {
		return ""
	}
	return s.Reason
}
