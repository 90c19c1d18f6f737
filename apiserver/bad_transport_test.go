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
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kubernetes/pkg/apis/core"
	"k8s.io/kubernetes/pkg/serviceaccount"

	"knarr/apiserver"
)

const (
	// lameClients is how many connections hold back the rest of what they began to send.
	lameClients = 200
	// resets, pings and continuations are how often a client of HTTP/2 does what no client does.
	resets, pings, continuations = 5_000, 30_000, 200
)

// identityPapers are what a certificate is made from; the zero value is one that holds for an hour, signed by the authority.
type identityPapers struct {
	from, until time.Duration // from now
	usage       x509.ExtKeyUsage
	selfSigned  bool
}

// issue makes a client certificate of a cluster administrator.
func issue(t testing.TB, key *ecdsa.PrivateKey, ca []byte, p identityPapers) tls.Certificate {
	t.Helper()
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	block, _ := pem.Decode(ca)
	parent, err := x509.ParseCertificate(block.Bytes)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "captain", Organization: []string{"system:masters"}},
		NotBefore: time.Now().Add(p.from), NotAfter: time.Now().Add(p.until), KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{p.usage},
	}
	if p.selfSigned {
		parent, key = template, own
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, own.Public(), key)
	require.NoError(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: own}
}

// TestBadCertificatesAndTokens shows papers that prove nothing.
func TestBadCertificatesAndTokens(t *testing.T) {
	key, ca := authority(t)
	otherKey, otherCA := authority(t)
	var settings *apiserver.Config
	s := serve(t, func(c *apiserver.Config) { c.ClientCA, settings = ca, c })
	valid := identityPapers{from: -time.Minute, until: time.Hour, usage: x509.ExtKeyUsageClientAuth}
	with := func(change func(*identityPapers)) identityPapers {
		p := valid
		change(&p)
		return p
	}
	for _, test := range []struct {
		name string
		cert tls.Certificate
		want int
	}{
		{"valid", issue(t, key, ca, valid), 200},
		{"expired", issue(t, key, ca, with(func(p *identityPapers) { p.until = -time.Second })), 401},
		{"not yet valid", issue(t, key, ca, with(func(p *identityPapers) { p.from = time.Hour / 2 })), 401},
		{"self-signed", issue(t, key, ca, with(func(p *identityPapers) { p.selfSigned = true })), 401},
		{"of another authority of the same name", issue(t, otherKey, otherCA, valid), 401},
		{"for servers", issue(t, key, ca, with(func(p *identityPapers) { p.usage = x509.ExtKeyUsageServerAuth })), 401},
	} {
		for _, http2 := range []bool{false, true} {
			c := newClient(t, http2)
			c.Transport.(*http.Transport).TLSClientConfig.Certificates = []tls.Certificate{test.cert}
			a := s.ask(t, c, request{path: "/api/v1/namespaces"})
			require.Equal(t, test.want, a.status, "%s: %s", test.name, a.body)
		}
	}
	account, err := s.CoreV1().ServiceAccounts("kube-system").Create(context.Background(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "mate"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	token := func(key any, issuer string, seconds int64, audience string) string {
		g, err := serviceaccount.JWTTokenGenerator(issuer, key)
		require.NoError(t, err)
		public, private, err := serviceaccount.Claims(core.ServiceAccount{ObjectMeta: account.ObjectMeta}, nil, nil, nil, seconds, 0, []string{audience})
		require.NoError(t, err)
		out, err := g.GenerateToken(context.Background(), public, private)
		require.NoError(t, err)
		return out
	}
	const issuer = apiserver.ServiceAccountIssuer
	good := token(settings.ServiceAccountKey, issuer, 600, issuer)
	for _, test := range []struct {
		name, token string
		want        int
	}{
		{"valid, without rights", good, 403},
		{"expired", token(settings.ServiceAccountKey, issuer, -600, issuer), 401},
		{"wrong audience", token(settings.ServiceAccountKey, issuer, 600, "https://elsewhere"), 401},
		{"wrong issuer", token(settings.ServiceAccountKey, "https://elsewhere", 600, issuer), 401},
		{"wrong signature", token(otherKey, issuer, 600, issuer), 401},
		{"changed signature", good[:len(good)-4] + "AAAA", 401},
		{"no signature", good[:strings.LastIndex(good, ".")+1], 401},
		{"changed claims", strings.Replace(good, ".", ".e30", 1), 401},
	} {
		a := s.ask(t, newClient(t, true), request{path: "/api/v1/namespaces", token: test.token})
		require.Equal(t, test.want, a.status, "%s: %s", test.name, a.body)
	}
}

// http1 sends bytes on a connection of its own and gives what comes back.
func http1(t testing.TB, address, send string) string {
	t.Helper()
	c, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}})
	require.NoError(t, err)
	defer c.Close()
	require.NoError(t, c.SetDeadline(time.Now().Add(timeout)))
	_, err = io.WriteString(c, send)
	require.NoError(t, err)
	line := make([]byte, len("HTTP/1.1 400"))
	_, err = io.ReadFull(c, line)
	require.NoError(t, err, "%q", send)
	return string(line[len("HTTP/1.1 "):])
}

// TestSmuggling sends requests that two servers in a row might take for different ones.
func TestSmuggling(t *testing.T) {
	s := serve(t, func(*apiserver.Config) {})
	address := strings.TrimPrefix(s.url, "https://")
	const post = "POST /api/v1/namespaces HTTP/1.1\r\nHost: x\r\n"
	for _, test := range []struct{ send, want string }{
		{post + "Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello", "400"},
		{post + "Content-Length: -1\r\n\r\n", "400"},
		{post + "Content-Length: +5\r\n\r\nhello", "400"},
		{post + "Content-Length: 5, 5\r\n\r\nhello", "400"},
		{post + "Content-Length: 0x5\r\n\r\nhello", "400"},
		{post + "Content-Length: 99999999999999999999\r\n\r\n", "400"},
		{post + "Transfer-Encoding: xchunked\r\n\r\n", "501"},
		{post + "Transfer-Encoding: chunked, identity\r\n\r\n", "501"},
		{post + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "501"},
		{post + "Transfer-Encoding : chunked\r\n\r\n", "400"},
		{post + "X\x00Y: z\r\n\r\n", "400"},
		{post + "X: a\x00b\r\n\r\n", "400"},
		{post + "X Y: z\r\n\r\n", "400"},
		{post + ": z\r\n\r\n", "400"},
		{post + "no colon\r\n\r\n", "400"},
		{"GET /api HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", "400"},
		{"GET /api HTTP/1.1\r\nHost: a b\r\n\r\n", "400"},
		{"GET /api HTTP/9.9\r\nHost: x\r\n\r\n", "505"},
		{"GET /api x HTTP/1.1\r\nHost: x\r\n\r\n", "400"},
		{"GET /api\x00 HTTP/1.1\r\nHost: x\r\n\r\n", "400"},
		{"G\x01T /api HTTP/1.1\r\nHost: x\r\n\r\n", "400"},
		{"GET\t/api\tHTTP/1.1\r\nHost: x\r\n\r\n", "400"},
		{"GET %zz HTTP/1.1\r\nHost: x\r\n\r\n", "400"},
		{"GET / HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("X: "+strings.Repeat("y", 1000)+"\r\n", 1500) + "\r\n", "431"},
	} {
		require.Equal(t, test.want, http1(t, address, test.send), "%.100q", test.send)
	}
}

// h2 is a client of HTTP/2 that can do what it should not.
type h2 struct {
	*http2.Framer
	conn *tls.Conn
}

func dialH2(t testing.TB, address string) *h2 {
	t.Helper()
	c, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	require.NoError(t, err)
	require.NoError(t, c.SetDeadline(time.Now().Add(timeout)))
	_, err = io.WriteString(c, http2.ClientPreface)
	require.NoError(t, err)
	f := http2.NewFramer(c, c)
	f.AllowIllegalWrites = true
	require.NoError(t, f.WriteSettings())
	return &h2{f, c}
}

// headers begins a GET on a stream.
func (c *h2) headers(stream uint32, end bool) error {
	var block bytes.Buffer
	e := hpack.NewEncoder(&block)
	for _, f := range [][2]string{{":method", "GET"}, {":scheme", "https"}, {":path", "/api/v1/namespaces"}, {":authority", "x"}, {"authorization", "Bearer " + adminToken}} {
		if err := e.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}); err != nil {
			return err
		}
	}
	return c.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: block.Bytes(), EndStream: true, EndHeaders: end})
}

// end reads until the server ends the connection, and gives the code of its farewell.
func (c *h2) end() (http2.ErrCode, error) {
	code := http2.ErrCodeNo
	for {
		f, err := c.ReadFrame()
		var broken http2.ConnectionError
		switch {
		case err != nil && !errors.As(err, &broken):
			return code, err
		case err != nil:
			return code, io.EOF
		}
		if away, ok := f.(*http2.GoAwayFrame); ok {
			code = away.ErrCode
		}
	}
}

// TestMisuseOfHTTP2 breaks the protocol's rules. Each time the server ends that connection, and only that one.
func TestMisuseOfHTTP2(t *testing.T) {
	s := serve(t, func(*apiserver.Config) {})
	address := strings.TrimPrefix(s.url, "https://")
	other := newClient(t, true)
	require.Equal(t, 200, s.ask(t, other, request{path: "/readyz"}).status)
	before := runtime.NumGoroutine()
	for name, misuse := range map[string]func(c *h2) error{
		"rapid resets": func(c *h2) error {
			for i := range uint32(resets) {
				if err := c.headers(2*i+1, true); err != nil {
					return err
				}
				if err := c.WriteRSTStream(2*i+1, http2.ErrCodeCancel); err != nil {
					return err
				}
			}
			return c.WriteData(0, true, nil)
		},
		"headers without end": func(c *h2) error {
			if err := c.headers(1, false); err != nil {
				return err
			}
			var block bytes.Buffer
			e := hpack.NewEncoder(&block)
			if err := e.WriteField(hpack.HeaderField{Name: "x", Value: strings.Repeat("\x01", 16000), Sensitive: true}); err != nil {
				return err
			}
			for range continuations {
				if err := c.WriteContinuation(1, false, block.Bytes()); err != nil {
					return err
				}
			}
			return nil
		},
		"pings": func(c *h2) error {
			for range pings {
				if err := c.WritePing(false, [8]byte{}); err != nil {
					return err
				}
			}
			return c.WriteData(0, true, nil)
		},
		"data for nobody": func(c *h2) error { return c.WriteData(1, true, []byte("x")) },
		"even stream":     func(c *h2) error { return c.headers(2, true) },
		"window overflow": func(c *h2) error {
			return errors.Join(c.WriteWindowUpdate(0, 1<<31-1), c.WriteWindowUpdate(0, 1<<31-1))
		},
		"push": func(c *h2) error {
			return c.WriteRawFrame(http2.FramePushPromise, http2.FlagPushPromiseEndHeaders, 1, make([]byte, 8))
		},
		"ping of wrong size":      func(c *h2) error { return c.WriteRawFrame(http2.FramePing, 0, 0, make([]byte, 3)) },
		"settings of nobody":      func(c *h2) error { return c.WriteRawFrame(http2.FrameSettings, 0, 1, make([]byte, 6)) },
		"frame too large":         func(c *h2) error { return c.WriteRawFrame(http2.FrameData, 0, 1, make([]byte, 1<<20)) },
		"continuation of nothing": func(c *h2) error { return c.WriteContinuation(1, true, []byte("x")) },
		"broken compression": func(c *h2) error {
			return c.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0xff, 0xff, 0xff, 0xff, 0xff}, EndStream: true, EndHeaders: true})
		},
	} {
		c := dialH2(t, address)
		sent := make(chan error, 1)
		go func() { sent <- misuse(c) }()
		code, err := c.end()
		require.NotErrorIs(t, err, context.DeadlineExceeded, name)
		var slow interface{ Timeout() bool }
		require.False(t, errors.As(err, &slow) && slow.Timeout(), "%s: the connection goes on (%s)", name, code)
		_ = c.conn.Close() // the server has closed it
		<-sent
		require.Equal(t, 200, s.ask(t, other, request{path: "/readyz"}).status, name)
	}
	require.Eventually(t, func() bool { return runtime.NumGoroutine() <= before+goroutineGrowth }, timeout, time.Millisecond)
}

// TestLameClients holds back the end of headers, bodies and answers on many connections. Others are served all the while,
// and nothing is left of them when they go; limits_test.go shows that the server does not wait for ever.
func TestLameClients(t *testing.T) {
	s := serve(t, func(*apiserver.Config) {})
	address := strings.TrimPrefix(s.url, "https://")
	c := newClient(t, true)
	ready := request{path: "/readyz"}
	require.Equal(t, 200, s.ask(t, c, ready).status)
	before, memory := runtime.NumGoroutine(), heap()
	auth := "Host: x\r\nAuthorization: Bearer " + adminToken + "\r\n"
	begun := []string{
		"GET /api", "GET /api HTTP/1.1\r\nHost: x\r\nX: ",
		"POST /api/v1/namespaces HTTP/1.1\r\n" + auth + "Content-Type: application/json\r\nContent-Length: 1000000\r\n\r\n{",
		"POST /api/v1/namespaces HTTP/1.1\r\n" + auth + "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{",
		"GET /api/v1/namespaces?watch=1 HTTP/1.1\r\n" + auth + "\r\n", "GET /openapi/v2 HTTP/1.1\r\n" + auth + "\r\n",
	}
	var held []*tls.Conn
	for i := range lameClients {
		conn, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}})
		require.NoError(t, err)
		_, err = io.WriteString(conn, begun[i%len(begun)])
		require.NoError(t, err)
		held = append(held, conn)
		if i%20 == 0 {
			require.Equal(t, 200, s.ask(t, c, ready).status)
		}
	}
	for _, conn := range held {
		require.NoError(t, conn.NetConn().Close())
	}
	require.Equal(t, 200, s.ask(t, c, ready).status)
	require.Eventually(t, func() bool { return runtime.NumGoroutine() <= before+goroutineGrowth }, timeout, time.Millisecond)
	after := heap()
	require.Less(t, after, memory+documentHeapBytes)
}
