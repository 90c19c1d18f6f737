package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Client talks to the shim of one node. It has no connection of its own: each
// call is one short connection to a socket of this machine, which makes calls
// independent of each other and of the death of the shim. All methods may be
// called concurrently. When the shim is gone, a call starts it again.
type Client struct {
	opts Options
	// launch is held while the shim is being started.
	launch sync.Mutex
	// stopped is set by Shutdown: from then on no call starts the shim.
	stopped atomic.Bool
}

// Options of Start.
type Options struct {
	// Dir is the shim's state directory. Required.
	Dir string
	// Path of the knarr-shim binary; empty: connect only.
	Path string
	// Log is told about restarts of the shim; nil: nobody is.
	Log func(format string, args ...any)
}

// Start connects to the living shim of the directory, or starts one.
func Start(ctx context.Context, opts Options) (*Client, error) {
	if opts.Log == nil {
		opts.Log = func(string, ...any) {}
	}
	c := &Client{opts: opts}
	if err := c.ensure(ctx); err != nil {
		return nil, err
	}
	p, err := c.Ping(ctx)
	if err != nil {
		return nil, err
	}
	if p.Version != ProtocolVersion {
		return nil, fmt.Errorf("the shim with process id %d speaks protocol %d, we speak %d: stop it with its containers (knarr down) or use the matching knarr",
			p.PID, p.Version, ProtocolVersion)
	}
	return c, nil
}

// ensure makes sure that a shim listens.
func (c *Client) ensure(ctx context.Context) error {
	c.launch.Lock()
	defer c.launch.Unlock()
	conn, err := Dial(c.opts.Dir, SocketName)
	if err == nil {
		return conn.Close()
	}
	if c.opts.Path == "" {
		return fmt.Errorf("no shim is running in %s: %w", c.opts.Dir, err)
	}
	return spawn(ctx, c.opts)
}

// absent tells whether a dial failed because nobody listens.
func absent(err error) bool {
	return errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, os.ErrNotExist)
}

// dial connects, starting the shim if there is none.
func (c *Client) dial(ctx context.Context) (*net.UnixConn, error) {
	conn, err := Dial(c.opts.Dir, SocketName)
	if err == nil || !absent(err) || c.opts.Path == "" || c.stopped.Load() {
		return conn, err
	}
	c.opts.Log("no shim is running in %s (%v), starting one", c.opts.Dir, err)
	if err := c.ensure(ctx); err != nil {
		return nil, err
	}
	return Dial(c.opts.Dir, SocketName)
}

// call is a connection with one request sent and the first reply received.
type call struct {
	conn  *net.UnixConn
	reply Reply
	files map[string]*os.File
	stop  func() bool
}

func (k *call) close() {
	k.stop()
	_ = k.conn.Close()
	for _, f := range k.files {
		_ = f.Close()
	}
}

// file hands a descriptor of the reply to the caller, nil if absent.
func (k *call) file(label string) *os.File {
	f := k.files[label]
	delete(k.files, label)
	return f
}

// next receives one more reply.
func (k *call) next() error {
	k.reply = Reply{}
	files, err := Receive(k.conn, &k.reply)
	if err != nil {
		return err
	}
	k.files = map[string]*os.File{}
	for i, f := range files {
		if i < len(k.reply.FDLabels) {
			k.files[k.reply.FDLabels[i]] = f
			continue
		}
		_ = f.Close()
	}
	if k.reply.Error != nil {
		return k.reply.Error
	}
	return nil
}

// open sends the request and receives the first reply. The end of ctx closes
// the connection.
func (c *Client) open(ctx context.Context, req Request, files ...*os.File) (*call, error) {
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("connect to the shim: %w", err)
	}
	k := &call{conn: conn}
	k.stop = context.AfterFunc(ctx, func() { _ = conn.Close() })
	err = Send(conn, req, files...)
	if err == nil {
		err = k.next()
	}
	if err == nil {
		return k, nil
	}
	k.close()
	var told *Error
	switch {
	case errors.As(err, &told):
		return nil, err
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case errors.Is(err, io.EOF):
		err = io.ErrUnexpectedEOF
	}
	return nil, fmt.Errorf("shim: %s: %w", req.Op, err)
}

func (c *Client) status(ctx context.Context, req Request, files ...*os.File) (Status, error) {
	k, err := c.open(ctx, req, files...)
	if err != nil {
		return Status{}, err
	}
	defer k.close()
	if k.reply.Status == nil {
		return Status{}, nil
	}
	return *k.reply.Status, nil
}

// Ping asks who the living shim is.
func (c *Client) Ping(ctx context.Context) (Ping, error) {
	k, err := c.open(ctx, Request{Op: OpPing})
	if err != nil {
		return Ping{}, err
	}
	defer k.close()
	if k.reply.Ping == nil {
		return Ping{}, errors.New("shim: ping without an answer")
	}
	return *k.reply.Ping, nil
}

// Run creates and starts a container. The file is the master side of its
// terminal, nil without one: keep it open and give it back with KeepTTY after a
// restart of the shim, so that the terminal survives that.
func (c *Client) Run(ctx context.Context, id string, req *StartRequest) (Status, *os.File, error) {
	k, err := c.open(ctx, Request{Op: OpStart, Container: id, Start: req})
	if err != nil {
		return Status{}, nil, err
	}
	defer k.close()
	if k.reply.Status == nil {
		return Status{}, nil, errors.New("shim: start without a status")
	}
	return *k.reply.Status, k.file("tty"), nil
}

// Signal sends a signal to the first process of a container, or to all.
func (c *Client) Signal(ctx context.Context, id string, sig unix.Signal, all bool) error {
	_, err := c.status(ctx, Request{Op: OpSignal, Container: id, Signal: &SignalRequest{Signal: int(sig), All: all}})
	return err
}

// Delete forgets an ended container; with force it is killed before.
func (c *Client) Delete(ctx context.Context, id string, force bool) error {
	_, err := c.status(ctx, Request{Op: OpDelete, Container: id, Force: force})
	return err
}

// Status of a container.
func (c *Client) Status(ctx context.Context, id string) (Status, error) {
	return c.status(ctx, Request{Op: OpStatus, Container: id})
}

// Wait returns the status of a container after its end.
func (c *Client) Wait(ctx context.Context, id string) (Status, error) {
	return c.status(ctx, Request{Op: OpWait, Container: id})
}

// List all containers.
func (c *Client) List(ctx context.Context) ([]Status, error) {
	k, err := c.open(ctx, Request{Op: OpList})
	if err != nil {
		return nil, err
	}
	defer k.close()
	return k.reply.Containers, nil
}

// CloseStdin ends the standard input of a container.
func (c *Client) CloseStdin(ctx context.Context, id string) error {
	_, err := c.status(ctx, Request{Op: OpCloseStdin, Container: id})
	return err
}

// Resize the terminal of a container.
func (c *Client) Resize(ctx context.Context, id string, size Size) error {
	_, err := c.status(ctx, Request{Op: OpResize, Container: id, Resize: &size})
	return err
}

// Update the limits of a running container; fields that are nil stay.
func (c *Client) Update(ctx context.Context, id string, r *specs.LinuxResources) error {
	_, err := c.status(ctx, Request{Op: OpUpdate, Container: id, Update: r})
	return err
}

// ReopenLog makes the shim go on in a new log file at the same path.
func (c *Client) ReopenLog(ctx context.Context, id string) error {
	_, err := c.status(ctx, Request{Op: OpReopenLog, Container: id})
	return err
}

// KeepTTY gives the master side of a terminal to a shim that was restarted. The
// caller keeps its own.
func (c *Client) KeepTTY(ctx context.Context, id string, tty *os.File) error {
	_, err := c.status(ctx, Request{Op: OpKeepTTY, Container: id, FDLabels: []string{"tty"}}, tty)
	return err
}

// Shutdown ends the shim; without force only when no container runs.
// Containers that run go on. From then on this client does not start it again.
func (c *Client) Shutdown(ctx context.Context, force bool) error {
	c.stopped.Store(true)
	_, err := c.status(ctx, Request{Op: OpShutdown, Force: force})
	if err != nil {
		c.stopped.Store(false)
	}
	return err
}

// Watcher receives what happens. Its methods are called one at a time.
type Watcher interface {
	// Snapshot is the present state of all containers: first, and again after
	// each restart of the shim or lost connection.
	Snapshot([]Status)
	// Event is everything after the last snapshot, in order.
	Event(Event)
}

const (
	// watchRetry is the first and watchRetryMax the longest pause between
	// attempts to connect again.
	watchRetry    = 20 * time.Millisecond
	watchRetryMax = 2 * time.Second
)

// Watch tells w everything until ctx ends or Shutdown was called, over restarts
// of the shim.
func (c *Client) Watch(ctx context.Context, w Watcher) {
	pause := watchRetry
	for ctx.Err() == nil && !c.stopped.Load() {
		if c.watchOnce(ctx, w) {
			pause = watchRetry
			continue
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
		case <-timer.C:
		}
		pause = min(2*pause, watchRetryMax)
	}
}

// watchOnce follows one connection; true if it got as far as a snapshot.
func (c *Client) watchOnce(ctx context.Context, w Watcher) bool {
	k, err := c.open(ctx, Request{Op: OpEvents})
	if err != nil {
		if ctx.Err() == nil {
			c.opts.Log("events of the shim: %v", err)
		}
		return false
	}
	defer k.close()
	w.Snapshot(k.reply.Containers)
	for {
		if err := k.next(); err != nil {
			return true
		}
		if k.reply.Event != nil {
			w.Event(*k.reply.Event)
		}
	}
}
