package apiserver

import (
	"crypto/tls"
	"crypto/x509"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/user"
)

// TestCertificateCache counts which requests are verified anew.
func TestCertificateCache(t *testing.T) {
	verified := 0
	now := time.Now()
	c := newCertificateCache(authenticator.RequestFunc(func(*http.Request) (*authenticator.Response, bool, error) {
		verified++
		return &authenticator.Response{User: &user.DefaultInfo{Name: "a"}}, true, nil
	}))
	c.now = func() time.Time { return now }
	cert := &x509.Certificate{NotAfter: now.Add(time.Hour)}
	ask := func(cert *x509.Certificate, header string) {
		req := httptest.NewRequest(http.MethodGet, "/", nil)
		if header != "" {
			req.Header.Set(header, "x")
		}
		if cert != nil {
			req.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert}}
		}
		_, ok, err := c.AuthenticateRequest(req)
		require.NoError(t, err)
		require.True(t, ok)
	}
	for _, step := range []struct {
		name   string
		cert   *x509.Certificate
		header string
		later  time.Duration
		want   int
	}{
		{name: "a new certificate", cert: cert, want: 1},
		{name: "the same again", cert: cert, want: 1},
		{name: "with a token too", cert: cert, header: "Authorization", want: 2},
		{name: "speaking for somebody", cert: cert, header: "X-Remote-User", want: 3},
		{name: "another certificate", cert: &x509.Certificate{NotAfter: now.Add(time.Hour)}, want: 4},
		{name: "no certificate", want: 5},
		{name: "after its end", cert: cert, later: 2 * time.Hour, want: 6},
	} {
		now = now.Add(step.later)
		ask(step.cert, step.header)
		require.Equal(t, step.want, verified, step.name)
	}
}
