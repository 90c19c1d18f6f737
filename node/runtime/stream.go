package runtime

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	remote "k8s.io/cri-client/pkg"
	"k8s.io/cri-streaming/pkg/streaming"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"

	"knarr/node/shim"
)

const (
	// execDrain bounds the wait for more output after an exec'd process has
	// ended, when a process that it left behind holds the stream open.
	execDrain = 2 * time.Second
	// maxSyncOutput bounds each output stream of ExecSync, in bytes; the rest is
	// read and dropped.
	maxSyncOutput = 16 << 20
	// portDialLimit bounds the connection to a port of a pod.
	portDialLimit = 10 * time.Second
)

// Streams is what a streaming server calls: k8s.io/cri-streaming's Runtime.
type Streams struct{ r *Runtime }

var _ streaming.Runtime = Streams{}

// Streams returns the streaming side of the runtime.
func (r *Runtime) Streams() Streams { return Streams{r} }

// Exec implements streaming.Runtime.
func (s Streams) Exec(ctx context.Context, id string, cmd []string, in io.Reader, out, errw io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	return s.r.ExecStream(ctx, id, cmd, in, out, errw, tty, resize, 0)
}

// Attach implements streaming.Runtime.
func (s Streams) Attach(ctx context.Context, id string, in io.Reader, out, errw io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	return s.r.AttachStream(ctx, id, in, out, errw, tty, resize)
}

// PortForward implements streaming.Runtime.
func (s Streams) PortForward(ctx context.Context, sandboxID string, port int32, stream io.ReadWriteCloser) error {
	return s.r.PortForwardStream(ctx, sandboxID, port, stream)
}

func (r *Runtime) streamServer() (StreamServer, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if r.streams == nil {
		return nil, status.Error(codes.Unimplemented, "no streaming server is set (SetStreamServer)")
	}
	return r.streams, nil
}

// Exec implements internalapi.ContainerManager.
func (r *Runtime) Exec(_ context.Context, req *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	c, err := r.findRunning(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	s, err := r.streamServer()
	if err != nil {
		return nil, err
	}
	req.ContainerId = c.id
	return s.GetExec(req)
}

// Attach implements internalapi.ContainerManager.
func (r *Runtime) Attach(_ context.Context, req *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	c, err := r.findRunning(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	s, err := r.streamServer()
	if err != nil {
		return nil, err
	}
	req.ContainerId = c.id
	return s.GetAttach(req)
}

// PortForward implements internalapi.PodSandboxManager.
func (r *Runtime) PortForward(_ context.Context, req *runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error) {
	sb, err := r.findSandbox(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if !sb.record().Ready {
		return nil, precondition("sandbox %s is not ready", sb.id)
	}
	s, err := r.streamServer()
	if err != nil {
		return nil, err
	}
	return s.GetPortForward(req)
}

func (r *Runtime) findRunning(id string) (*container, error) {
	c, err := r.findContainer(id)
	if err != nil {
		return nil, err
	}
	if p, _ := c.snapshot(); p != phaseRunning {
		return nil, precondition("container %s is not running", c.id)
	}
	return c, nil
}

// ExecSync implements internalapi.ContainerManager. A timeout of 0 is none; the
// error after one wraps cri-client's ErrCommandTimedOut, that of a command which
// fails is a utilexec.CodeExitError.
func (r *Runtime) ExecSync(ctx context.Context, id string, cmd []string, timeout time.Duration) (stdout, stderr []byte, err error) {
	out, errw := &cappedBuffer{}, &cappedBuffer{}
	err = r.ExecStream(ctx, id, cmd, nil, out, errw, false, nil, timeout)
	stdout, stderr = out.bytes(), errw.bytes()
	var exit utilexec.CodeExitError
	if errors.As(err, &exit) {
		exit.Err = fmt.Errorf("command '%s' exited with %d: %s", strings.Join(cmd, " "), exit.Code, stderr)
		return stdout, stderr, exit
	}
	return stdout, stderr, err
}

// cappedBuffer keeps the first maxSyncOutput bytes.
type cappedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

// Write implements io.Writer; it never fails.
func (b *cappedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.buf.Write(p[:min(len(p), maxSyncOutput-b.buf.Len())])
	return len(p), nil
}

// Close implements io.Closer.
func (b *cappedBuffer) Close() error { return nil }

func (b *cappedBuffer) bytes() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return bytes.Clone(b.buf.Bytes())
}

// ExecStream runs a command in a container with the given streams, any of
// which may be nil, until it has ended, ctx has ended or, when it is not 0,
// timeout is over; then it is killed. With tty all output goes to stdout. It
// closes no stream; a read of stdin that is under way when the command ends is
// left to the caller, who closes stdin. The error of a command that fails is a
// utilexec.CodeExitError.
func (r *Runtime) ExecStream(ctx context.Context, id string, cmd []string, stdin io.Reader, stdout, stderr io.WriteCloser,
	tty bool, resize <-chan remotecommand.TerminalSize, timeout time.Duration) error {
	c, err := r.findRunning(id)
	if err != nil {
		return err
	}
	if len(cmd) == 0 {
		return invalid("no command to run in container %s", c.id)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if timeout > 0 {
		limit := fmt.Errorf("%w: %q timed out after %s", remote.ErrCommandTimedOut, strings.Join(cmd, " "), timeout)
		var stop context.CancelFunc
		ctx, stop = context.WithTimeoutCause(ctx, timeout, limit)
		defer stop()
	}
	code := 0
	if tty {
		code, err = r.execTTY(ctx, c.id, cmd, stdin, stdout, resize)
	} else {
		code, err = r.execPipes(ctx, c.id, cmd, stdin, stdout, stderr)
	}
	if err != nil {
		if cause := context.Cause(ctx); errors.Is(cause, remote.ErrCommandTimedOut) {
			return cause
		}
		return rpcError(fmt.Errorf("exec in container %s: %w", c.id, err))
	}
	if code != 0 {
		return utilexec.CodeExitError{Err: fmt.Errorf("command terminated with exit code %d", code), Code: code}
	}
	return nil
}

func (r *Runtime) execTTY(ctx context.Context, id string, cmd []string, stdin io.Reader, stdout io.Writer, resize <-chan remotecommand.TerminalSize) (int, error) {
	p, err := r.shim.Exec(ctx, id, &shim.ExecRequest{Args: cmd, TTY: true}, shim.Stdio{})
	if err != nil {
		return 0, err
	}
	defer p.Close()
	go forwardResize(ctx, p.TTY, resize)
	if stdin != nil {
		go func() { _, _ = io.Copy(p.TTY, stdin) }()
	}
	out := copyOutput(stdout, p.TTY)
	code, err := p.Wait()
	out.drain(ctx)
	return code, err
}

// forwardResize follows the sizes of the client's terminal.
func forwardResize(ctx context.Context, tty *os.File, resize <-chan remotecommand.TerminalSize) {
	for {
		select {
		case size, more := <-resize:
			if !more {
				return
			}
			_ = shim.Resize(tty, shim.Size{Width: size.Width, Height: size.Height})
		case <-ctx.Done():
			return
		}
	}
}

// output is a stream of an exec'd process on its way to the client.
type output struct {
	src   *os.File
	ended atomic.Bool // the process has ended
	done  chan struct{}
}

// copyOutput starts copying; without a reader the output is thrown away, so
// that the process is not blocked.
func copyOutput(dst io.Writer, src *os.File) *output {
	o := &output{src: src, done: make(chan struct{})}
	go func() {
		defer close(o.done)
		if dst != nil {
			if _, err := io.Copy(dst, o); err == nil {
				return
			}
		}
		_, _ = io.Copy(io.Discard, o)
	}()
	return o
}

// Read implements io.Reader. After the end of the process it waits at most
// execDrain for more, however long the client takes for what it got.
func (o *output) Read(p []byte) (int, error) {
	if o.ended.Load() {
		_ = o.src.SetReadDeadline(time.Now().Add(execDrain))
	}
	n, err := o.src.Read(p)
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, unix.EIO) { // a terminal ends with EIO
		err = io.EOF
	}
	return n, err
}

// drain waits for the rest of the output of a process that has ended.
func (o *output) drain(ctx context.Context) {
	o.ended.Store(true)
	_ = o.src.SetReadDeadline(time.Now().Add(execDrain))
	select {
	case <-o.done:
	case <-ctx.Done():
	}
}

func (r *Runtime) execPipes(ctx context.Context, id string, cmd []string, stdin io.Reader, stdout, stderr io.Writer) (int, error) {
	pipes, err := newPipes(stdin != nil, stdout != nil, stderr != nil)
	if err != nil {
		return 0, err
	}
	defer pipes.close()
	p, err := r.shim.Exec(ctx, id, &shim.ExecRequest{Args: cmd}, pipes.theirs)
	pipes.closeTheirs()
	if err != nil {
		return 0, err
	}
	defer p.Close()
	if stdin != nil {
		in := pipes.in
		pipes.in = nil // the copying goroutine closes it
		go func() {
			_, _ = io.Copy(in, stdin)
			_ = in.Close()
		}()
		defer func() { _ = in.SetWriteDeadline(time.Now()) }()
	}
	var outputs []*output
	if pipes.out != nil {
		outputs = append(outputs, copyOutput(stdout, pipes.out))
	}
	if pipes.err != nil {
		outputs = append(outputs, copyOutput(stderr, pipes.err))
	}
	code, err := p.Wait()
	for _, o := range outputs {
		o.drain(ctx)
	}
	return code, err
}

// pipes are the streams of an exec on both sides.
type pipes struct {
	in, out, err *os.File
	theirs       shim.Stdio
}

func newPipes(stdin, stdout, stderr bool) (*pipes, error) {
	p := &pipes{}
	for _, s := range []struct {
		want         bool
		ours, theirs **os.File
		input        bool
	}{{stdin, &p.in, &p.theirs.Stdin, true}, {stdout, &p.out, &p.theirs.Stdout, false}, {stderr, &p.err, &p.theirs.Stderr, false}} {
		if !s.want {
			continue
		}
		rd, wr, err := os.Pipe()
		if err != nil {
			p.closeTheirs()
			p.close()
			return nil, err
		}
		if s.input {
			*s.theirs, *s.ours = rd, wr
		} else {
			*s.ours, *s.theirs = rd, wr
		}
	}
	return p, nil
}

func (p *pipes) closeTheirs() {
	for _, f := range []*os.File{p.theirs.Stdin, p.theirs.Stdout, p.theirs.Stderr} {
		if f != nil {
			_ = f.Close()
		}
	}
	p.theirs = shim.Stdio{}
}

func (p *pipes) close() {
	for _, f := range []*os.File{p.in, p.out, p.err} {
		if f != nil {
			_ = f.Close()
		}
	}
}

// AttachStream joins the streams of a running container until it has ended,
// the client's input and output have ended, or ctx has. It closes no stream.
func (r *Runtime) AttachStream(ctx context.Context, id string, stdin io.Reader, stdout, stderr io.WriteCloser,
	_ bool, resize <-chan remotecommand.TerminalSize) error {
	c, err := r.findRunning(id)
	if err != nil {
		return err
	}
	tty := c.config.GetTty() // what the client has does not matter
	if !c.config.GetStdin() {
		stdin = nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	a, err := r.shim.Attach(ctx, c.id, stdin != nil, stdout != nil, stderr != nil && !tty)
	if err != nil {
		return rpcError(fmt.Errorf("attach to container %s: %w", c.id, err))
	}
	defer a.Close()
	if a.TTY != nil {
		go forwardResize(ctx, a.TTY, resize)
	}
	if stdin != nil && a.Stdin != nil {
		go func() {
			_, _ = io.Copy(a.Stdin, stdin)
			r.stdinEnded(ctx, c, a)
		}()
	}
	var outputs sync.WaitGroup
	for _, s := range []struct {
		dst io.Writer
		src *os.File
	}{{stdout, a.Stdout}, {stderr, a.Stderr}} {
		if s.src == nil {
			continue
		}
		outputs.Add(1)
		go func() {
			defer outputs.Done()
			_, _ = io.Copy(s.dst, s.src) // an error is the client's end
		}()
	}
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		outputs.Wait()
	}()
	var outputEnded <-chan struct{} = finished
	if a.Stdout == nil && a.Stderr == nil {
		outputEnded = nil // input only: until the container ends
	}
	select {
	case <-outputEnded:
	case <-ctx.Done():
	case <-c.ended:
		select { // the shim ends the streams of a container that has ended
		case <-finished:
		case <-ctx.Done():
		}
	}
	return rpcError(ctx.Err())
}

// stdinEnded closes the container's input when the first client's has ended,
// if the container wants that.
func (r *Runtime) stdinEnded(ctx context.Context, c *container, a *shim.Attachment) {
	if !c.config.GetStdinOnce() || c.config.GetTty() || ctx.Err() != nil {
		return
	}
	_ = a.Stdin.Close()
	if err := r.shim.CloseStdin(ctx, c.id); err != nil && ctx.Err() == nil {
		r.log.Warn("close the input of a container", "container", c.id, "error", err)
	}
}

// PortForwardStream connects stream with a port on a pod's loopback address,
// IPv4 or else IPv6, until either side has ended. It closes stream.
func (r *Runtime) PortForwardStream(ctx context.Context, sandboxID string, port int32, stream io.ReadWriteCloser) error {
	defer func() { _ = stream.Close() }()
	s, err := r.findSandbox(sandboxID)
	if err != nil {
		return err
	}
	if !s.record().Ready {
		return precondition("sandbox %s is not ready", s.id)
	}
	conn, err := s.dial(ctx, port)
	if err != nil {
		return rpcError(fmt.Errorf("connect to port %d of pod %s/%s: %w", port,
			s.config.GetMetadata().GetNamespace(), s.config.GetMetadata().GetName(), err))
	}
	defer func() { _ = conn.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close(); _ = stream.Close() })
	defer stop()
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		_, _ = io.Copy(conn, stream)
		if tcp, ok := conn.(*net.TCPConn); ok {
			_ = tcp.CloseWrite()
		}
	}()
	// The pod's side decides: when it has said everything, it is over.
	_, err = io.Copy(stream, conn)
	if ctx.Err() != nil {
		return rpcError(ctx.Err())
	}
	if err != nil && !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, net.ErrClosed) {
		return rpcError(err)
	}
	return nil
}

// dial connects from inside of the pod's network namespace.
func (s *sandbox) dial(ctx context.Context, port int32) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, portDialLimit)
	defer cancel()
	var conn net.Conn
	dial := func() error {
		var errs []error
		for _, host := range []string{"127.0.0.1", "::1"} {
			var d net.Dialer
			c, err := d.DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(int(port))))
			if err == nil {
				conn = c
				return nil
			}
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	}
	if s.rec.HostNetwork {
		return conn, dial()
	}
	err := inNamespaces(s.nsDir(), []string{"net"}, dial)
	return conn, err
}
