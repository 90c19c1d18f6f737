package apiserver

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	apirequest "k8s.io/apiserver/pkg/endpoints/request"
)

// goodbyeTimeout is how long the clients of a stopping server have to read that it goes away, when nothing else is under way.
const goodbyeTimeout = 200 * time.Millisecond

// lingerTimeout is how long a stopping server waits for idle HTTP/1.1 connections to be used once more.
const lingerTimeout = 500 * time.Millisecond

// shutdown ends a server without dropping a request:
//
//  1. /readyz fails, no new connection is accepted, and the open ones are told to go away once what they carry is answered:
//     by GOAWAY, or by Connection: close in HTTP/1.1, whose idle connections are left open for lingerTimeout so that a request
//     that is on its way meets no closed door;
//  2. watches end as they end at any time, and their clients watch on elsewhere;
//  3. what is under way is answered, for drainTimeout at most;
//  4. what is left ends: logs that are followed, exec, port-forward.
type shutdown struct {
	running tracker // requests that are not long-running
	conns   connections
	begun   atomic.Bool

	watches, streams       context.Context
	endWatches, endStreams context.CancelFunc
}

func newShutdown() *shutdown {
	s := &shutdown{}
	s.watches, s.endWatches = context.WithCancel(context.Background())
	s.streams, s.endStreams = context.WithCancel(context.Background())
	return s
}

// wrap counts the bounded requests and bounds the others.
func (s *shutdown) wrap(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.ProtoMajor == 1 && s.begun.Load() {
			w.Header().Set("Connection", "close")
		}
		info, ok := apirequest.RequestInfoFrom(req.Context())
		if !ok || !longRunning(req, info) {
			s.running.enter()
			defer s.running.leave()
			h.ServeHTTP(w, req)
			return
		}
		end := s.streams
		if info.Verb == "watch" {
			end = s.watches
		}
		ctx, cancel := context.WithCancel(req.Context())
		defer cancel()
		defer context.AfterFunc(end, cancel)()
		h.ServeHTTP(w, req.WithContext(ctx))
	})
}

// run does the steps. It returns when nothing is left or ctx ends.
func (s *shutdown) run(ctx context.Context, server *http.Server, listener net.Listener) error {
	s.begun.Store(true)
	err := listener.Close()
	s.endWatches()
	linger, cancel := context.WithTimeout(ctx, lingerTimeout)
	defer cancel()
	await(linger, s.conns.oldGone())
	// Shutdown tells the connections; it would look in ever longer steps whether they are closed, where we are told.
	telling, told := context.WithCancel(ctx)
	defer told()
	go func() { _ = server.Shutdown(telling) }()
	await(ctx, s.running.idle())
	s.endStreams()
	goodbye, cancel := context.WithTimeout(ctx, goodbyeTimeout)
	defer cancel()
	await(goodbye, s.conns.allGone())
	await(ctx, s.running.idle()) // what came before the news had spread
	return err
}

// await waits for c or the end of ctx.
func await(ctx context.Context, c <-chan struct{}) {
	select {
	case <-c:
	case <-ctx.Done():
	}
}

// tracker counts what is under way and tells when nothing is. Unlike a WaitGroup, it lets more come while somebody waits.
type tracker struct {
	mu      sync.Mutex
	count   int             // guarded by mu
	waiting []chan struct{} // guarded by mu
}

func (t *tracker) enter() {
	t.mu.Lock()
	t.count++
	t.mu.Unlock()
}

func (t *tracker) leave() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.count--; t.count > 0 {
		return
	}
	for _, c := range t.waiting {
		close(c)
	}
	t.waiting = nil
}

// idle gives a channel that is closed as soon as nothing is under way.
func (t *tracker) idle() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	c := make(chan struct{})
	if t.count == 0 {
		close(c)
	} else {
		t.waiting = append(t.waiting, c)
	}
	return c
}

// connections are the open ones, but for those that were taken over by an upgrade.
type connections struct {
	mu sync.Mutex
	// old and all are guarded by mu. old are those that speak HTTP/1.1 (true) or of which nobody knows yet (false).
	old map[net.Conn]bool
	all tracker
	// noOld is guarded by mu: closed when old gets empty; nil unless somebody waits.
	noOld chan struct{}
}

// state is the server's hook for connections that come, speak and go.
func (c *connections) state(conn net.Conn, state http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	gone := state == http.StateClosed || state == http.StateHijacked
	switch {
	case state == http.StateNew:
		if c.old == nil {
			c.old = map[net.Conn]bool{}
		}
		c.old[conn] = false
		c.all.enter()
		return
	case gone:
		c.all.leave()
	}
	certain, ok := c.old[conn]
	if !ok || certain && !gone {
		return
	}
	if t, ok := conn.(*tls.Conn); ok && !gone && t.ConnectionState().NegotiatedProtocol != "h2" {
		c.old[conn] = true
		return
	}
	delete(c.old, conn)
	if len(c.old) == 0 && c.noOld != nil {
		close(c.noOld)
		c.noOld = nil
	}
}

// allGone gives a channel that is closed as soon as no connection is open.
func (c *connections) allGone() <-chan struct{} { return c.all.idle() }

// oldGone gives a channel that is closed as soon as no connection is open that speaks HTTP/1.1.
func (c *connections) oldGone() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.noOld != nil {
		return c.noOld
	}
	done := make(chan struct{})
	if len(c.old) == 0 {
		close(done)
		return done
	}
	c.noOld = done
	return done
}
