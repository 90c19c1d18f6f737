//go:build cgo

package supervisor

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/opencontainers/cgroups"
	"golang.org/x/sys/unix"
)

// oomWatch tells when the kernel kills in a memory cgroup: by eventfd on v1, by
// a change of memory.events on v2. wait blocks in the poller; close ends it.
type oomWatch struct {
	file *os.File
	dir  string
	v2   bool
	seen uint64 // kills told so far
}

// memoryDir returns the directory of the memory controller, "" if there is none.
func memoryDir(paths map[string]string) (dir string, v2 bool) {
	if cgroups.IsCgroup2UnifiedMode() {
		return paths[""], true
	}
	return paths["memory"], false
}

func watchOOM(paths map[string]string) (*oomWatch, error) {
	dir, v2 := memoryDir(paths)
	if dir == "" {
		return nil, nil
	}
	if v2 {
		return watchOOMv2(dir)
	}
	return watchOOMv1(dir)
}

func watchOOMv1(dir string) (*oomWatch, error) {
	control, err := os.Open(filepath.Join(dir, "memory.oom_control"))
	if err != nil {
		return nil, err
	}
	defer func() { _ = control.Close() }()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	line := fmt.Sprintf("%d %d", fd, control.Fd())
	if err := os.WriteFile(filepath.Join(dir, "cgroup.event_control"), []byte(line), 0o600); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return &oomWatch{file: os.NewFile(uintptr(fd), "oom eventfd"), dir: dir}, nil
}

func watchOOMv2(dir string) (*oomWatch, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("inotify_init1", err)
	}
	if _, err := unix.InotifyAddWatch(fd, filepath.Join(dir, "memory.events"), unix.IN_MODIFY); err != nil {
		_ = unix.Close(fd)
		return nil, os.NewSyscallError("inotify_add_watch", err)
	}
	return &oomWatch{file: os.NewFile(uintptr(fd), "memory.events inotify"), dir: dir, v2: true}, nil
}

// wait returns true when the kernel has killed, or is about to, false when the
// watch has ended. On v1 a shortage in a parent cgroup counts too.
func (w *oomWatch) wait() bool {
	buf := make([]byte, 512)
	for {
		if _, err := w.file.Read(buf); err != nil {
			return false
		}
		if _, err := os.Stat(w.dir); err != nil {
			return false // the removal of the cgroup is an event too
		}
		if !w.v2 {
			return true
		}
		if n := oomKills(w.dir, w.v2); n > w.seen {
			w.seen = n
			return true
		}
	}
}

func (w *oomWatch) close() {
	if w != nil {
		_ = w.file.Close()
	}
}

// oomKills reads how often the kernel killed in the cgroup.
func oomKills(dir string, v2 bool) uint64 {
	name := "memory.oom_control"
	if v2 {
		name = "memory.events"
	}
	f, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		return 0
	}
	defer func() { _ = f.Close() }()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if value, ok := strings.CutPrefix(lines.Text(), "oom_kill "); ok {
			n, _ := strconv.ParseUint(value, 10, 64)
			return n
		}
	}
	return 0
}
