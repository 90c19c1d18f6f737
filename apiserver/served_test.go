package apiserver_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"knarr/apiserver"
	"knarr/apiserver/options"
)

// Tokens of the users that a served cluster knows.
const (
	adminToken  = "admin-token"
	nobodyToken = "nobody-token"
)

// served is a cluster behind a TLS listener of its own.
type served struct {
	*cluster
	url  string
	end  func()       // begins the shutdown
	done <-chan error // what Serve returned
}

// serve runs a cluster behind a listener; the test ends it if it has not ended before.
func serve(t testing.TB, change func(*apiserver.Config)) *served {
	t.Helper()
	return serveWith(t, change, func(*apiserver.Server) {})
}

// serveWith is serve with a look at the server before it serves.
func serveWith(t testing.TB, change func(*apiserver.Config), look func(*apiserver.Server)) *served {
	t.Helper()
	return serveOn(t, change, look, true)
}

// serveOn is serveWith on a store that looks for objects that somebody changes only when told to.
func serveOn(t testing.TB, change func(*apiserver.Config), look func(*apiserver.Server), detect bool) *served {
	t.Helper()
	tokens := filepath.Join(t.TempDir(), "tokens.csv")
	require.NoError(t, os.WriteFile(tokens, []byte(adminToken+`,admin,1,"system:masters"`+"\n"+nobodyToken+",nobody,2\n"), 0o600))
	c := startClusterOn(t, vfs.NewMem(), nil, func(config *apiserver.Config) {
		config.Options = options.New()
		config.Options.Authentication.TokenFile.TokenFile = tokens
		change(config)
	}, detect)
	look(c.server)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- c.server.Serve(ctx, listener, &tls.Config{Certificates: []tls.Certificate{certificate(t)}, MinVersion: tls.VersionTLS12})
		close(done)
	}()
	t.Cleanup(func() {
		cancel()
		require.NoError(t, <-done)
		c.stop()
	})
	return &served{cluster: c, url: "https://" + listener.Addr().String(), end: cancel, done: done}
}

// certificate is one that nobody signed.
func certificate(t testing.TB) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "api"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// newClient is an HTTP client with connections of its own.
func newClient(t testing.TB, http2 bool) *http.Client {
	t.Helper()
	tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: http2, MaxIdleConnsPerHost: 100}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

// request is one HTTP request of a test; the zero value is an anonymous GET.
type request struct {
	method, path, token, body string
	header                    map[string]string
}

// answer is a response that was read to its end.
type answer struct {
	status int
	header http.Header
	body   string
}

// ask sends a request and reads the answer.
func (s *served) ask(t testing.TB, c *http.Client, r request) answer {
	t.Helper()
	a, err := s.try(c, r)
	require.NoError(t, err, "%s %s", r.method, r.path)
	return a
}

func (s *served) try(c *http.Client, r request) (answer, error) {
	var body io.Reader
	if r.body != "" {
		body = bytes.NewReader([]byte(r.body))
	}
	req, err := http.NewRequest(r.method, s.url+r.path, body)
	if err != nil {
		return answer{}, err
	}
	if r.token != "" {
		req.Header.Set("Authorization", "Bearer "+r.token)
	}
	for k, v := range r.header {
		req.Header.Set(k, v)
	}
	resp, err := c.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, string(data)}, err
}
