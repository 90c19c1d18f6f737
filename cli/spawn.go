package cli

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"

	"knarr/network/netns"
)

// child is a part of a cluster that this `up` started.
type child struct {
	what string // "the server", "node x"
	cmd  *exec.Cmd
	log  string
	// logStart is where this run's part of the log begins, in bytes.
	logStart int64
	// ready is closed when the part says so; exited when the process has ended, after status is set.
	ready  chan struct{}
	exited chan struct{}
	status error
}

// spawn starts this program again with args, detached from the terminal and from our session, inside the network namespace
// at ns ("": ours), with its output in the log file.
func spawn(what, ns, log string, args, env []string) (*child, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(log), 0o700); err != nil {
		return nil, err
	}
	out, err := openLog(log)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	info, err := out.Stat()
	if err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer w.Close()
	c := &child{what: what, log: log, logStart: info.Size(), ready: make(chan struct{}), exited: make(chan struct{})}
	c.cmd = exec.Command(self, args...)
	c.cmd.Dir = "/"
	c.cmd.Stdout, c.cmd.Stderr = out, out
	c.cmd.ExtraFiles = []*os.File{w}
	c.cmd.Env = append(os.Environ(), append(env, readyEnv+"="+strconv.Itoa(3), logEnv+"="+log)...)
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := netns.Start(ns, c.cmd); err != nil {
		r.Close()
		return nil, fmt.Errorf("start %s: %w", what, err)
	}
	go c.watch(r)
	return c, nil
}

// watch ends with the process.
func (c *child) watch(r *os.File) {
	line, _ := bufio.NewReader(r).ReadString('\n')
	r.Close()
	if line == readyWord {
		close(c.ready)
	}
	c.status = c.cmd.Wait()
	close(c.exited)
}

// wait returns when the part is ready, has ended, or ctx is over.
func (c *child) wait(ctx context.Context) error {
	select {
	case <-c.ready:
		return nil
	case <-c.exited:
		return c.failure()
	case <-ctx.Done():
		return fmt.Errorf("%s is not ready: %w\n%s", c.what, context.Cause(ctx), c.tail())
	}
}

// failure describes the end of the process by what it said last.
func (c *child) failure() error {
	status := "stopped by itself"
	if c.status != nil {
		status = "ended with " + c.status.Error()
	}
	return fmt.Errorf("%s %s. The end of its log (%s):\n%s", c.what, status, c.log, c.tail())
}

func (c *child) tail() string { return tail(c.log, c.logStart) }

// kill ends the process at once and waits for it.
func (c *child) kill() {
	c.cmd.Process.Kill()
	<-c.exited
}
