package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds of cleaning up.
const (
	// killTimeout is how long the kernel may take to end a process after SIGKILL.
	killTimeout = 10 * time.Second
	// maxKillRounds bounds how often a cgroup is looked at again for processes that were started meanwhile.
	maxKillRounds = 20
	// A cgroup is busy for a moment after its last process, and the kernel tells nobody when that is over (v1).
	cgroupBusyPause  = 5 * time.Millisecond
	cgroupBusyRounds = 1000
)

// stopProcesses asks processes to end, waits up to grace, and kills those that are left. A process that has ended is no
// error.
func stopProcesses(ctx context.Context, pids []int, grace time.Duration) error {
	var fds []unix.PollFd
	defer func() {
		for _, f := range fds {
			unix.Close(int(f.Fd))
		}
	}()
	for _, pid := range pids {
		fd, err := unix.PidfdOpen(pid, 0)
		if errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			return fmt.Errorf("process %d: %w", pid, err)
		}
		fds = append(fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
		sig := unix.SIGTERM
		if !catches(pid, unix.SIGTERM) {
			sig = unix.SIGKILL // SIGTERM would kill it without a word too, or, in the first process of a namespace, do nothing
		}
		if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("process %d: %w", pid, err)
		}
	}
	left, err := awaitEnd(ctx, fds, grace)
	if err != nil || len(left) == 0 {
		return err
	}
	for _, f := range left {
		if err := unix.PidfdSendSignal(int(f.Fd), unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
	left, err = awaitEnd(ctx, left, killTimeout)
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("%d processes do not end after SIGKILL: the kernel holds them (see /proc/PID/stack)", len(left))
	}
	return err
}

// awaitEnd returns those of fds whose process has not ended when limit is over.
func awaitEnd(ctx context.Context, fds []unix.PollFd, limit time.Duration) ([]unix.PollFd, error) {
	end := time.Now().Add(limit)
	left := slices.Clone(fds)
	for len(left) > 0 && time.Now().Before(end) && ctx.Err() == nil {
		_, err := unix.Poll(left, int(time.Until(end).Milliseconds())+1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return left, err
		}
		left = slices.DeleteFunc(left, func(f unix.PollFd) bool { return f.Revents != 0 })
	}
	return left, ctx.Err()
}

// catches says whether a process has a handler for a signal.
func catches(pid int, sig unix.Signal) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if mask, ok := strings.CutPrefix(line, "SigCgt:"); ok {
			m, err := strconv.ParseUint(strings.TrimSpace(mask), 16, 64)
			return err == nil && m&(1<<(uint(sig)-1)) != 0
		}
	}
	return false
}

// cgroups lists the cluster's directories, one in each hierarchy that has it.
func (c *cluster) cgroups() []string {
	var out []string
	mounts, err := readMounts()
	if err != nil {
		return nil
	}
	for _, m := range mounts {
		if m.kind != "cgroup" && m.kind != "cgroup2" {
			continue
		}
		if dir := filepath.Join(m.point, "knarr-"+c.name); exists(dir) && !slices.Contains(out, dir) {
			out = append(out, dir)
		}
	}
	return out
}

// stopContainers ends every process in the cluster's cgroups.
func (c *cluster) stopContainers(ctx context.Context, grace time.Duration) error {
	for range maxKillRounds {
		pids, err := cgroupProcesses(c.cgroups())
		if err != nil || len(pids) == 0 {
			return err
		}
		if err := stopProcesses(ctx, pids, grace); err != nil {
			return err
		}
	}
	return errors.New("new processes keep appearing in the cluster's cgroups")
}

// cgroupProcesses lists the processes in and below dirs.
func cgroupProcesses(dirs []string) ([]int, error) {
	seen := map[int]bool{}
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.IsDir() {
				return ignoreGone(err)
			}
			b, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
			for _, f := range strings.Fields(string(b)) {
				if pid, err := strconv.Atoi(f); err == nil && pid > 0 && !ended(pid) {
					seen[pid] = true
				}
			}
			return ignoreGone(err)
		})
		if err != nil {
			return nil, err
		}
	}
	pids := make([]int, 0, len(seen))
	for pid := range seen {
		pids = append(pids, pid)
	}
	return pids, nil
}

// ended says whether a process is a zombie: it stays in its cgroup until its parent looks.
func ended(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	_, rest, _ := strings.Cut(string(b[strings.LastIndexByte(string(b), ')')+1:]), " ")
	return strings.HasPrefix(rest, "Z") || strings.HasPrefix(rest, "X")
}

func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// removeCgroups removes directories with all below them, the deepest first.
func removeCgroups(ctx context.Context, dirs []string) error {
	var errs []error
	for _, dir := range dirs {
		var all []string
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				all = append(all, path)
			}
			return ignoreGone(err)
		})
		errs = append(errs, err)
		slices.Reverse(all)
		for _, d := range all {
			errs = append(errs, removeCgroup(ctx, d))
		}
	}
	return errors.Join(errs...)
}

func removeCgroup(ctx context.Context, dir string) error {
	var err error
	for range cgroupBusyRounds {
		if err = unix.Rmdir(dir); err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			break
		}
		select {
		case <-time.After(cgroupBusyPause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return fmt.Errorf("%s: %w", dir, err)
}

// mountEntry is a line of /proc/self/mountinfo.
type mountEntry struct{ point, kind string }

// readMounts lists all mounts, the oldest first.
func readMounts() ([]mountEntry, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var out []mountEntry
	for line := range strings.Lines(string(b)) {
		before, after, ok := strings.Cut(line, " - ")
		f, kind := strings.Fields(before), strings.Fields(after)
		if ok && len(f) >= 5 && len(kind) > 0 {
			out = append(out, mountEntry{unescapeMount(f[4]), kind[0]})
		}
	}
	return out, nil
}

// unescapeMount undoes the kernel's octal escapes of blanks and backslashes.
var unescapeMount = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace

// mountsBelow lists the mount points in dir, those mounted last first.
func mountsBelow(dir string) ([]string, error) {
	real, err := filepath.EvalSymlinks(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	mounts, err := readMounts()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, m := range slices.Backward(mounts) {
		if strings.HasPrefix(m.point, real+"/") {
			out = append(out, m.point)
		}
	}
	return out, nil
}

// unmountBelow unmounts everything in dir.
func unmountBelow(dir string) error {
	points, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range points {
		if err := unix.Unmount(p, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", p, err))
		}
	}
	return errors.Join(errs...)
}
