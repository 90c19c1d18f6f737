package apiserver

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"k8s.io/apiserver/pkg/apis/apiserver"
	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/user"

	"knarr/apiserver/h2"
)

// TestTokenCache holds which tokens are remembered, and for how long.
func TestTokenCache(t *testing.T) {
	robot := func(change func(*user.DefaultInfo)) user.Info {
		u := &user.DefaultInfo{Name: "system:serviceaccount:default:robot", Extra: map[string][]string{user.CredentialIDKey: {"JTI=1"}}}
		change(u)
		return u
	}
	same := func(*user.DefaultInfo) {}
	for _, tc := range []struct {
		name      string
		field     string
		header    string
		cert      bool
		user      user.Info
		audiences authenticator.Audiences
		err       error
		ttl       time.Duration
		later     time.Duration
		known     bool
	}{
		{name: "a service account", field: "Bearer abc", user: robot(same), known: true},
		{name: "for this server", field: "Bearer abc", user: robot(same), audiences: authenticator.Audiences{"api"}, known: true},
		{name: "for another", field: "Bearer abc", user: robot(same), audiences: authenticator.Audiences{"vault"}},
		{name: "too long ago", field: "Bearer abc", user: robot(same), later: 5 * time.Second},
		{name: "remembering nothing", field: "Bearer abc", user: robot(same), ttl: -1},
		{name: "without an identity", field: "Bearer abc", user: robot(func(u *user.DefaultInfo) { u.Extra = nil })},
		{name: "somebody else", field: "Bearer abc", user: robot(func(u *user.DefaultInfo) { u.Name = "jane" })},
		{name: "no bearer", field: "Basic abc", user: robot(same)},
		{name: "oddly spelt", field: "Bearer  abc", user: robot(same)},
		{name: "with a certificate", field: "Bearer abc", cert: true, user: robot(same)},
		{name: "speaking for somebody", field: "Bearer abc", header: "X-Remote-User", user: robot(same)},
		{name: "not valid", field: "Bearer abc", err: errors.New("not valid")},
	} {
		now := time.Now()
		c := newTokenCache(authenticator.RequestFunc(func(*http.Request) (*authenticator.Response, bool, error) {
			return &authenticator.Response{User: tc.user, Audiences: tc.audiences}, tc.err == nil, tc.err
		}), authenticator.Audiences{"api"}, 5*time.Second+tc.ttl*5*time.Second)
		c.now = func() time.Time { return now }
		req := httptest.NewRequest(http.MethodGet, "/", nil)
		req.TLS = &tls.ConnectionState{}
		req.Header.Set("Authorization", tc.field)
		if tc.header != "" {
			req.Header.Set(tc.header, "x")
		}
		if tc.cert {
			req.TLS.PeerCertificates = []*x509.Certificate{{}}
		}
		_, known := c.find("abc", now)
		require.False(t, known)
		_, _, err := c.AuthenticateRequest(req)
		require.Equal(t, tc.err, err)
		u, known := c.find("abc", now.Add(tc.later))
		require.Equal(t, tc.known, known, tc.name)
		if known {
			require.Equal(t, knownUser{user: tc.user, until: now.Add(5 * time.Second)}, u)
		}
	}
}

// TestTokenCacheForgets changes the configuration while a token is verified, and after that, which also connections that know the token learn at once.
func TestTokenCacheForgets(t *testing.T) {
	var during func()
	c := newTokenCache(authenticator.RequestFunc(func(*http.Request) (*authenticator.Response, bool, error) {
		during()
		return &authenticator.Response{User: &user.DefaultInfo{Name: "system:serviceaccount:a:b", Extra: map[string][]string{user.CredentialIDKey: {"JTI=1"}}}}, true, nil
	}), nil, time.Minute)
	change := c.forgetAfter(func(context.Context, *apiserver.AuthenticationConfiguration) error { return nil })
	fast := &fastReads{tokens: c, decisions: &decisions{}}
	connection := &h2.Exchange{TLS: &tls.ConnectionState{}}
	req := httptest.NewRequest(http.MethodGet, "/", nil)
	req.TLS = nil
	req.Header.Set("Authorization", "Bearer abc")
	for _, tc := range []struct {
		during, after func()
		known         bool
	}{
		{during: func() {}, after: func() {}, known: true},
		{during: func() {}, after: func() { require.NoError(t, change(t.Context(), nil)) }},
		{during: func() { require.NoError(t, change(t.Context(), nil)) }, after: func() {}},
	} {
		during = tc.during
		_, _, err := c.AuthenticateRequest(req)
		require.NoError(t, err)
		if tc.known {
			require.NotNil(t, fast.peerOf(connection, "abc", time.Now()))
		}
		tc.after()
		_, known := c.find("abc", time.Now())
		require.Equal(t, tc.known, known)
		require.Equal(t, tc.known, fast.peerOf(connection, "abc", time.Now()) != nil)
	}
}
