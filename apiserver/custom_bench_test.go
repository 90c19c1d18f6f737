package apiserver_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
)

// benchShips defines a custom resource with a status of its own and gives where its objects are, and the body of one.
func benchShips(b *testing.B) (c *cluster, collection string, body func(name string) []byte) {
	b.Helper()
	c, path := benchNamespace(b)
	ns := strings.TrimPrefix(path, "/api/v1/namespaces/")
	d := definition(ns + ".example.com")
	v := &d.Spec.Versions[0]
	v.Subresources = &apiextensionsv1.CustomResourceSubresources{Status: &apiextensionsv1.CustomResourceSubresourceStatus{}}
	v.Schema.OpenAPIV3Schema.Properties["status"] = apiextensionsv1.JSONSchemaProps{Type: "object",
		Properties: map[string]apiextensionsv1.JSONSchemaProps{"phase": {Type: "string"}, "observed": {Type: "integer"}}}
	c.define(b, b.Context(), d)
	body = func(name string) []byte {
		return fmt.Appendf(nil, `{"apiVersion":"%s/v1","kind":"Ship","metadata":{"name":"%s","labels":{"app":"bench","shard":"1"}},"spec":{"crew":6}}`, d.Spec.Group, name)
	}
	collection = "/apis/" + d.Spec.Group + "/v1/namespaces/" + ns + "/ships"
	for answerTo(c, http.MethodGet, collection, "", runtime.ContentTypeJSON, "", nil).Code != http.StatusOK {
	}
	send(b, c, http.MethodPost, collection, runtime.ContentTypeJSON, body("known"))
	return c, collection, body
}

func BenchmarkGetCustomResource(b *testing.B) {
	c, collection, _ := benchShips(b)
	benchmarkPath(b, c, collection+"/known", runtime.ContentTypeJSON)
}

func BenchmarkCreateCustomResource(b *testing.B) {
	c, collection, body := benchShips(b)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		send(b, c, http.MethodPost, collection, runtime.ContentTypeJSON, body(fmt.Sprint("s", i)))
	}
}

// BenchmarkPatchCustomResourceStatus is the first status of objects, as bench/apibench has it.
func BenchmarkPatchCustomResourceStatus(b *testing.B) {
	c, collection, body := benchShips(b)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		b.StopTimer()
		name := fmt.Sprint("s", i)
		send(b, c, http.MethodPost, collection, runtime.ContentTypeJSON, body(name))
		b.StartTimer()
		send(b, c, http.MethodPatch, collection+"/"+name+"/status", string(types.MergePatchType), []byte(`{"status":{"phase":"Running","observed":1}}`))
	}
}

func BenchmarkDeleteCustomResource(b *testing.B) {
	c, collection, body := benchShips(b)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		b.StopTimer()
		name := fmt.Sprint("s", i)
		send(b, c, http.MethodPost, collection, runtime.ContentTypeJSON, body(name))
		b.StartTimer()
		send(b, c, http.MethodDelete, collection+"/"+name, runtime.ContentTypeJSON, nil)
	}
}

// BenchmarkListCustomResources lists a hundred.
func BenchmarkListCustomResources(b *testing.B) {
	c, collection, body := benchShips(b)
	for i := range 100 {
		send(b, c, http.MethodPost, collection, runtime.ContentTypeJSON, body(fmt.Sprint("s", i)))
	}
	benchmarkPath(b, c, collection, runtime.ContentTypeJSON)
}
