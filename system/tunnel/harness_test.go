package tunnel

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	x509request "k8s.io/apiserver/pkg/authentication/request/x509"
	"k8s.io/apiserver/pkg/authentication/user"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"

	"knarr/system/pki"
)

// The world of these tests is loopback: the node is 127.0.0.1, its pods are 127.77.1.0/24.
const (
	nodeName = "far"
	nodeIP   = "127.0.0.1"
	podIP    = "127.77.1.9"
	testPath = "/tunnel"
	patience = 10 * time.Second
)

var (
	clusterRange = netip.MustParsePrefix("127.77.0.0/16")
	nodeRange    = netip.MustParsePrefix("127.77.1.0/24")
	quiet        = slog.New(slog.NewTextHandler(io.Discard, nil))
)

// noLeaks fails a test that leaves a goroutine.
func noLeaks(t *testing.T) {
	running := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, running) })
}

// world is a server and what nodes need to join it.
type world struct {
	t         *testing.T
	hub       *Hub
	authority *pki.Authority
	nodes     cache.Indexer
	pods      cache.Indexer
	address   string
	direct    atomic.Int32 // direct dials begun
	stop      func()
}

// ways are how direct dialling goes.
type way func(ctx context.Context) error

func open(context.Context) error          { return nil }
func closed(context.Context) error        { return syscall.EHOSTUNREACH }
func swallowed(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }

func newWorld(t *testing.T, direct way) *world {
	t.Helper()
	noLeaks(t)
	w := &world{t: t, nodes: cache.NewIndexer(cache.MetaNamespaceKeyFunc, NodeIndexers(clusterRange)),
		pods: cache.NewIndexer(cache.MetaNamespaceKeyFunc, cache.Indexers{})}
	var err error
	w.authority, err = pki.Load(t.TempDir(), pki.Options{Domain: "cluster.local", ServiceAddress: "10.43.0.1", ServerNames: []string{nodeIP}})
	require.NoError(t, err)
	w.hub = NewHub(HubOptions{
		Nodes: NewNodes(w.nodes, clusterRange), Pods: Pods{Lister: corelisters.NewPodLister(w.pods)}, PodRoutes: true, Log: quiet,
		Dialer: &net.Dialer{Timeout: patience, ControlContext: func(ctx context.Context, _, _ string, _ syscall.RawConn) error {
			w.direct.Add(1)
			return direct(ctx)
		}},
	})
	w.serve("127.0.0.1:0")
	t.Cleanup(func() { w.stop() })
	return w
}

// serve answers as an API server does: authentication by certificate, then the hub.
func (w *world) serve(address string) {
	w.t.Helper()
	l, err := net.Listen("tcp", address)
	require.NoError(w.t, err)
	w.address = l.Addr().String()
	o := x509request.DefaultVerifyOptions()
	o.Roots = w.authority.ClientCAPool()
	authenticator := x509request.New(o, x509request.CommonNameUserConversion)
	mux := http.NewServeMux()
	ctx, cancel := context.WithCancel(context.Background())
	mux.HandleFunc(testPath, func(rw http.ResponseWriter, req *http.Request) {
		if caller, ok, err := authenticator.AuthenticateRequest(req); ok && err == nil {
			req = req.WithContext(apirequest.WithUser(req.Context(), caller.User))
		}
		serving, done := context.WithCancel(req.Context())
		defer done()
		defer context.AfterFunc(ctx, done)()
		w.hub.ServeHTTP(rw, req.WithContext(serving))
	})
	config := w.authority.ServerTLS()
	config.ClientAuth, config.NextProtos = tls.RequestClientCert, []string{"h2", "http/1.1"}
	s := &http.Server{Handler: mux, TLSConfig: config, ErrorLog: slog.NewLogLogger(quiet.Handler(), slog.LevelError)}
	var wg sync.WaitGroup
	wg.Go(func() { s.ServeTLS(l, "", "") })
	w.stop = sync.OnceFunc(func() { cancel(); s.Close(); wg.Wait() })
}

// client is a caller's TLS, with a certificate of the client authority.
func (w *world) client(user string, groups ...string) *tls.Config {
	w.t.Helper()
	pair, err := w.authority.NewClientCert(user, groups...)
	require.NoError(w.t, err)
	return &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: w.authority.ServerCAPool(), Certificates: []tls.Certificate{*pair.TLS()}}
}

// register makes the node's object.
func (w *world) register(name, address, podRange string, apiPort int) {
	require.NoError(w.t, w.nodes.Add(&corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       corev1.NodeSpec{PodCIDR: podRange},
		Status: corev1.NodeStatus{
			Addresses:       []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: address}, {Type: corev1.NodeHostName, Address: name}},
			DaemonEndpoints: corev1.NodeDaemonEndpoints{KubeletEndpoint: corev1.DaemonEndpoint{Port: int32(apiPort)}},
		},
	}))
}

// agent is the agent of the node, not running.
func (w *world) agent(apiPort int) *Agent {
	return NewAgent(AgentOptions{
		Server: w.address, Path: testPath, TLS: w.client("system:node:"+nodeName, user.NodesGroup), Log: quiet,
		Reach: func() Reach {
			return Reach{Addresses: []netip.Addr{netip.MustParseAddr(nodeIP)}, Port: uint16(apiPort), Ranges: []netip.Prefix{nodeRange}}
		},
	})
}

// run runs an agent until the test ends or stop is called.
func (w *world) run(a *Agent) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { a.Run(ctx) })
	stop = func() { cancel(); wg.Wait() }
	w.t.Cleanup(stop)
	return stop
}

// await waits until the hub has n tunnels of the node.
func (h *Hub) await(t *testing.T, n int) {
	t.Helper()
	require.Eventually(t, func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		return len(h.tunnels[nodeName]) == n
	}, patience, 5*time.Millisecond, "%d tunnels", n)
}

// far is a node with a tunnel whose pod answers by serve, and the pod's address.
func (w *world) far(serve func(*net.TCPConn)) string {
	w.t.Helper()
	w.register(nodeName, nodeIP, nodeRange.String(), 10250)
	w.run(w.agent(10250))
	w.hub.await(w.t, 1)
	return listen(w.t, podIP+":0", serve)
}

// listen serves each connection to an address until the test ends.
func listen(t *testing.T, address string, serve func(*net.TCPConn)) string {
	t.Helper()
	l, err := net.Listen("tcp", address)
	require.NoError(t, err)
	var wg sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, c)
			mu.Unlock()
			wg.Go(func() { defer c.Close(); serve(c.(*net.TCPConn)) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for _, c := range conns {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return l.Addr().String()
}

func echo(c *net.TCPConn) { io.Copy(c, c) }

func portOf(t *testing.T, address string) int {
	t.Helper()
	_, text, err := net.SplitHostPort(address)
	require.NoError(t, err)
	port, err := strconv.Atoi(text)
	require.NoError(t, err)
	return port
}

func dial(t *testing.T, h *Hub, address string) net.Conn {
	t.Helper()
	c, err := h.DialContext(t.Context(), "tcp", address)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	require.NoError(t, c.SetDeadline(time.Now().Add(patience)))
	return c
}

// says sends a line and expects it back.
func says(t *testing.T, c net.Conn, text string) {
	t.Helper()
	_, err := io.WriteString(c, text)
	require.NoError(t, err)
	got := make([]byte, len(text))
	_, err = io.ReadFull(c, got)
	require.NoError(t, err)
	require.Equal(t, text, string(got))
}

func pattern(seed, n int) []byte {
	return []byte(strings.Repeat(fmt.Sprintf("%08d", seed), n/8))
}
