package h2

import (
	"net"
	"sync"
)

// Listen makes a listener whose connections this package can serve well: they gather what TLS writes, and tell before they
// wait for input. Connections of another listener work too, with more system calls.
func Listen(l net.Listener) net.Listener { return listener{l} }

type listener struct{ net.Listener }

// Accept implements net.Listener.
func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &socket{Conn: c}, nil
}

// socket is the connection below TLS.
type socket struct {
	net.Conn
	// beforeRead is called whenever TLS has no input left and is about to wait. Set before the connection is used by h2.
	beforeRead func()

	mu      sync.Mutex
	holding bool   // guarded by mu: what is written stays in out until release
	out     []byte // guarded by mu
}

// Read implements net.Conn.
func (s *socket) Read(p []byte) (int, error) {
	if s.beforeRead != nil {
		s.beforeRead()
	}
	return s.Conn.Read(p)
}

// Write implements net.Conn.
func (s *socket) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.holding {
		s.out = append(s.out, p...)
		return len(p), nil
	}
	return s.Conn.Write(p)
}

// hold keeps writes back until release.
func (s *socket) hold() {
	s.mu.Lock()
	s.holding, s.out = true, takeBatch()
	s.mu.Unlock()
}

// release sends what was kept back.
func (s *socket) release() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.holding = false
	_, err := s.Conn.Write(s.out)
	giveBatch(s.out)
	s.out = nil
	return err
}
