//go:build cgo

package supervisor

import (
	"context"
	"errors"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"knarr/node/shim"
)

// request is one call: the message, the descriptors that came with it, and the
// connection for the replies.
type request struct {
	shim.Request
	conn  *net.UnixConn
	files map[string]*os.File
}

// take hands a descriptor of the message over to the caller, nil if absent.
func (r *request) take(label string) *os.File {
	f := r.files[label]
	delete(r.files, label)
	return f
}

func (r *request) reply(reply shim.Reply, files ...*os.File) error {
	return shim.Send(r.conn, reply, files...)
}

// handle serves one connection, which is one call.
func (s *Supervisor) handle(conn *net.UnixConn) {
	defer func() { _ = conn.Close() }()
	stop := context.AfterFunc(s.ctx, func() { _ = conn.Close() })
	defer stop()
	r := &request{conn: conn, files: map[string]*os.File{}}
	files, err := shim.Receive(conn, &r.Request)
	if err != nil {
		return
	}
	for i, f := range files {
		if i >= len(r.FDLabels) || r.files[r.FDLabels[i]] != nil {
			_ = f.Close()
			continue
		}
		r.files[r.FDLabels[i]] = f
	}
	defer func() {
		for _, f := range r.files {
			_ = f.Close()
		}
	}()
	if err := s.dispatch(r); err != nil {
		_ = r.reply(shim.Reply{Error: wireError(err)})
	}
}

func wireError(err error) *shim.Error {
	var e *shim.Error
	if errors.As(err, &e) {
		return e
	}
	return shim.Errorf(shim.CodeInternal, "%v", err)
}

func (s *Supervisor) dispatch(r *request) error {
	switch r.Op {
	case shim.OpPing:
		return r.reply(shim.Reply{Ping: &shim.Ping{
			Version: shim.ProtocolVersion, PID: os.Getpid(), StartedAt: s.started, Containers: len(s.list()),
		}})
	case shim.OpList:
		return r.reply(shim.Reply{Containers: s.list()})
	case shim.OpStart:
		return s.serveStart(r)
	case shim.OpDelete:
		if err := s.remove(r.Container, r.Force); err != nil {
			return err
		}
		return r.reply(shim.Reply{})
	case shim.OpEvents:
		return s.serveEvents(r)
	case shim.OpShutdown:
		return s.serveShutdown(r)
	}
	c, err := s.find(r.Container)
	if err != nil {
		return err
	}
	return c.dispatch(r)
}

func (c *container) dispatch(r *request) error {
	switch r.Op {
	case shim.OpStatus:
	case shim.OpWait:
		select {
		case <-c.exited:
		case <-hangup(r.conn):
			return nil
		}
	case shim.OpSignal:
		if r.Signal == nil {
			return shim.Errorf(shim.CodeInvalid, "no signal given")
		}
		if err := c.signal(unix.Signal(r.Signal.Signal), r.Signal.All); err != nil {
			return err
		}
	case shim.OpExec:
		return c.serveExec(r)
	case shim.OpAttach:
		return c.serveAttach(r)
	case shim.OpCloseStdin:
		c.closeStdin()
	case shim.OpResize:
		if err := c.resize(r.Resize); err != nil {
			return err
		}
	case shim.OpUpdate:
		if err := c.update(r.Update); err != nil {
			return err
		}
	case shim.OpReopenLog:
		if c.snapshot().State != shim.StateRunning {
			return shim.Errorf(shim.CodeState, "container %s is not running", c.id)
		}
		if err := c.log.reopen(); err != nil {
			return err
		}
	case shim.OpKeepTTY:
		if err := c.keepTTY(r.take("tty")); err != nil {
			return err
		}
	default:
		return shim.Errorf(shim.CodeInvalid, "unknown operation %q", r.Op)
	}
	st := c.snapshot()
	return r.reply(shim.Reply{Status: &st})
}

// hangup is closed when the client closes its side; clients send nothing after
// their request.
func hangup(conn *net.UnixConn) <-chan struct{} {
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		var b [1]byte
		_, _ = conn.Read(b[:])
	}()
	return gone
}

func (s *Supervisor) serveStart(r *request) error {
	c, err := s.start(r.Container, r.Start)
	if err != nil {
		return err
	}
	st := c.snapshot()
	c.mu.Lock()
	console := c.console
	c.mu.Unlock()
	if console != nil {
		return r.reply(shim.Reply{Status: &st, FDLabels: []string{"tty"}}, console)
	}
	return r.reply(shim.Reply{Status: &st})
}

func (s *Supervisor) serveEvents(r *request) error {
	sub, present := s.subscribe()
	defer s.unsubscribe(sub)
	if err := r.reply(shim.Reply{Containers: present}); err != nil {
		return err
	}
	gone := hangup(r.conn)
	for {
		select {
		case e := <-sub.events:
			if err := r.reply(shim.Reply{Event: &e}); err != nil {
				return nil
			}
		case <-sub.lost:
			return nil
		case <-gone:
			return nil
		}
	}
}

func (s *Supervisor) serveShutdown(r *request) error {
	if err := s.shutdown(r.Force); err != nil {
		return err
	}
	err := r.reply(shim.Reply{})
	s.cancel()
	return err
}
