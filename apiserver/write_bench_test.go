package apiserver_test

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/kubernetes/scheme"

	"knarr/client"
)

// send does a write as the most privileged user.
func send(b testing.TB, c *cluster, method, path, contentType string, body []byte) {
	b.Helper()
	req := httptest.NewRequest(method, path, bytes.NewReader(body))
	req.Header.Set("Content-Type", contentType)
	req.Header.Set("Accept", runtime.ContentTypeProtobuf+","+runtime.ContentTypeJSON)
	req.Header.Set("User-Agent", "bench/1")
	req.ProtoMajor = 2 // as in-process requests are, and those of clients in Go
	req = req.WithContext(client.WithUser(req.Context(), client.User("admin", user.SystemPrivilegedGroup)))
	w := httptest.NewRecorder()
	c.handler.ServeHTTP(w, req)
	if w.Code >= 300 {
		b.Fatalf("%s %s: %d %s", method, path, w.Code, w.Body)
	}
}

func benchPod(name string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": "bench"}},
		Spec: corev1.PodSpec{
			ServiceAccountName: "bench", AutomountServiceAccountToken: new(bool),
			Containers: []corev1.Container{{Name: "c", Image: "image:1", Env: []corev1.EnvVar{{Name: "A", Value: "b"}},
				Ports: []corev1.ContainerPort{{ContainerPort: 80}}}},
		},
	}
}

func encodeProto(b testing.TB, obj runtime.Object) []byte {
	b.Helper()
	info, _ := runtime.SerializerInfoForMediaType(scheme.Codecs.SupportedMediaTypes(), runtime.ContentTypeProtobuf)
	data, err := runtime.Encode(scheme.Codecs.EncoderForVersion(info.Serializer, corev1.SchemeGroupVersion), obj)
	require.NoError(b, err)
	return data
}

func benchNamespace(b *testing.B) (*cluster, string) {
	c := theCluster(b)
	ctx := context.Background()
	ns, err := c.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "bench-"}}, metav1.CreateOptions{})
	require.NoError(b, err)
	_, err = c.CoreV1().ServiceAccounts(ns.Name).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "bench"}}, metav1.CreateOptions{})
	require.NoError(b, err)
	return c, "/api/v1/namespaces/" + ns.Name
}

func BenchmarkCreateConfigMap(b *testing.B) {
	c, root := benchNamespace(b)
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		m := configMap(fmt.Sprintf("m%d", i), nil)
		i++
		send(b, c, http.MethodPost, root+"/configmaps", runtime.ContentTypeProtobuf, encodeProto(b, m))
	}
}

func BenchmarkCreatePod(b *testing.B) {
	c, root := benchNamespace(b)
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		i++
		send(b, c, http.MethodPost, root+"/pods", runtime.ContentTypeProtobuf, encodeProto(b, benchPod(fmt.Sprintf("p%d", i))))
	}
}

func BenchmarkPatchPodStatus(b *testing.B) {
	c, root := benchNamespace(b)
	send(b, c, http.MethodPost, root+"/pods", runtime.ContentTypeProtobuf, encodeProto(b, benchPod("p")))
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		i++
		body := fmt.Sprintf(`{"status":{"phase":"Running","podIP":"10.0.0.1","message":"%d","conditions":[{"type":"Ready","status":"True","lastTransitionTime":"2026-01-01T00:00:00Z"}],"containerStatuses":[{"name":"c","ready":true,"restartCount":0,"image":"i","imageID":"x","state":{"running":{"startedAt":"2026-01-01T00:00:00Z"}}}]}}`, i)
		send(b, c, http.MethodPatch, root+"/pods/p/status", "application/strategic-merge-patch+json", []byte(body))
	}
}

// BenchmarkFirstStatusOfPods patches each pod once, as when many start.
func BenchmarkFirstStatusOfPods(b *testing.B) {
	c, root := benchNamespace(b)
	for i := range b.N {
		send(b, c, http.MethodPost, root+"/pods", runtime.ContentTypeProtobuf, encodeProto(b, benchPod(fmt.Sprintf("p%d", i))))
	}
	body := []byte(`{"status":{"phase":"Running","podIP":"10.1.2.3"}}`)
	b.ReportAllocs()
	b.ResetTimer()
	for i := range b.N {
		send(b, c, http.MethodPatch, fmt.Sprintf("%s/pods/p%d/status", root, i), "application/strategic-merge-patch+json", body)
	}
}
