package h2

import (
	"context"
	"crypto/tls"
	"errors"
	"log"
	"net"
	"net/http"
	"sync"
	"time"
)

const (
	// prefaceTimeout is how long a new connection may take to say that it speaks HTTP/2.
	prefaceTimeout = 10 * time.Second
	// goAwayTimeout is how long a connection that was told to go away stays open without a request, as net/http's.
	goAwayTimeout = time.Second
	// maxBodies bounds what handlers and feeds add to the bytes that wait to be written on one connection; then they wait for the network.
	maxBodies = 128 << 10
	// maxPending is from where on no answer is given at once any more (Options.Fast).
	maxPending = 512 << 10
	// queuedStreams bounds, as a multiple of MaxStreams, the requests of one connection that wait because handlers of
	// requests which the client has given up still run. A client that goes on is cut off (CVE-2023-39325).
	queuedStreams = 4
	// writeRounds is how often in a row one goroutine writes what others appended before another takes over.
	writeRounds = 4
)

// Options are the parts and bounds of a server. Every field is required unless it says otherwise.
type Options struct {
	// Fast may answer a request at once, on the goroutine that reads the connection: it must not wait for anything. False means
	// that it did not, and the request goes the usual way. Optional.
	Fast func(*Exchange) bool
	// MaxStreams is the number of requests that a connection may have open at the same time.
	MaxStreams int
	// MaxHeaderBytes bounds a request's header fields, counted as RFC 9113 does; beyond it the answer is 431.
	MaxHeaderBytes uint32
	// UploadPerStream and UploadPerConnection bound the bytes of bodies that were sent and not read.
	UploadPerStream, UploadPerConnection int32
	// IdleTimeout is how long a connection without requests stays open; zero: for ever.
	IdleTimeout time.Duration
	// WriteTimeout is how long a client may take in nothing while there is something to send.
	WriteTimeout time.Duration
	// ErrorLog is told of handlers that panic.
	ErrorLog *log.Logger
}

// Server serves the HTTP/2 connections of one http.Server. Make it with Attach.
type Server struct {
	Options
	state func(net.Conn, http.ConnState)
	rests rests

	mu     sync.Mutex
	conns  map[*conn]struct{} // guarded by mu
	ending bool               // guarded by mu
}

// Attach makes an http.Server, before it serves, hand its HTTP/2 connections to this package. Its Shutdown tells their clients to go away;
// its Close ends them.
func Attach(hs *http.Server, o Options) *Server {
	s := &Server{Options: o, state: hs.ConnState, conns: map[*conn]struct{}{}}
	if s.state == nil {
		s.state = func(net.Conn, http.ConnState) {}
	}
	if hs.TLSNextProto == nil {
		hs.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){}
	}
	hs.TLSNextProto["h2"] = func(hs *http.Server, tc *tls.Conn, h http.Handler) { s.serve(hs, tc, h) }
	hs.RegisterOnShutdown(s.goAway)
	return s
}

// serve runs one connection.
func (s *Server) serve(hs *http.Server, tc *tls.Conn, h http.Handler) {
	base := context.Background()
	if b, ok := h.(interface{ BaseContext() context.Context }); ok {
		base = b.BaseContext()
	}
	ctx, cancel := context.WithCancel(context.WithValue(base, http.ServerContextKey, hs))
	defer cancel()
	c := newConn(ctx, s, tc, h)
	if s.enter(c) {
		c.goAway(false)
	}
	defer s.leave(c)
	s.state(tc, http.StateActive)
	c.serve()
}

// enter remembers a connection, and reports whether the server is ending.
func (s *Server) enter(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns[c] = struct{}{}
	return s.ending
}

func (s *Server) leave(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
}

// goAway tells all clients to send their next requests elsewhere. What is under way, or on its way here, is answered.
func (s *Server) goAway() {
	s.mu.Lock()
	s.ending = true
	all := make([]*conn, 0, len(s.conns))
	for c := range s.conns {
		all = append(all, c)
	}
	s.mu.Unlock()
	for _, c := range all {
		c.goAway(true)
	}
}

// errGone is what writes to a connection that has ended fail with.
var errGone = errors.New("h2: the connection is gone")
