package h2

import (
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"unsafe"
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
	return newSocket(c), nil
}

// socketBytes is what a system call is given at most: enough records to make its own cost small, and little enough to stay in the
// processor's cache from the encryption to the kernel's copy.
const socketBytes = batchRecords * (recordBytes + recordOverhead)

// socket is the connection below TLS.
type socket struct {
	net.Conn
	raw     syscall.RawConn       // nil: system calls are Conn's own affair
	attempt func(fd uintptr) bool // try
	fetch   func(fd uintptr) bool // take
	into    []byte                // owned by who reads: where take puts what came
	got     int                   // owned by who reads: of take
	refused error                 // owned by who reads: of take
	// beforeRead is called whenever TLS has no input left and is about to wait. Set before the connection is used by h2.
	beforeRead func()

	mu      sync.Mutex
	holding bool          // guarded by mu: what is written gathers in out
	out     []byte        // guarded by mu
	rest    []byte        // guarded by mu: what put has not written yet
	failed  error         // guarded by mu: of put
	turn    chan struct{} // guarded by mu: of which the handshake holds one
	closed  bool          // guarded by mu
}

// Read implements net.Conn.
func (s *socket) Read(p []byte) (int, error) {
	if s.beforeRead != nil {
		s.beforeRead()
	}
	if s.raw == nil || len(p) == 0 {
		return s.Conn.Read(p)
	}
	s.into, s.got, s.refused = p, 0, nil
	err := s.raw.Read(s.fetch)
	s.into = nil
	switch {
	case err != nil:
		return 0, err
	case s.refused != nil:
		return 0, s.refused
	case s.got == 0:
		return 0, io.EOF
	}
	return s.got, nil
}

// take reads what has come; false when there is nothing yet. It makes the system call itself, as put: half of those that a watch's connection
// makes find nothing, and are over before the runtime has noted that they began.
func (s *socket) take(fd uintptr) bool {
	for {
		n, _, errno := syscall.RawSyscall(syscall.SYS_READ, fd, uintptr(unsafe.Pointer(&s.into[0])), uintptr(len(s.into)))
		switch errno {
		case 0:
			s.got = int(n)
			return true
		case syscall.EAGAIN:
			return false
		case syscall.EINTR:
		default:
			s.refused = os.NewSyscallError("read", errno)
			return true
		}
	}
}

// Write implements net.Conn.
func (s *socket) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.holding {
		n, err := s.Conn.Write(p)
		s.endTurnLocked()
		return n, err
	}
	if len(s.out)+len(p) > socketBytes && len(s.out) > 0 {
		if err := s.put(s.out); err != nil {
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
	err := s.put(s.out)
	giveBatch(s.out)
	s.out = nil
	return err
}

func newSocket(c net.Conn) *socket {
	s := &socket{Conn: c}
	if sc, ok := c.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			s.raw, s.attempt, s.fetch = raw, s.try, s.take
		}
	}
	return s
}

// put writes all of p. It makes the system call itself: copying 64 KiB, and often the client's side of loopback too, takes the kernel tens of
// microseconds, in which the runtime would take this goroutine for blocked, give its processor to another thread and have to find it one
// again. The call does not block.
func (s *socket) put(p []byte) error {
	if s.raw == nil {
		_, err := s.Conn.Write(p)
		return err
	}
	s.rest, s.failed = p, nil
	err := s.raw.Write(s.attempt)
	s.rest = nil
	if err == nil {
		err = s.failed
	}
	return err
}

// try writes what the kernel takes of rest; false when it takes no more now.
func (s *socket) try(fd uintptr) bool {
	for len(s.rest) > 0 {
		n, _, errno := syscall.RawSyscall(syscall.SYS_WRITE, fd, uintptr(unsafe.Pointer(&s.rest[0])), uintptr(len(s.rest)))
		switch errno {
		case 0:
			s.rest = s.rest[n:]
		case syscall.EAGAIN:
			return false
		case syscall.EINTR:
		default:
			s.failed = os.NewSyscallError("write", errno)
			return true
		}
	}
	return true
}
