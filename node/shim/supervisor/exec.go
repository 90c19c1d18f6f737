//go:build cgo

package supervisor

import (
	"os"
	"slices"
	"syscall"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/utils"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"knarr/node/shim"
)

// serveExec runs one more process in the container: a reply when it has
// started, a second one when it has ended. It is killed when the client hangs
// up.
func (c *container) serveExec(r *request) error {
	if r.Exec == nil || len(r.Exec.Args) == 0 {
		return shim.Errorf(shim.CodeInvalid, "exec in %s: no command", c.id)
	}
	if c.snapshot().State != shim.StateRunning {
		return shim.Errorf(shim.CodeState, "container %s is not running", c.id)
	}
	template := *c.rec.Process
	template.Args = slices.Clone(r.Exec.Args)
	template.Terminal = r.Exec.TTY
	template.ConsoleSize = nil
	if r.Exec.Size.Width > 0 {
		template.ConsoleSize = &specs.Box{Width: uint(r.Exec.Size.Width), Height: uint(r.Exec.Size.Height)}
	}
	process, err := newProcess(&template)
	if err != nil {
		return err
	}
	if template.Terminal {
		template.Env = withTerm(template.Env)
		process.Env = template.Env
	}
	pid, pidfd, master, err := c.startExec(process, r)
	if err != nil {
		return err
	}
	return c.finishExec(r, process, pid, pidfd, master)
}

// withTerm gives a terminal its TERM, as others do.
func withTerm(env []string) []string {
	for _, e := range env {
		if len(e) > 5 && e[:5] == "TERM=" {
			return env
		}
	}
	return append(slices.Clone(env), "TERM=xterm")
}

// startExec starts the process with the descriptors of the request.
func (c *container) startExec(p *libcontainer.Process, r *request) (pid int, pidfd, master *os.File, err error) {
	ct, err := libcontainer.Load(c.sup.libDir, c.id)
	if err != nil {
		return 0, nil, nil, shim.Errorf(shim.CodeState, "container %s: %v", c.id, err)
	}
	var console *os.File
	if r.Exec.TTY {
		parent, child, err := utils.NewSockPair("console")
		if err != nil {
			return 0, nil, nil, err
		}
		defer func() { _ = parent.Close(); _ = child.Close() }()
		console, p.ConsoleSocket = parent, child
	} else {
		closeStreams, err := takeStreams(p, r)
		if err != nil {
			return 0, nil, nil, err
		}
		defer closeStreams()
	}
	end := c.sup.reaper.begin()
	defer end()
	if err := ct.Run(p); err != nil {
		return 0, nil, nil, shim.Errorf(shim.CodeStart, "%v", err)
	}
	if pid, err = p.Pid(); err == nil {
		c.sup.reaper.register(pid)
		if pidfd, err = openPidfd(pid); err == nil {
			if console == nil {
				return pid, pidfd, nil, nil
			}
			if master, err = receiveConsole(console); err == nil {
				return pid, pidfd, master, nil
			}
			_ = pidfd.Close()
		}
	}
	_ = p.Signal(unix.SIGKILL)
	_, _ = p.Wait()
	c.sup.reaper.release(pid)
	return 0, nil, nil, err
}

// takeStreams makes the descriptors of the request the stdio of p.
func takeStreams(p *libcontainer.Process, r *request) (func(), error) {
	var files []*os.File
	closeAll := func() { shim.CloseFiles(files) }
	for _, label := range []string{"stdin", "stdout", "stderr"} {
		f := r.take(label)
		if f == nil {
			var err error
			if f, err = os.OpenFile(os.DevNull, os.O_RDWR, 0); err != nil {
				closeAll()
				return nil, err
			}
		}
		files = append(files, f)
		// A client's pipe may be in non-blocking mode, which programs do not expect.
		if err := setBlocking(f); err != nil {
			closeAll()
			return nil, err
		}
	}
	p.Stdin, p.Stdout, p.Stderr = files[0], files[1], files[2]
	return closeAll, nil
}

func setBlocking(f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	if err := raw.Control(func(fd uintptr) { serr = unix.SetNonblock(int(fd), false) }); err != nil {
		return err
	}
	return serr
}

func (c *container) finishExec(r *request, p *libcontainer.Process, pid int, pidfd, master *os.File) error {
	defer func() { _ = pidfd.Close() }()
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		_ = awaitExit(pidfd)
	}()
	var err error
	if master != nil {
		err = r.reply(shim.Reply{FDLabels: []string{"tty"}}, master)
		_ = master.Close()
	} else {
		err = r.reply(shim.Reply{})
	}
	if err != nil {
		_ = p.Signal(unix.SIGKILL)
	}
	select {
	case <-exited:
	case <-hangup(r.conn):
		_ = p.Signal(unix.SIGKILL)
		<-exited
	}
	state, werr := p.Wait()
	c.sup.reaper.release(pid)
	end := shim.ExecEnd{ExitCode: shim.LostExitCode, Signal: int(unix.SIGKILL)}
	if state != nil {
		if ws, ok := state.Sys().(syscall.WaitStatus); ok {
			end.ExitCode, end.Signal = exitOf(unix.WaitStatus(ws))
		}
	} else {
		c.sup.warn("exec in %s: %v", c.id, werr)
	}
	return r.reply(shim.Reply{Exec: &end})
}
