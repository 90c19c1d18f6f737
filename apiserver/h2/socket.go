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

// socketBytes is what a system call is given at most: enough records to make its own cost small, and little enough to stay in the
// processor's cache from the encryption to the kernel's copy.
const socketBytes = 128 << 10

// socket is the connection below TLS.
type socket struct {
	net.Conn
	// beforeRead is called whenever TLS has no input left and is about to wait. Set before the connection is used by h2.
	beforeRead func()

	mu      sync.Mutex
	holding bool   // guarded by mu: what is written gathers in out
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
	if !s.holding {
		return s.Conn.Write(p)
	}
	if len(s.out)+len(p) > socketBytes && len(s.out) > 0 {
		if _, err := s.Conn.Write(s.out); err != nil {
			return 0, err
		}
		s.out = s.out[:0]
	}
	s.out = append(withRoom(s.out, len(p)), p...)
	return len(p), nil
}

// hold keeps writes back, until release or until socketBytes have gathered.
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
