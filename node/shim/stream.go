package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Exec is a process that runs in a container beside the first one.
type Exec struct {
	// TTY is the master side of its terminal, nil without one. Close ends it.
	TTY  *os.File
	call *call
	ctx  context.Context
}

// Stdio is what a process gets as its standard streams; nil is /dev/null. The
// caller closes its own copies after the call.
type Stdio struct {
	Stdin, Stdout, Stderr *os.File
}

// Exec starts a process in a container. It is killed when ctx ends or Close is
// called before it has ended.
func (c *Client) Exec(ctx context.Context, id string, req *ExecRequest, io Stdio) (*Exec, error) {
	var (
		labels []string
		files  []*os.File
	)
	for _, s := range []struct {
		label string
		file  *os.File
	}{{"stdin", io.Stdin}, {"stdout", io.Stdout}, {"stderr", io.Stderr}} {
		if s.file != nil {
			labels, files = append(labels, s.label), append(files, s.file)
		}
	}
	k, err := c.open(ctx, Request{Op: OpExec, Container: id, Exec: req, FDLabels: labels}, files...)
	if err != nil {
		return nil, err
	}
	return &Exec{TTY: k.file("tty"), call: k, ctx: ctx}, nil
}

// Wait returns the exit code after the end of the process.
func (e *Exec) Wait() (int, error) {
	err := e.call.next()
	if err == nil && e.call.reply.Exec == nil {
		err = errors.New("no exit code")
	}
	if err != nil {
		if e.ctx.Err() != nil {
			return LostExitCode, context.Cause(e.ctx)
		}
		if errors.Is(err, io.EOF) {
			err = errors.New("the shim ended before the process")
		}
		return LostExitCode, fmt.Errorf("shim: exec: %w", err)
	}
	return e.call.reply.Exec.ExitCode, nil
}

// Close frees the connection and the terminal; a process that still runs is
// killed.
func (e *Exec) Close() {
	if e.TTY != nil {
		_ = e.TTY.Close()
	}
	e.call.close()
}

// Attachment is a connection to the stdio of a running container.
type Attachment struct {
	// Stdin is where to write input: a pipe or the terminal; nil if the
	// container has no stdin.
	Stdin *os.File
	// TTY is the terminal of the container, for Resize; nil without one.
	TTY *os.File
	// Stdout and Stderr are the output from now on; nil if not asked for.
	Stdout, Stderr *os.File
	call           *call
}

// Attach joins the stdio of a container. The output ends with the container or
// with Close.
func (c *Client) Attach(ctx context.Context, id string, stdin, stdout, stderr bool) (_ *Attachment, err error) {
	a := &Attachment{}
	var (
		labels []string
		files  []*os.File
	)
	defer func() {
		CloseFiles(files)
		if err != nil {
			a.Close()
		}
	}()
	for _, s := range []struct {
		want  bool
		label string
		ours  **os.File
	}{{stdout, "stdout", &a.Stdout}, {stderr, "stderr", &a.Stderr}} {
		if !s.want {
			continue
		}
		r, w, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		*s.ours = r
		labels, files = append(labels, s.label), append(files, w)
	}
	req := Request{Op: OpAttach, Container: id, Attach: &AttachRequest{Stdin: stdin}, FDLabels: labels}
	if a.call, err = c.open(ctx, req, files...); err != nil {
		return nil, err
	}
	a.TTY = a.call.file("tty")
	a.Stdin = a.call.file("stdin")
	if a.TTY != nil && stdin {
		a.Stdin = a.TTY
	}
	return a, nil
}

// Close detaches.
func (a *Attachment) Close() {
	for _, f := range []*os.File{a.Stdout, a.Stderr, a.Stdin, a.TTY} {
		if f != nil {
			_ = f.Close()
		}
	}
	if a.call != nil {
		a.call.close()
	}
}

// Resize sets the size of a terminal by its master side.
func Resize(tty *os.File, size Size) error {
	raw, err := tty.SyscallConn()
	if err != nil {
		return err
	}
	var rerr error
	if err := raw.Control(func(fd uintptr) {
		rerr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: size.Height, Col: size.Width})
	}); err != nil {
		return err
	}
	return os.NewSyscallError("ioctl(TIOCSWINSZ)", rerr)
}
