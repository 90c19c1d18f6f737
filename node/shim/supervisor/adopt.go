//go:build cgo

package supervisor

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/runc/libcontainer"
	"golang.org/x/sys/unix"

	"knarr/node/shim"
)

// adoptAll takes over what an earlier shim left in the directory.
func (s *Supervisor) adoptAll() error {
	entries, err := os.ReadDir(s.ctDir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if validID(e.Name()) != nil {
			continue
		}
		if err := s.adopt(e.Name()); err != nil {
			s.warn("take over container %s: %v", e.Name(), err)
		}
	}
	return nil
}

// adopt takes over one container. What never came to run is removed; what is
// gone is noted as ended; what runs is read, logged and awaited from now on.
func (s *Supervisor) adopt(id string) error {
	c := &container{id: id, dir: filepath.Join(s.ctDir, id), sup: s, exited: make(chan struct{})}
	c.log = newCRILog(shim.LogConfig{}, s.warn)
	if err := readJSON(c.dir, statusFile, &c.status); err != nil {
		return s.discard(c)
	}
	if err := readJSON(c.dir, startFile, &c.rec); err != nil {
		return s.discard(c)
	}
	s.mu.Lock()
	s.containers[id] = c
	s.mu.Unlock()
	c.log = newCRILog(c.rec.Log, s.warn)
	if c.status.State == shim.StateExited {
		close(c.exited)
		return nil
	}
	pidfd, reason := s.reopen(&c.status)
	if pidfd == nil {
		_ = os.RemoveAll(filepath.Join(s.libDir, id))
		if reason == shim.ReasonStatusLost {
			killCgroup(c.status.CgroupPaths)
			_ = removeCgroup(c.status.CgroupPaths)
		}
		c.finish(shim.LostExitCode, int(unix.SIGKILL), reason, false, time.Now().UTC())
		return nil
	}
	c.pidfd = pidfd
	if err := c.log.open(); err != nil {
		s.warn("container %s: %v", id, err)
	}
	if err := c.reopenStdio(); err != nil {
		return err
	}
	c.supervise(c.status.CgroupPaths)
	return nil
}

// reopen opens the process of a status if it is still the same one.
func (s *Supervisor) reopen(st *shim.Status) (*os.File, string) {
	if st.BootID != s.boot {
		return nil, shim.ReasonRebooted
	}
	pidfd, err := openPidfd(st.PID)
	if err != nil {
		return nil, shim.ReasonStatusLost
	}
	start, err := processStart(st.PID)
	if err != nil || start != st.PIDStart {
		_ = pidfd.Close()
		return nil, shim.ReasonStatusLost
	}
	return pidfd, ""
}

// discard removes a container whose start was cut off by the death of a shim,
// with all its processes.
func (s *Supervisor) discard(c *container) error {
	for _, paths := range []map[string]string{leftoverCgroups(s.libDir, c.id)} {
		killCgroup(paths)
		if err := removeCgroup(paths); err != nil {
			s.warn("container %s: %v", c.id, err)
		}
	}
	if err := os.RemoveAll(filepath.Join(s.libDir, c.id)); err != nil {
		return err
	}
	return os.RemoveAll(c.dir)
}

// leftoverCgroups reads where libcontainer put a container.
func leftoverCgroups(root, id string) map[string]string {
	data, err := os.ReadFile(filepath.Join(root, id, "state.json"))
	if err != nil {
		return nil
	}
	var st libcontainer.State
	if err := json.Unmarshal(data, &st); err != nil {
		return nil
	}
	return st.CgroupPaths
}

// reopenStdio opens our sides of the FIFOs. A terminal comes back only if a
// client kept it (OpKeepTTY); until then the container's output waits there.
func (c *container) reopenStdio() error {
	if c.rec.Terminal {
		return nil
	}
	for _, stream := range []struct {
		name string
		out  **output
	}{{"stdout", &c.stdout}, {"stderr", &c.stderr}} {
		f, err := openFIFO(filepath.Join(c.dir, stream.name), unix.O_RDONLY|unix.O_NONBLOCK)
		if err != nil {
			return err
		}
		*stream.out = newOutput(stream.name, f, c.log, c.sup.buffers)
	}
	if !c.rec.Stdin || c.rec.StdinOnce {
		return nil // a stdin that is closed once has been closed by our death
	}
	stdin, err := openFIFO(filepath.Join(c.dir, "stdin"), unix.O_RDWR|unix.O_NONBLOCK)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	c.stdin = stdin
	return err
}
