package apiserver_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"knarr/apiserver"
)

// clientFor is an HTTP/2 client with a certificate of the cluster's authority.
func clientFor(t testing.TB, config *apiserver.Config, name string, groups ...string) *http.Client {
	t.Helper()
	block, _ := pem.Decode(config.ClientCA)
	ca, err := x509.ParseCertificate(block.Bytes)
	require.NoError(t, err)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name, Organization: groups},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, template, ca, key.Public(), config.ServiceAccountKey)
	require.NoError(t, err)
	c := newClient(t, true)
	c.Transport.(*http.Transport).TLSClientConfig.Certificates = []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}
	return c
}

// serveCounted is serve with a count of the requests that took the short cut.
func serveCounted(t testing.TB) (*served, *apiserver.Config, *atomic.Int64) {
	var config *apiserver.Config
	var n *atomic.Int64
	s := serveWith(t, func(c *apiserver.Config) { config = c }, func(s *apiserver.Server) { n = apiserver.CountShortcuts(s) })
	return s, config, n
}

// TestFastReads holds that the short cut gives what the filters give, for an object of every kind that the server itself makes.
func TestFastReads(t *testing.T) {
	s, config, shortcuts := serveCounted(t)
	c := clientFor(t, config, "root", "system:masters")
	ctx := context.Background()
	_, err := s.CoreV1().ConfigMaps("default").Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "c"}, Data: map[string]string{"a": "b"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	for _, tc := range []struct {
		path string
		fast bool
	}{
		{"/api/v1/namespaces/default/configmaps/c", true},
		{"/api/v1/namespaces/default", true},
		{"/api/v1/namespaces/default/services/kubernetes", true},
		{"/apis/rbac.authorization.k8s.io/v1/clusterroles/cluster-admin", true},
		{"/apis/scheduling.k8s.io/v1/priorityclasses/system-node-critical", true},
		{"/apis/flowcontrol.apiserver.k8s.io/v1/flowschemas/exempt", true},
		{"/apis/apiregistration.k8s.io/v1/apiservices/v1.", true},
		{"/apis/networking.k8s.io/v1/servicecidrs/kubernetes", true},
		{"/api/v1/namespaces/default/configmaps/none", false},
		{"/api/v1/namespaces/default/configmaps", false},
		{"/api/v1/namespaces/default/configmaps/c?resourceVersion=0", false},
		{"/api/v1/namespaces/default/configmaps/c?pretty=1", false},
		{"/api/v1/namespaces/default/configmaps/c/", false},
		{"/api/v1/namespaces/default/configmaps/c/status", false},
		{"/api/v1/namespaces/default/configmaps/%63", false},
		{"/api/v1/namespaces//configmaps/c", false},
		{"/api/v1/configmaps/c", false},
		{"/api/v2/namespaces/default/configmaps/c", false},
		{"/api/v1/namespaces/default/endpoints/kubernetes", false},
		{"/apis/flowcontrol.apiserver.k8s.io/v1beta3/flowschemas/exempt", false},
		{"/healthz", false},
	} {
		for _, accept := range []string{"", "*/*", runtime.ContentTypeJSON, runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON} {
			before := shortcuts.Load()
			header := map[string]string{}
			if accept != "" {
				header["Accept"] = accept
			}
			short := s.ask(t, c, request{path: tc.path, header: header})
			json := !strings.HasPrefix(accept, runtime.ContentTypeProtobuf)
			if fast := tc.fast && (json || !strings.Contains(tc.path, "apiregistration")); fast {
				require.Equal(t, before+1, shortcuts.Load(), "%s as %q takes the long way", tc.path, accept)
			} else {
				require.Equal(t, before, shortcuts.Load(), "%s as %q takes the short cut", tc.path, accept)
			}
			header["X-Long-Way"] = "1"
			long := s.ask(t, c, request{path: tc.path, header: header})
			require.Equal(t, long.status, short.status, tc.path)
			require.Equal(t, long.body, short.body, tc.path)
			for _, a := range []answer{long, short} {
				require.Len(t, a.header.Get("Audit-Id"), 36, tc.path)
				require.NotEmpty(t, a.header.Get("Date"), tc.path)
				a.header.Del("Audit-Id")
				a.header.Del("Date")
			}
			require.Equal(t, long.header, short.header, tc.path)
		}
	}
}

// TestFastReadsAreAllowed holds that a short cut ends the moment that the right to it does, and that a right to one object is none to another.
func TestFastReadsAreAllowed(t *testing.T) {
	s, config, shortcuts := serveCounted(t)
	ctx := context.Background()
	jane, robot := clientFor(t, config, "jane", "readers"), newClient(t, true)
	token := robotToken(t, s.cluster)
	path := func(name string) string { return "/api/v1/namespaces/default/configmaps/" + name }
	for _, name := range []string{"a", "b"} {
		_, err := s.CoreV1().ConfigMaps("default").Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		require.NoError(t, err)
	}
	ask := func(c *http.Client, token, name string, status, short int) {
		t.Helper()
		before := shortcuts.Load()
		require.Equal(t, status, s.ask(t, c, request{path: path(name), token: token}).status)
		require.EqualValues(t, short, shortcuts.Load()-before)
	}
	allow := func(subject rbacv1.Subject, names ...string) {
		_, err := s.RbacV1().Roles("default").Create(ctx, &rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Name: subject.Name},
			Rules: []rbacv1.PolicyRule{{Verbs: []string{"get"}, APIGroups: []string{""}, Resources: []string{"configmaps"}, ResourceNames: names}}}, metav1.CreateOptions{})
		require.NoError(t, err)
		_, err = s.RbacV1().RoleBindings("default").Create(ctx, &rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Name: subject.Name},
			RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: subject.Name}, Subjects: []rbacv1.Subject{subject}}, metav1.CreateOptions{})
		require.NoError(t, err)
	}
	ask(jane, "", "a", 403, 0)
	allow(rbacv1.Subject{APIGroup: rbacv1.GroupName, Kind: "Group", Name: "readers"})
	allow(rbacv1.Subject{Kind: "ServiceAccount", Namespace: "default", Name: "robot"}, "b")
	ask(jane, "", "a", 200, 0) // asked for
	ask(jane, "", "a", 200, 1) // remembered
	ask(jane, "", "b", 200, 1) // for all names
	ask(robot, token, "a", 403, 0)
	ask(robot, token, "b", 200, 0)
	ask(robot, token, "b", 200, 1)
	ask(robot, token, "a", 403, 0)
	ask(robot, token+"x", "b", 401, 0)
	require.NoError(t, s.RbacV1().RoleBindings("default").Delete(ctx, "readers", metav1.DeleteOptions{}))
	ask(jane, "", "a", 403, 0)
	ask(robot, token, "b", 200, 0) // roles have changed: asked for again
	require.NoError(t, s.RbacV1().RoleBindings("default").Delete(ctx, "robot", metav1.DeleteOptions{}))
	ask(robot, token, "b", 403, 0)
}

// BenchmarkFastGet is a GET over TLS on loopback, client included.
func BenchmarkFastGet(b *testing.B) {
	s, config, _ := serveCounted(b)
	c := clientFor(b, config, "root", "system:masters")
	read := request{path: "/api/v1/namespaces/default/services/kubernetes", header: map[string]string{"Accept": runtime.ContentTypeProtobuf}}
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if a, err := s.try(c, read); err != nil || a.status != http.StatusOK {
				b.Error(a.status, err)
			}
		}
	})
}
