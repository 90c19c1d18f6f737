package tunnel

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"
)

// maxServers is how many servers an agent keeps a tunnel to.
const maxServers = 16

// Pauses between attempts to reach a server: from firstRetry, doubled to lastRetry, each longer by up to half of itself by
// chance, so that the nodes of a server that comes back do not all come at once.
const (
	firstRetry  = 200 * time.Millisecond
	lastRetry   = 10 * time.Second
	retryJitter = 0.5
)

// AgentOptions are what an Agent is made of.
type AgentOptions struct {
	// Server is the host and port of the server that the node was told of.
	Server string
	// Servers gives the hosts and ports of all servers that the cluster knows of, and Changed tells when there are others.
	// The agent keeps a tunnel to each, as none passes on what another one got. Nil means that there is one server.
	Servers func() []string
	Changed <-chan struct{}
	// Path is that of the server's Hub.
	Path string
	// TLS is the node's own client identity.
	TLS *tls.Config
	// Reach is asked for each connection.
	Reach func() Reach
	Log   *slog.Logger
}

// Agent is the node's end of its tunnels. Make it with NewAgent and call Run once.
type Agent struct {
	o      AgentOptions
	vitals vitals
	dialer net.Dialer
}

// NewAgent makes an agent that does nothing yet.
func NewAgent(o AgentOptions) *Agent {
	return &Agent{o: o, vitals: agentVitals, dialer: net.Dialer{Timeout: dialTimeout}}
}

// Run keeps the tunnels until ctx ends.
func (a *Agent) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	kept := map[string]context.CancelFunc{}
	for {
		wanted := a.servers()
		for server, end := range kept {
			if !wanted[server] {
				end()
				delete(kept, server)
			}
		}
		for server := range wanted {
			if kept[server] == nil {
				one, end := context.WithCancel(ctx)
				kept[server] = end
				wg.Go(func() { a.keep(one, server) })
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-a.o.Changed:
		}
	}
}

// servers are those to keep a tunnel to: the one that the node was told of, and where there are several, each.
func (a *Agent) servers() map[string]bool {
	out := map[string]bool{a.o.Server: true}
	if a.o.Servers == nil {
		return out
	}
	if all := a.o.Servers(); len(all) > 1 {
		for _, s := range all[:min(len(all), maxServers)] {
			out[s] = true
		}
	}
	return out
}

// keep keeps one tunnel until ctx ends.
func (a *Agent) keep(ctx context.Context, server string) {
	pauses := wait.Backoff{Duration: firstRetry, Factor: 2, Jitter: retryJitter, Cap: lastRetry, Steps: 1 << 10}
	pause := pauses
	said := false
	for {
		held, err := a.hold(ctx, server)
		if ctx.Err() != nil {
			return
		}
		switch {
		case held:
			pause, said = pauses, false
		case !said:
			a.o.Log.Warn("the node keeps no tunnel to the server, and tries again", "server", server, "err", err)
			said = true
		}
		timer := time.NewTimer(pause.Step())
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}

// hold makes a tunnel and serves it until it ends. held says whether there was one.
func (a *Agent) hold(ctx context.Context, server string) (held bool, err error) {
	c, err := a.offer(ctx, server)
	if err != nil {
		return false, err
	}
	tunnel := watch(c)
	defer tunnel.Close()
	s := &http.Server{
		Handler:   &exit{reach: a.o.Reach, dialer: &a.dialer},
		Protocols: protocols(),
		HTTP2:     a.vitals.http2(),
		ErrorLog:  log.New(io.Discard, "", 0),
	}
	defer s.Close()
	defer context.AfterFunc(ctx, func() { s.Close() })()
	return true, s.Serve(&single{conn: tunnel})
}

// offer connects to a server and asks it to take a tunnel.
func (a *Agent) offer(ctx context.Context, server string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	config := a.o.TLS.Clone()
	config.NextProtos = []string{"http/1.1"} // HTTP/2 has no way to give a connection another use
	c, err := (&tls.Dialer{NetDialer: &a.dialer, Config: config}).DialContext(ctx, "tcp", server)
	if err != nil {
		return nil, err
	}
	defer context.AfterFunc(ctx, func() { c.Close() })()
	r, err := a.ask(c, server)
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return &buffered{Conn: c, r: r}, nil
}

// ask sends the request and reads the answer, after which the connection is the tunnel's.
func (a *Agent) ask(c net.Conn, server string) (*bufio.Reader, error) {
	req, err := http.NewRequest(http.MethodGet, "https://"+server+a.o.Path, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", Protocol)
	if err := req.Write(c); err != nil {
		return nil, err
	}
	r := bufio.NewReader(c)
	answer, err := http.ReadResponse(r, req)
	if err != nil {
		return nil, err
	}
	if answer.StatusCode != http.StatusSwitchingProtocols {
		text, _ := io.ReadAll(io.LimitReader(answer.Body, maxRefusalBytes))
		return nil, fmt.Errorf("the server takes no tunnel: %s: %s", answer.Status, strings.TrimSpace(string(text)))
	}
	return r, nil
}

// buffered is a connection of which something was read ahead.
type buffered struct {
	net.Conn
	r *bufio.Reader
}

// Read implements net.Conn.
func (b *buffered) Read(p []byte) (int, error) { return b.r.Read(p) }

// single is a listener for one connection, and ends with it.
type single struct {
	conn *watched
	once sync.Once
}

// Accept implements net.Listener.
func (s *single) Accept() (net.Conn, error) {
	first := false
	s.once.Do(func() { first = true })
	if first {
		return s.conn, nil
	}
	<-s.conn.gone
	return nil, net.ErrClosed
}

// Close implements net.Listener.
func (s *single) Close() error { return s.conn.Close() }

// Addr implements net.Listener.
func (s *single) Addr() net.Addr { return s.conn.LocalAddr() }

// exit is where connections leave the tunnel on the node.
type exit struct {
	reach  func() Reach
	dialer *net.Dialer
}

// ServeHTTP makes one connection to a target and copies both directions until the target's ends.
func (e *exit) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if req.Method != http.MethodConnect {
		http.Error(w, "a tunnel knows CONNECT only", http.StatusMethodNotAllowed)
		return
	}
	target, err := netip.ParseAddrPort(req.Host)
	if err != nil || !e.reach().Permits(target) {
		http.Error(w, fmt.Sprintf("the node refuses %s: its tunnel leads to its own API and its pods only", req.Host), http.StatusForbidden)
		return
	}
	c, err := e.dialer.DialContext(req.Context(), "tcp", target.String())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	if err := carry(w, req, c.(*net.TCPConn)); err != nil {
		panic(http.ErrAbortHandler) // so that the other end reads an error and no end
	}
}

// carry copies both directions. An end or error of what the target sends ends the connection.
func carry(w http.ResponseWriter, req *http.Request, c *net.TCPConn) error {
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		if _, err := io.CopyBuffer(writerOnly{c}, req.Body, make([]byte, copyBytes)); err == nil {
			_ = c.CloseWrite()
		}
	}()
	// The other end is gone: what it wrote before still reaches the target.
	stop := context.AfterFunc(req.Context(), func() {
		_ = c.SetWriteDeadline(time.Now().Add(lingerTimeout))
		<-sent
		_ = c.Close()
	})
	err := send(w, c)
	if stop() {
		_ = c.Close()
	}
	_ = req.Body.Close()
	<-sent
	return err
}

// send copies what the target sends, each piece at once.
func send(w http.ResponseWriter, c *net.TCPConn) error {
	control := http.NewResponseController(w)
	w.WriteHeader(http.StatusOK)
	if err := control.Flush(); err != nil {
		return err
	}
	buf := make([]byte, copyBytes)
	for {
		n, err := c.Read(buf)
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return err
			}
			if err := control.Flush(); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// writerOnly hides ReadFrom, which would bring a buffer of its own.
type writerOnly struct{ io.Writer }
