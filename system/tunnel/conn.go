package tunnel

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// conn is a connection through a tunnel, at the server's end. Both directions pass through pipes, which bring deadlines.
type conn struct {
	in, out       net.Conn // what is read comes from in, what is written goes to out
	local, remote net.Addr
	abort         context.CancelFunc

	closed  atomic.Bool // by Close
	flushed atomic.Bool // all that was written is on its way
	failure atomic.Pointer[error]
}

var _ net.Conn = (*conn)(nil)

// sending is a request's body: what was written to a connection.
type sending struct {
	net.Conn
	drained func()
}

// Read implements io.Reader. HTTP/2 has sent all of a read before it reads on, so its end says that all has gone out.
func (s *sending) Read(p []byte) (int, error) {
	n, err := s.Conn.Read(p)
	if err != nil {
		s.drained()
	}
	return n, err
}

// newConn makes a connection and the request's body that carries what is written to it.
func newConn(local, remote net.Addr, abort context.CancelFunc) (*conn, io.ReadCloser) {
	c := &conn{local: local, remote: remote, abort: abort}
	out, body := net.Pipe()
	c.out = out
	return c, &sending{Conn: body, drained: c.drained}
}

// receive gives the connection what arrives, from now on.
func (c *conn) receive(body io.ReadCloser) {
	in, feed := net.Pipe()
	c.in = in
	go func() {
		defer c.abort()
		_, err := io.CopyBuffer(feed, body, make([]byte, copyBytes))
		if err != nil {
			c.failure.Store(&err)
		}
		feed.Close()
		body.Close()
	}()
}

func (c *conn) drained() {
	c.flushed.Store(true)
	if c.closed.Load() {
		c.abort()
	}
}

// Read implements net.Conn. A peer that broke off is an error, and no end: what came is not all.
func (c *conn) Read(p []byte) (int, error) {
	n, err := c.in.Read(p)
	switch {
	case errors.Is(err, io.EOF):
		if f := c.failure.Load(); f != nil {
			return n, c.op("read", *f)
		}
	case errors.Is(err, io.ErrClosedPipe):
		return n, c.op("read", net.ErrClosed)
	}
	return n, err
}

// Write implements net.Conn.
func (c *conn) Write(p []byte) (int, error) {
	n, err := c.out.Write(p)
	if errors.Is(err, io.ErrClosedPipe) {
		if f := c.failure.Load(); f != nil && !c.closed.Load() {
			return n, c.op("write", *f)
		}
		return n, c.op("write", net.ErrClosed)
	}
	return n, err
}

func (c *conn) op(op string, err error) error {
	return &net.OpError{Op: op, Net: Protocol, Source: c.local, Addr: c.remote, Err: err}
}

// CloseWrite ends one direction: the other end reads what was written, then the end.
func (c *conn) CloseWrite() error { return c.out.Close() }

// Close implements net.Conn. What was written still goes out, for lingerTimeout at most.
func (c *conn) Close() error {
	if c.closed.Swap(true) {
		return nil
	}
	time.AfterFunc(lingerTimeout, c.abort)
	err := errors.Join(c.in.Close(), c.out.Close())
	if c.flushed.Load() {
		c.abort()
	}
	return err
}

// LocalAddr implements net.Conn: the tunnel's own.
func (c *conn) LocalAddr() net.Addr { return c.local }

// RemoteAddr implements net.Conn: the address at the tunnel's far end.
func (c *conn) RemoteAddr() net.Addr { return c.remote }

// SetDeadline implements net.Conn.
func (c *conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline implements net.Conn.
func (c *conn) SetReadDeadline(t time.Time) error { return c.in.SetReadDeadline(t) }

// SetWriteDeadline implements net.Conn.
func (c *conn) SetWriteDeadline(t time.Time) error { return c.out.SetWriteDeadline(t) }

// watched is a connection that tells when it is closed.
type watched struct {
	net.Conn
	once sync.Once
	gone chan struct{}
}

func watch(c net.Conn) *watched { return &watched{Conn: c, gone: make(chan struct{})} }

// Close implements net.Conn.
func (w *watched) Close() error {
	w.once.Do(func() { close(w.gone) })
	return w.Conn.Close()
}
