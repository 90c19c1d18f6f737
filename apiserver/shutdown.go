package apiserver

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	apirequest "k8s.io/apiserver/pkg/endpoints/request"
)

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
	old     oldConnections
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
	await(linger, s.old.none())
	done := make(chan error, 1)
	go func() { done <- server.Shutdown(ctx) }()
	await(ctx, s.running.idle())
	s.endStreams()
	return errors.Join(err, <-done)
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

// oldConnections are the open connections that speak HTTP/1.1, or of which nobody knows yet.
type oldConnections struct {
	mu    sync.Mutex
	known map[net.Conn]bool // guarded by mu; true: certainly HTTP/1.1
	empty chan struct{}     // guarded by mu; closed when none is left; nil unless somebody waits
}

// state is the server's hook for connections that come, speak and go.
func (o *oldConnections) state(conn net.Conn, state http.ConnState) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if state == http.StateNew {
		if o.known == nil {
			o.known = map[net.Conn]bool{}
		}
		o.known[conn] = false
		return
	}
	certain, ok := o.known[conn]
	if !ok || certain && state != http.StateClosed && state != http.StateHijacked {
		return
	}
	if t, ok := conn.(*tls.Conn); ok && (state == http.StateActive || state == http.StateIdle) && t.ConnectionState().NegotiatedProtocol != "h2" {
		o.known[conn] = true
		return
	}
	delete(o.known, conn)
	if len(o.known) == 0 && o.empty != nil {
		close(o.empty)
		o.empty = nil
	}
}

// none gives a channel that is closed as soon as no such connection is open.
func (o *oldConnections) none() <-chan struct{} {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.empty != nil {
		return o.empty
	}
	c := make(chan struct{})
	if len(o.known) == 0 {
		close(c)
		return c
	}
	o.empty = c
	return c
}
