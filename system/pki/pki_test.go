package pki

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// clock is a time source that tests move.
type clock struct{ offset atomic.Int64 }

func (c *clock) now() time.Time          { return time.Now().Add(time.Duration(c.offset.Load())) }
func (c *clock) advance(d time.Duration) { c.offset.Add(int64(d)) }
func load(t *testing.T, dir string, c *clock, names ...string) *Authority {
	t.Helper()
	a, err := Load(dir, Options{Clock: c.now, ServerNames: names})
	require.NoError(t, err)
	return a
}

func TestLoadIsPrivateStableAndQuick(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tls")
	start := time.Now()
	a := load(t, dir, &clock{})
	t.Logf("first load took %v", time.Since(start))
	start = time.Now()
	b := load(t, dir, &clock{})
	t.Logf("second load took %v", time.Since(start))
	require.Equal(t, a.ServerCAPEM(), b.ServerCAPEM())
	require.True(t, a.ServiceAccountKey().Equal(b.ServiceAccountKey()))
	pa, err := a.api.Pair()
	require.NoError(t, err)
	pb, err := b.api.Pair()
	require.NoError(t, err)
	require.Equal(t, pa.Leaf.Raw, pb.Leaf.Raw, "a restart must not change the API's certificate")
	require.NotEqual(t, a.ServerCAPEM(), a.ClientCAPEM())

	require.NoError(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		require.NoError(t, err)
		info, err := d.Info()
		require.NoError(t, err)
		require.Zero(t, info.Mode().Perm()&0o077, "%s has mode %v", path, info.Mode())
		return nil
	}))
}

func TestDamagedAuthorityIsAnErrorAndKept(t *testing.T) {
	dir := t.TempDir()
	load(t, dir, &clock{})
	path := filepath.Join(dir, clientCAFile)
	require.NoError(t, os.WriteFile(path, []byte("garbage"), 0o600))
	_, err := Load(dir, Options{})
	require.ErrorContains(t, err, path)
	got, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, "garbage", string(got))
}

func TestOpenMakesNothing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tls")
	_, err := Open(dir)
	require.ErrorIs(t, err, fs.ErrNotExist)
	require.NoDirExists(t, dir)
	a := load(t, dir, &clock{})
	b, err := Open(dir)
	require.NoError(t, err)
	ta, err := a.JoinToken()
	require.NoError(t, err)
	tb, err := b.JoinToken()
	require.NoError(t, err)
	require.Equal(t, ta, tb)
}

// serve answers with the authority's listener and the given handler; the URL has a host of the certificate.
func serve(t *testing.T, a *Authority, h http.Handler) *httptest.Server {
	t.Helper()
	return listen(t, a.ServerTLS(), h)
}

// listen serves h with exactly this configuration: httptest would put a certificate of its own before ours.
func listen(t *testing.T, c *tls.Config, h http.Handler) *httptest.Server {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.Listener = tls.NewListener(s.Listener, c)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.Start()
	s.URL = "https" + strings.TrimPrefix(s.URL, "http")
	t.Cleanup(s.Close)
	return s
}

func get(t *testing.T, a *Authority, url string, client *Pair) (*x509.Certificate, error) {
	t.Helper()
	config := &tls.Config{RootCAs: a.ServerCAPool(), Time: a.clock}
	if client != nil {
		config.Certificates = []tls.Certificate{*client.TLS()}
	}
	tr := &http.Transport{TLSClientConfig: config}
	defer tr.CloseIdleConnections()
	resp, err := (&http.Client{Transport: tr}).Get(url)
	if err != nil {
		return nil, err
	}
	resp.Body.Close()
	return resp.TLS.PeerCertificates[0], nil
}

func TestServingCertificateIsRenewedWithoutRestart(t *testing.T) {
	c := &clock{}
	a := load(t, t.TempDir(), c, "api.example", "192.0.2.7")
	s := serve(t, a, http.NotFoundHandler())
	first, err := get(t, a, s.URL, nil)
	require.NoError(t, err)
	for _, n := range []string{"localhost", "kubernetes.default.svc.cluster.local", "10.43.0.1", "::1", "api.example", "192.0.2.7"} {
		require.NoError(t, first.VerifyHostname(strings.Trim(n, "[]")), n)
	}
	require.Error(t, first.VerifyHostname("elsewhere.example"))

	c.advance(leafLife * 65 / 100)
	same, err := get(t, a, s.URL, nil)
	require.NoError(t, err)
	require.Equal(t, first.Raw, same.Raw, "35 % of the life is left: too early")
	c.advance(leafLife * 6 / 100)
	second, err := get(t, a, s.URL, nil)
	require.NoError(t, err)
	require.NotEqual(t, first.Raw, second.Raw, "29 % of the life is left: due")
	a.AddServerNames("192.0.2.8")
	third, err := get(t, a, s.URL, nil)
	require.NoError(t, err)
	require.NoError(t, third.VerifyHostname("192.0.2.8"))
}

func TestConcurrentHandshakesRenewOnce(t *testing.T) {
	c := &clock{}
	var issued atomic.Int32
	a := load(t, t.TempDir(), c)
	s := a.NodeClientSource("n1")
	inner := s.issue
	s.issue = func() (*Pair, error) { issued.Add(1); return inner() }
	for range 2 {
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() { _, err := s.Pair(); require.NoError(t, err) })
		}
		wg.Wait()
		c.advance(leafLife * 8 / 10)
	}
	require.EqualValues(t, 2, issued.Load())
}

func TestFailedRenewalKeepsTheOldCertificate(t *testing.T) {
	c := &clock{}
	a := load(t, t.TempDir(), c)
	s := a.NodeClientSource("n1")
	p, err := s.Pair()
	require.NoError(t, err)
	s.issue = func() (*Pair, error) { return nil, errors.New("disk full") }
	c.advance(leafLife * 9 / 10)
	q, err := s.Pair()
	require.NoError(t, err)
	require.Same(t, p, q)
	c.advance(leafLife)
	_, err = s.Pair()
	require.ErrorContains(t, err, "disk full")
}

func TestClientCertificatesAreOfTheRightAuthority(t *testing.T) {
	a := load(t, t.TempDir(), &clock{})
	p, err := a.NewClientCert("jane", "dev", "ops")
	require.NoError(t, err)
	require.Equal(t, "jane", p.Leaf.Subject.CommonName)
	require.ElementsMatch(t, []string{"dev", "ops"}, p.Leaf.Subject.Organization)
	usage := x509.VerifyOptions{Roots: a.ClientCAPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	_, err = p.Leaf.Verify(usage)
	require.NoError(t, err)
	front, err := a.FrontProxySource().Pair()
	require.NoError(t, err)
	_, err = front.Leaf.Verify(usage)
	require.Error(t, err, "a front-proxy certificate must not be a user's")
	serving, err := a.NewServingCert("x", nil, "localhost")
	require.NoError(t, err)
	_, err = serving.Leaf.Verify(usage)
	require.Error(t, err, "a serving certificate must not be a user's")
}

func TestAdminKubeconfigIsKeptUntilDue(t *testing.T) {
	c := &clock{}
	dir := t.TempDir()
	a := load(t, dir, c)
	path := filepath.Join(dir, "admin.kubeconfig")
	write := func(server string) string {
		require.NoError(t, a.WriteAdminKubeconfig(path, "default", server))
		b, err := os.ReadFile(path)
		require.NoError(t, err)
		return string(b)
	}
	one := write("https://127.0.0.1:6443")
	require.Equal(t, one, write("https://127.0.0.1:6443"))
	require.NotEqual(t, one, write("https://127.0.0.1:6444"), "another address")
	one = write("https://127.0.0.1:6443")
	c.advance(leafLife * 3 / 4)
	require.NotEqual(t, one, write("https://127.0.0.1:6443"), "due")
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode().Perm())
	list, err := Expiries(dir)
	require.NoError(t, err)
	require.Len(t, list, 5) // three authorities, the API's, the admin's
	require.False(t, list[0].NotAfter.After(list[4].NotAfter))
}

func joinOptions(t *testing.T, a *Authority, s *httptest.Server, dir, node string, c *clock) JoinOptions {
	t.Helper()
	token, err := a.JoinToken()
	require.NoError(t, err)
	parsed, err := ParseToken(token.String())
	require.NoError(t, err)
	return JoinOptions{Server: s.URL, Token: parsed, Node: node, Addresses: []string{"127.0.0.1"}, Dir: dir, Clock: c.now}
}

func TestJoin(t *testing.T) {
	c := &clock{}
	a := load(t, t.TempDir(), c)
	h, err := a.JoinHandler(map[string]string{"dns": "10.43.0.10"})
	require.NoError(t, err)
	s := serve(t, a, h)
	dir := t.TempDir()
	o := joinOptions(t, a, s, dir, "n1", c)
	n, err := Join(t.Context(), o)
	require.NoError(t, err)
	require.JSONEq(t, `{"dns":"10.43.0.10"}`, string(n.Cluster()))
	require.Equal(t, "system:node:n1", n.clientPair().Leaf.Subject.CommonName)
	require.Equal(t, []string{NodeGroup}, n.clientPair().Leaf.Subject.Organization)
	checkStreaming(t, a, n)

	// Again from disk, with the server gone.
	s.Close()
	again, err := Join(t.Context(), o)
	require.NoError(t, err)
	require.Equal(t, n.clientPair().Leaf.Raw, again.clientPair().Leaf.Raw)
}

// checkStreaming calls the node as the API does: it must know the node, and the node it.
func checkStreaming(t *testing.T, a *Authority, n *NodeIdentity) {
	t.Helper()
	node := listen(t, n.ServingTLS(), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, err := r.TLS.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: n.ClientCAPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
		if err != nil {
			w.WriteHeader(http.StatusForbidden)
		}
	}))
	client, err := a.KubeletClientSource().Pair()
	require.NoError(t, err)
	_, err = get(t, a, node.URL, client)
	require.NoError(t, err)
}

func TestJoinIsRefused(t *testing.T) {
	c := &clock{}
	a := load(t, t.TempDir(), c)
	h, err := a.JoinHandler(nil)
	require.NoError(t, err)
	s := serve(t, a, h)
	good := joinOptions(t, a, s, t.TempDir(), "n1", c)
	_, err = Join(t.Context(), good)
	require.NoError(t, err)

	for name, test := range map[string]struct {
		change func(*JoinOptions)
		want   string
	}{
		"wrong secret":    {func(o *JoinOptions) { o.Token.Secret = "guess" }, "join token is not valid"},
		"another cluster": {func(o *JoinOptions) { o.Token.CAHash = strings.Repeat("0", 64) }, "not the one that the token names"},
		"taken name":      {func(o *JoinOptions) { o.Node = "n1" }, "another machine joined under this name"},
		"path as name":    {func(o *JoinOptions) { o.Node = "../x" }, "not a node name"},
		"nobody there":    {func(o *JoinOptions) { o.Server = "https://127.0.0.1:1" }, "connection refused"},
	} {
		t.Run(name, func(t *testing.T) {
			o := good
			o.Dir, o.Node = t.TempDir(), "n2"
			test.change(&o)
			_, err := Join(t.Context(), o)
			require.ErrorContains(t, err, test.want)
		})
	}
	require.NoError(t, a.ForgetNode("n1"))
	good.Dir = t.TempDir()
	_, err = Join(t.Context(), good)
	require.NoError(t, err, "a forgotten name is free")
	require.NoError(t, a.RotateJoinToken())
	good.Dir, good.Node = t.TempDir(), "n3"
	_, err = Join(t.Context(), good)
	require.ErrorContains(t, err, "join token is not valid")
}

// TestNodeRenewsWithItsCertificate: the token was rotated since, the node is still let in, under its own name only.
func TestNodeRenewsWithItsCertificate(t *testing.T) {
	c := &clock{}
	a := load(t, t.TempDir(), c)
	h, err := a.JoinHandler(nil)
	require.NoError(t, err)
	s := serve(t, a, h)
	n, err := Join(t.Context(), joinOptions(t, a, s, t.TempDir(), "n1", c))
	require.NoError(t, err)
	old := n.clientPair()
	require.NoError(t, a.RotateJoinToken())
	c.advance(-time.Minute) // enroll at another time gives another certificate; the handshake uses the real clock
	require.NoError(t, n.enroll(t.Context()))
	require.NotEqual(t, old.Leaf.Raw, n.clientPair().Leaf.Raw)
	n.o.Node = "n2"
	require.ErrorContains(t, n.enroll(t.Context()), "join token is not valid")

	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	failed := make(chan error, 1)
	c.advance(leafLife * 8 / 10) // due: Maintain tries at once, and is refused under the wrong name
	go func() { defer close(done); n.Maintain(ctx, func(err error) { failed <- err }) }()
	require.ErrorContains(t, <-failed, "renew the certificates of node n2")
	cancel()
	<-done
}

func TestParseToken(t *testing.T) {
	for _, s := range []string{"", "x", "knarr1.abc.def", "knarr2." + strings.Repeat("a", 64) + ".s", "knarr1." + strings.Repeat("a", 64) + "."} {
		_, err := ParseToken(s)
		require.Error(t, err, "%q", s)
	}
}

func TestNormalNames(t *testing.T) {
	require.Equal(t, []string{"::1", "a"}, normalNames([]string{"a", "0:0::1", "", "a", "::1"}))
	require.True(t, covers(&x509.Certificate{DNSNames: []string{"a"}, IPAddresses: []net.IP{net.ParseIP("10.0.0.1")}}, []string{"a", "10.0.0.1"}))
	require.False(t, covers(&x509.Certificate{}, []string{"a"}))
}

func TestKeysAreP256(t *testing.T) {
	a := load(t, t.TempDir(), &clock{})
	p, err := a.NewClientCert("x")
	require.NoError(t, err)
	block, _ := pem.Decode(p.KeyPEM())
	key, err := x509.ParseECPrivateKey(block.Bytes)
	require.NoError(t, err)
	require.Equal(t, "P-256", key.Curve.Params().Name)
}
