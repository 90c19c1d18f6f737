//go:build cgo

package supervisor

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// reaper collects children that belong to nobody: processes of containers
// without a PID namespace of their own whose parent ended, which the kernel
// gives to us as their subreaper.
//
// Processes that someone waits for must not be reaped here. These are the
// registered ones, and any that libcontainer starts and waits for itself while
// it brings up a container. The latter are unknown by number, so an unknown
// zombie is only reaped when every start that was under way when it was first
// seen has ended (barrier).
type reaper struct {
	mu         sync.Mutex
	registered map[int]struct{}
	starts     map[uint64]struct{}
	nextStart  uint64
	suspect    int
	barrier    uint64
	wake       chan struct{}
}

func newReaper() *reaper {
	return &reaper{
		registered: map[int]struct{}{},
		starts:     map[uint64]struct{}{},
		wake:       make(chan struct{}, 1),
	}
}

// begin announces that libcontainer will start and wait for processes; end is
// called after the resulting process was registered.
func (r *reaper) begin() (end func()) {
	r.mu.Lock()
	n := r.nextStart
	r.nextStart++
	r.starts[n] = struct{}{}
	r.mu.Unlock()
	return func() {
		r.mu.Lock()
		delete(r.starts, n)
		r.mu.Unlock()
		r.kick()
	}
}

func (r *reaper) register(pid int) {
	r.mu.Lock()
	r.registered[pid] = struct{}{}
	r.mu.Unlock()
}

// release is called after the registered process was reaped.
func (r *reaper) release(pid int) {
	r.mu.Lock()
	delete(r.registered, pid)
	r.mu.Unlock()
	r.kick()
}

func (r *reaper) kick() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// run reaps until ctx ends.
func (r *reaper) run(ctx context.Context) {
	children := make(chan os.Signal, 1)
	signal.Notify(children, unix.SIGCHLD)
	defer signal.Stop(children)
	for {
		select {
		case <-ctx.Done():
			return
		case <-children:
		case <-r.wake:
		}
		for r.reapOne() {
		}
	}
}

// reapOne reaps the first waiting zombie if it is nobody's; false means that
// there is none or that the first one is somebody's.
func (r *reaper) reapOne() bool {
	pid, ok := peekZombie()
	if !ok {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, mine := r.registered[pid]; mine {
		r.suspect = 0
		return false
	}
	if r.suspect != pid {
		r.suspect, r.barrier = pid, r.nextStart
	}
	for n := range r.starts {
		if n < r.barrier {
			return false
		}
	}
	r.suspect = 0
	var info unix.Siginfo
	_ = unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOHANG, nil)
	return true
}

// siginfoChild is the layout of siginfo_t for SIGCHLD on 64-bit Linux.
type siginfoChild struct {
	signo, errno, code, _ int32
	pid                   int32
	uid                   uint32
	status                int32
}

func peekZombie() (int, bool) {
	var info unix.Siginfo
	for {
		err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, false
		}
		break
	}
	pid := int((*siginfoChild)(unsafe.Pointer(&info)).pid)
	return pid, pid != 0
}

// openPidfd opens a process so that its end can be awaited in the poller.
func openPidfd(pid int) (*os.File, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// awaitExit returns when the process has ended; it does not reap it.
func awaitExit(pidfd *os.File) error {
	raw, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Read(func(fd uintptr) bool { return readable(int(fd)) })
}

func readable(fd int) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n > 0
}

// pidfdInfo is struct pidfd_info, first version (Linux 6.13).
type pidfdInfo struct {
	mask     uint64
	cgroupID uint64
	pid      uint32
	tgid     uint32
	ppid     uint32
	ids      [8]uint32
	exitCode int32
}

const (
	pidfdGetInfo  = 0xC040FF0B // _IOWR(0xFF, 11, 64 bytes)
	pidfdInfoExit = 1 << 3     // Linux 6.15
	// lostStatusWait bounds the wait for the foreign parent to reap the
	// process, after which the kernel tells the exit status to everybody.
	lostStatusWait = 2 * time.Second
)

// foreignStatus returns the wait status of an ended process that is not our
// child; false when the kernel does not tell.
func foreignStatus(pidfd *os.File) (unix.WaitStatus, bool) {
	raw, err := pidfd.SyscallConn()
	if err != nil {
		return 0, false
	}
	_ = pidfd.SetReadDeadline(time.Now().Add(lostStatusWait))
	var status unix.WaitStatus
	found := false
	_ = raw.Read(func(fd uintptr) bool {
		info := pidfdInfo{mask: pidfdInfoExit}
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, pidfdGetInfo, uintptr(unsafe.Pointer(&info)))
		if errno == 0 && info.mask&pidfdInfoExit != 0 {
			status, found = unix.WaitStatus(info.exitCode), true
			return true
		}
		return errno != 0
	})
	return status, found
}
