//go:build cgo

package supervisor

import (
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"knarr/node/shim"
)

// serveAttach adds the client's descriptors to the readers of the container's
// output and gives it the way to its input. It lasts until the client hangs up
// or the container's output has ended.
func (c *container) serveAttach(r *request) error {
	if r.Attach == nil {
		return shim.Errorf(shim.CodeInvalid, "attach to %s: no request", c.id)
	}
	if c.snapshot().State != shim.StateRunning {
		return shim.Errorf(shim.CodeState, "container %s is not running", c.id)
	}
	// The readers first: what the client writes may be answered at once.
	stdout, stderr := c.outputs()
	for label, o := range map[string]*output{"stdout": stdout, "stderr": stderr} {
		f := r.take(label)
		if f == nil {
			continue
		}
		if o == nil {
			_ = f.Close()
			continue
		}
		s, err := newSink(f)
		if err != nil {
			return err
		}
		o.fan.add(s)
		defer o.fan.remove(s)
	}
	files, labels, err := c.inputs(r.Attach.Stdin)
	if err != nil {
		return err
	}
	err = r.reply(shim.Reply{FDLabels: labels}, files...)
	shim.CloseFiles(files)
	if err != nil {
		return nil
	}
	gone := hangup(r.conn)
	select {
	case <-gone:
	case <-c.exited:
	}
	if r.Attach.Stdin && c.rec.StdinOnce {
		c.closeStdin()
	}
	return nil
}

// inputs returns duplicates of what a client needs to write to the container
// and to resize its terminal.
func (c *container) inputs(stdin bool) (files []*os.File, labels []string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.console != nil {
		f, err := dup(c.console)
		if err != nil {
			return nil, nil, err
		}
		return []*os.File{f}, []string{"tty"}, nil
	}
	if !stdin || c.stdin == nil {
		return nil, nil, nil
	}
	// A description of its own, so that the client's blocking mode is its own.
	f, err := openFIFO(filepath.Join(c.dir, "stdin"), unix.O_WRONLY|unix.O_NONBLOCK)
	if err != nil {
		return nil, nil, err
	}
	return []*os.File{f}, []string{"stdin"}, nil
}

func (c *container) resize(size *shim.Size) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if size == nil || c.console == nil {
		return shim.Errorf(shim.CodeState, "container %s has no terminal", c.id)
	}
	raw, err := c.console.SyscallConn()
	if err != nil {
		return err
	}
	var rerr error
	if err := raw.Control(func(fd uintptr) {
		rerr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: size.Height, Col: size.Width})
	}); err != nil {
		return err
	}
	return rerr
}

// keepTTY takes the terminal back from a client that kept it over the death of
// a shim.
func (c *container) keepTTY(tty *os.File) error {
	if tty == nil {
		return shim.Errorf(shim.CodeInvalid, "no terminal given")
	}
	c.mu.Lock()
	have := c.console != nil || c.status.State != shim.StateRunning || !c.rec.Terminal
	c.mu.Unlock()
	if have {
		return tty.Close()
	}
	fd, err := unix.FcntlInt(tty.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	_ = tty.Close()
	if err != nil {
		return err
	}
	master, err := pollable(fd, "terminal")
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.console != nil || c.status.State != shim.StateRunning {
		return master.Close()
	}
	if err := c.takeConsole(master); err != nil {
		return err
	}
	c.sup.spawn(c.stdout.run)
	return nil
}
