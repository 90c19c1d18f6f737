//go:build cgo

package supervisor

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/runc/libcontainer"
	"golang.org/x/sys/unix"

	"knarr/node/shim"
)

const (
	// drainLimit bounds how long the end of a container waits for the end of its
	// output, which some process outside of it might hold open.
	drainLimit = 2 * time.Second
	// killRounds and killWait bound the attempts to empty a cgroup by killing:
	// so often, and so long for each round of processes to end.
	killRounds = 20
	killWait   = 500 * time.Millisecond
)

// container is one row of the Supervisor's table.
type container struct {
	id  string
	dir string
	sup *Supervisor
	rec record
	log *criLog

	exited chan struct{} // closed when everything about the end is known

	mu sync.Mutex
	// stderr is nil with a terminal; both are nil after the shim died with the
	// terminal and nobody kept it.
	stdout, stderr *output
	status         shim.Status
	oomTold        bool                  // an EventOOM was published
	pidfd          *os.File              // while running
	process        *libcontainer.Process // nil when re-adopted
	console        *os.File              // master side of the terminal
	stdin          *os.File              // write side of stdin, keeps it open
}

func (c *container) snapshot() shim.Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.status
}

// running is called with the started process: it makes the state known and
// starts the goroutines of the container.
func (c *container) running(pid int, pidfd *os.File, paths map[string]string) error {
	started, err := processStart(pid)
	if err != nil {
		started = 0 // it ended already; the pidfd still names it
	}
	c.mu.Lock()
	c.pidfd = pidfd
	c.status.State = shim.StateRunning
	c.status.PID, c.status.PIDStart = pid, started
	c.status.BootID = c.sup.boot
	c.status.StartedAt = time.Now().UTC()
	c.status.CgroupPaths = paths
	c.status.Terminal = c.rec.Terminal
	status := c.status
	c.mu.Unlock()
	if err := writeJSON(c.dir, statusFile, status); err != nil {
		return err
	}
	c.sup.publish(shim.Event{Type: shim.EventStarted, Status: status})
	c.supervise(paths)
	return nil
}

// supervise starts the goroutines that last as long as the container runs.
func (c *container) supervise(paths map[string]string) {
	stdout, stderr := c.outputs()
	for _, o := range []*output{stdout, stderr} {
		if o != nil {
			c.sup.spawn(o.run)
		}
	}
	watch, err := watchOOM(paths)
	if err != nil && !errors.Is(err, os.ErrNotExist) { // the kernel may have no memory controller
		c.sup.warn("container %s: out-of-memory events: %v", c.id, err)
	}
	if watch != nil {
		c.sup.spawn(func() { c.watchOOM(watch) })
	}
	c.sup.spawn(func() { c.awaitEnd(watch) })
}

func (c *container) watchOOM(watch *oomWatch) {
	for watch.wait() {
		c.tellOOM(oomKills(watch.dir, watch.v2) > 0)
	}
}

// tellOOM publishes that memory ran out; killed says that a process of the
// container had to end for it.
func (c *container) tellOOM(killed bool) {
	c.mu.Lock()
	c.oomTold = true
	c.status.OOMKilled = c.status.OOMKilled || killed
	status := c.status
	c.mu.Unlock()
	c.sup.publish(shim.Event{Type: shim.EventOOM, Status: status})
}

// awaitEnd waits for the first process, collects how it ended, lets the output
// drain and frees the cgroup.
func (c *container) awaitEnd(watch *oomWatch) {
	if err := awaitExit(c.pidfd); err != nil {
		if c.sup.stopping() {
			return
		}
		c.sup.warn("container %s: wait: %v", c.id, err)
	}
	code, sig, reason := c.collect()
	finished := time.Now().UTC()
	if !c.rec.PrivatePID {
		killCgroup(c.status.CgroupPaths)
	}
	c.drain()
	dir, v2 := memoryDir(c.status.CgroupPaths)
	oom := dir != "" && oomKills(dir, v2) > 0
	watch.close()
	c.mu.Lock()
	untold := oom && !c.oomTold
	c.mu.Unlock()
	if untold { // it happened before the watch was in place
		c.tellOOM(true)
	}
	if err := removeCgroup(c.status.CgroupPaths); err != nil {
		c.sup.warn("container %s: %v", c.id, err)
	}
	_ = os.RemoveAll(filepath.Join(c.sup.libDir, c.id))
	c.finish(code, sig, reason, oom, finished)
}

// collect reaps the first process if it is ours.
func (c *container) collect() (code, sig int, reason string) {
	pid := c.status.PID
	if c.process != nil {
		state, err := c.process.Wait()
		c.sup.reaper.release(pid)
		if state != nil {
			if ws, ok := state.Sys().(syscall.WaitStatus); ok {
				code, sig = exitOf(unix.WaitStatus(ws))
				return code, sig, ""
			}
		}
		c.sup.warn("container %s: collect exit status: %v", c.id, err)
		return shim.LostExitCode, int(unix.SIGKILL), shim.ReasonStatusLost
	}
	if ws, ok := foreignStatus(c.pidfd); ok {
		code, sig = exitOf(ws)
		return code, sig, ""
	}
	return shim.LostExitCode, int(unix.SIGKILL), shim.ReasonStatusLost
}

// exitOf translates a wait status as shells do: 128+signal.
func exitOf(ws unix.WaitStatus) (code, sig int) {
	if ws.Signaled() {
		return 128 + int(ws.Signal()), int(ws.Signal())
	}
	return ws.ExitStatus(), 0
}

func (c *container) outputs() (stdout, stderr *output) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stdout, c.stderr
}

// drain waits for the end of the output, at most drainLimit.
func (c *container) drain() {
	limit := time.NewTimer(drainLimit)
	defer limit.Stop()
	stdout, stderr := c.outputs()
	for _, o := range []*output{stdout, stderr} {
		if o == nil {
			continue
		}
		select {
		case <-o.done:
		case <-limit.C:
			_ = o.src.Close()
			<-o.done
			limit.Reset(0)
		}
	}
}

// finish records the end and tells everybody.
func (c *container) finish(code, sig int, reason string, oom bool, at time.Time) {
	c.closeStdin()
	c.log.close()
	c.mu.Lock()
	if c.console != nil {
		_ = c.console.Close()
		c.console = nil
	}
	if c.pidfd != nil {
		_ = c.pidfd.Close()
	}
	c.process = nil
	c.status.State = shim.StateExited
	c.status.ExitCode, c.status.Signal, c.status.Reason = code, sig, reason
	c.status.OOMKilled = c.status.OOMKilled || oom
	c.status.FinishedAt = at
	status := c.status
	c.mu.Unlock()
	if err := writeJSON(c.dir, statusFile, status); err != nil {
		c.sup.warn("container %s: %v", c.id, err)
	}
	close(c.exited)
	c.sup.publish(shim.Event{Type: shim.EventExited, Status: status})
	c.sup.trim()
}

func (c *container) closeStdin() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stdin != nil {
		_ = c.stdin.Close()
		c.stdin = nil
	}
}

// signal sends to the first process, or to everything in the cgroup.
func (c *container) signal(sig unix.Signal, all bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.status.State != shim.StateRunning {
		return shim.Errorf(shim.CodeState, "container %s is not running", c.id)
	}
	if all {
		pids, err := cgroupPIDs(c.status.CgroupPaths)
		if err != nil {
			return err
		}
		for _, pid := range pids {
			_ = unix.Kill(pid, sig)
		}
		return nil
	}
	raw, err := c.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	if err := raw.Control(func(fd uintptr) { serr = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); err != nil {
		return err
	}
	if errors.Is(serr, unix.ESRCH) {
		return nil // it ended just now
	}
	return serr
}

// cgroupPIDs lists the processes of a container and of the cgroups below it.
func cgroupPIDs(paths map[string]string) ([]int, error) {
	for _, key := range []string{"", "devices", "memory", "pids", "cpu", "freezer"} {
		if dir, ok := paths[key]; ok {
			pids, err := cgroups.GetAllPids(dir)
			if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
				return nil, nil
			}
			return pids, err
		}
	}
	return nil, nil
}

// killCgroup kills until nothing is left, for containers that share the PID
// namespace of others.
func killCgroup(paths map[string]string) {
	if dir, ok := paths[""]; ok {
		_ = os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0o600)
	}
	for range killRounds {
		pids, err := cgroupPIDs(paths)
		if err != nil || len(pids) == 0 {
			return
		}
		killAndWait(pids)
	}
}

// killAndWait kills the processes and waits until they ended or killWait is over.
func killAndWait(pids []int) {
	waiting := make([]unix.PollFd, 0, len(pids))
	for _, pid := range pids {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue
		}
		defer func() { _ = unix.Close(fd) }()
		_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		waiting = append(waiting, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
	}
	deadline := time.Now().Add(killWait)
	for len(waiting) > 0 && time.Now().Before(deadline) {
		n, err := unix.Poll(waiting, int(time.Until(deadline).Milliseconds()))
		if err != nil && !errors.Is(err, unix.EINTR) || n == 0 {
			return
		}
		waiting = slices.DeleteFunc(waiting, func(p unix.PollFd) bool { return p.Revents != 0 })
	}
}

// cgroupManager gets a map of its own: removing a cgroup empties it.
func cgroupManager(paths map[string]string) (cgroups.Manager, error) {
	return manager.NewWithPaths(&cgroups.Cgroup{Resources: &cgroups.Resources{}}, maps.Clone(paths))
}

func removeCgroup(paths map[string]string) error {
	if len(paths) == 0 {
		return nil
	}
	m, err := cgroupManager(paths)
	if err != nil {
		return err
	}
	if err := m.Destroy(); err != nil {
		return fmt.Errorf("remove cgroup: %w", err)
	}
	return nil
}
