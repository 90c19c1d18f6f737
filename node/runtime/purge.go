package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"knarr/node/shim"
)

const (
	// purgeRounds and purgeWait bound the killing of what no shim knows: so
	// often, and so long for each round of processes to end.
	purgeRounds = 20
	purgeWait   = 500 * time.Millisecond
)

// Purge ends everything of a state directory that has no agent any more: its
// containers, its shim, its mounts, the cgroups below cgroupParent, and the
// directories of sandboxes, containers, mount points and the shim. It works whatever crashed
// before, is idempotent, and needs neither images nor network; the caller
// removes these. Options.StateDir must have been the same path in the same
// mount namespace.
func Purge(ctx context.Context, stateDir, cgroupParent string) error {
	if !filepath.IsAbs(cgroupParent) || filepath.Clean(cgroupParent) == "/" {
		return fmt.Errorf("purge: %q is not a cgroup of our own", cgroupParent)
	}
	stateDir, err := filepath.Abs(stateDir)
	if err != nil {
		return err
	}
	shimDir := filepath.Join(stateDir, "shim")
	errs := []error{purgeShim(ctx, shimDir), killTree(ctx, cgroupParent), unmountBelow(stateDir)}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("purge %s: %w", stateDir, err)
	}
	removeCgroupTree(cgroupParent)
	for _, dir := range []string{"pods", "containers", "shim", "mountpoints"} {
		errs = append(errs, os.RemoveAll(filepath.Join(stateDir, dir)))
	}
	return errors.Join(errs...)
}

// purgeShim has the living shim, if there is one, kill its containers and ends
// it.
func purgeShim(ctx context.Context, dir string) error {
	client, err := shim.Start(ctx, shim.Options{Dir: dir})
	if err != nil {
		return nil // none is living
	}
	list, err := client.List(ctx)
	if err != nil {
		return err
	}
	for _, st := range list {
		if err := client.Delete(ctx, st.ID, true); err != nil && !shimNotFound(err) {
			return err
		}
	}
	ping, err := client.Ping(ctx)
	if err != nil {
		return err
	}
	pidfd, err := unix.PidfdOpen(ping.PID, 0)
	if err != nil {
		return nil
	}
	defer func() { _ = unix.Close(pidfd) }()
	if err := client.Shutdown(ctx, true); err != nil {
		return err
	}
	awaitPidfds([]int{pidfd}, purgeRounds*purgeWait)
	return nil
}

// cgroupDirs returns the directory of a cgroup in every hierarchy that has it.
func cgroupDirs(path string) []string {
	found, _ := filepath.Glob(filepath.Join(cgroupRoot, "*") + path)
	if own := cgroupRoot + path; present(own) {
		found = append(found, own)
	}
	return found
}

// killTree kills every process in and below a cgroup.
func killTree(ctx context.Context, path string) error {
	for range purgeRounds {
		pids := map[int]bool{}
		for _, root := range cgroupDirs(path) {
			_ = filepath.WalkDir(root, func(p string, d os.DirEntry, err error) error {
				if err == nil && d.Name() == "cgroup.procs" {
					collectPIDs(p, pids)
				}
				return nil
			})
		}
		if len(pids) == 0 {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		var fds []int
		for pid := range pids {
			if fd, err := unix.PidfdOpen(pid, 0); err == nil {
				_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
				fds = append(fds, fd)
			}
		}
		awaitPidfds(fds, purgeWait)
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	}
	return fmt.Errorf("processes in cgroup %s do not end", path)
}

func collectPIDs(file string, pids map[int]bool) {
	data, err := os.ReadFile(file)
	if err != nil {
		return
	}
	for _, field := range strings.Fields(string(data)) {
		if pid, err := strconv.Atoi(field); err == nil && pid > 0 {
			pids[pid] = true
		}
	}
}

// awaitPidfds waits until all processes have ended, at most for limit.
func awaitPidfds(fds []int, limit time.Duration) {
	deadline := time.Now().Add(limit)
	for _, fd := range fds {
		for time.Now().Before(deadline) {
			poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			n, err := unix.Poll(poll, int(time.Until(deadline).Milliseconds())+1)
			if n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
				break
			}
		}
	}
}

// unmountBelow detaches every mount below dir, the deepest first.
func unmountBelow(dir string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range slices.Backward(mounts) { // in the order of mounting
		if m.Mountpoint != dir {
			errs = append(errs, unmount(m.Mountpoint))
		}
	}
	return errors.Join(errs...)
}

// removeCgroupTree removes the directories of a cgroup and of all below it.
func removeCgroupTree(path string) {
	for _, root := range cgroupDirs(path) {
		var dirs []string
		_ = filepath.WalkDir(root, func(p string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, p)
			}
			return nil
		})
		for _, dir := range slices.Backward(dirs) {
			_ = unix.Rmdir(dir)
		}
	}
}
