package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/apiserver/pkg/authentication/user"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
)

const (
	nodeUserPrefix = "system:node:"
	nodeGroup      = user.NodesGroup
	// tunnelsPerNode is how many tunnels of a node are kept; one more ends the oldest. A node that knows this server by
	// several addresses has several, and one whose connection broke may be back before the broken one is found dead.
	tunnelsPerNode = 4
)

// Hub is the server's end of all tunnels: an http.Handler that takes them, and the dialer that uses them. Its methods may be
// called concurrently.
type Hub struct {
	o         HubOptions
	vitals    vitals
	headStart time.Duration

	mu      sync.Mutex
	tunnels map[string][]*tunnel // guarded by mu: by node, the newest last
	came    chan struct{}        // guarded by mu: closed and replaced when a tunnel comes
}

// HubOptions are what a Hub is made of.
type HubOptions struct {
	// Nodes and Pods tell whose an address is.
	Nodes Nodes
	Pods  Pods
	// PodRoutes says whether this machine has routes to pods: whether it is a node of the cluster.
	PodRoutes bool
	// Dialer makes direct connections.
	Dialer *net.Dialer
	Log    *slog.Logger
}

// NewHub makes a hub without tunnels.
func NewHub(o HubOptions) *Hub {
	return &Hub{o: o, vitals: hubVitals, headStart: headStart, tunnels: map[string][]*tunnel{}, came: make(chan struct{})}
}

// ServeHTTP takes a tunnel. The request must have passed authentication: the caller's name, which its certificate gives, is
// the node that the tunnel is for. It returns when the tunnel has ended or the request's context ends.
func (h *Hub) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	node, ok := callingNode(req.Context())
	if !ok {
		http.Error(w, "a tunnel is offered by a node, with the node's own client certificate", http.StatusForbidden)
		return
	}
	if !strings.EqualFold(req.Header.Get("Upgrade"), Protocol) {
		w.Header().Set("Upgrade", Protocol)
		http.Error(w, "a tunnel starts with a request to upgrade the connection to "+Protocol, http.StatusUpgradeRequired)
		return
	}
	c, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, "a tunnel needs a connection of its own, with HTTP/1.1: "+err.Error(), http.StatusBadRequest)
		return
	}
	defer c.Close()
	if buffered.Reader.Buffered() > 0 {
		return // the node must wait for the answer
	}
	if _, err := io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+Protocol+"\r\n\r\n"); err != nil {
		return
	}
	t, err := newTunnel(req.Context(), node, c, h.vitals)
	if err != nil {
		h.o.Log.Error("a node's tunnel does not start", "node", node, "err", err)
		return
	}
	h.add(t)
	h.o.Log.Info("a node keeps a tunnel", "node", node, "from", req.RemoteAddr)
	select {
	case <-t.conn.gone:
	case <-req.Context().Done():
	}
	h.remove(t)
	h.o.Log.Info("a node's tunnel ended", "node", node, "from", req.RemoteAddr)
}

func callingNode(ctx context.Context) (string, bool) {
	u, ok := apirequest.UserFrom(ctx)
	if !ok || !slices.Contains(u.GetGroups(), nodeGroup) {
		return "", false
	}
	name, ok := strings.CutPrefix(u.GetName(), nodeUserPrefix)
	return name, ok && name != ""
}

func (h *Hub) add(t *tunnel) {
	h.mu.Lock()
	list := append(h.tunnels[t.node], t)
	var old *tunnel
	if len(list) > tunnelsPerNode {
		old, list = list[0], slices.Clone(list[1:])
	}
	h.tunnels[t.node] = list
	close(h.came)
	h.came = make(chan struct{})
	h.mu.Unlock()
	if old != nil {
		old.close()
	}
}

func (h *Hub) remove(t *tunnel) {
	h.mu.Lock()
	if list := slices.DeleteFunc(slices.Clone(h.tunnels[t.node]), func(x *tunnel) bool { return x == t }); len(list) > 0 {
		h.tunnels[t.node] = list
	} else {
		delete(h.tunnels, t.node)
	}
	h.mu.Unlock()
	t.close()
}

// of gives a node's newest tunnel, nil where there is none, and a channel that is closed when any tunnel comes.
func (h *Hub) of(node string) (*tunnel, <-chan struct{}) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if list := h.tunnels[node]; len(list) > 0 {
		return list[len(list)-1], h.came
	}
	return nil, h.came
}

// tunnel is one tunnel at the server's end.
type tunnel struct {
	node   string
	conn   *watched
	client *http.ClientConn
	remote netip.Addr // where the node's connection came from
	// first says, for each kind of target, that direct dialling was of no use: the tunnel is tried first.
	first [kinds]atomic.Bool
}

// newTunnel makes this end the client of HTTP/2 on a connection.
func newTunnel(ctx context.Context, node string, c net.Conn, v vitals) (*tunnel, error) {
	t := &tunnel{node: node, conn: watch(c)}
	if from, err := netip.ParseAddrPort(c.RemoteAddr().String()); err == nil {
		t.remote = from.Addr().Unmap()
	}
	transport := &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) { return t.conn, nil },
		Protocols:   protocols(),
		HTTP2:       v.http2(),
	}
	var err error
	t.client, err = transport.NewClientConn(ctx, "http", "tunnel:80")
	return t, err
}

func (t *tunnel) close() {
	_ = t.client.Close()
	_ = t.conn.Close()
}

// Refusal is a node's answer that there is no connection to a target: because its tunnel does not lead there (403), or
// because the target does not answer (502).
type Refusal struct {
	Node   string
	Target netip.AddrPort
	Status int
	Text   string
}

// Error implements error.
func (r *Refusal) Error() string {
	return fmt.Sprintf("dial %s through the tunnel of node %q: %s", r.Target, r.Node, r.Text)
}

// dial makes a connection to a target through the tunnel.
func (t *tunnel) dial(ctx context.Context, target netip.AddrPort) (net.Conn, error) {
	if err := t.client.Reserve(); err != nil {
		return nil, fmt.Errorf("the tunnel of node %q has ended or carries %d connections already: %w", t.node, maxConnections, err)
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	alive, abort := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, abort)
	c, body := newConn(t.conn.LocalAddr(), net.TCPAddrFromAddrPort(target), abort)
	req := &http.Request{
		Method: http.MethodConnect, URL: &url.URL{Scheme: "http", Host: target.String()}, Host: target.String(),
		Header: http.Header{}, Body: body, ContentLength: -1,
	}
	answer, err := t.client.RoundTrip(req.WithContext(alive))
	if !stop() && err == nil {
		answer.Body.Close()
		err = ctx.Err()
	}
	if err != nil {
		abort()
		return nil, fmt.Errorf("the tunnel of node %q: %w", t.node, errors.Join(ctx.Err(), err))
	}
	if answer.StatusCode != http.StatusOK {
		defer abort()
		defer answer.Body.Close()
		text, _ := io.ReadAll(io.LimitReader(answer.Body, maxRefusalBytes))
		return nil, &Refusal{Node: t.node, Target: target, Status: answer.StatusCode, Text: strings.TrimSpace(string(text))}
	}
	c.receive(answer.Body)
	return c, nil
}
