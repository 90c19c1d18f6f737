//go:build cgo

package supervisor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/moby/sys/userns"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer/configs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// LogFormat drops what libcontainer says each time that it writes a
// configuration down whose hooks are functions: they work here and nowhere else.
type LogFormat struct{ logrus.Formatter }

// Format implements logrus.Formatter.
func (f LogFormat) Format(e *logrus.Entry) ([]byte, error) {
	if strings.HasPrefix(e.Message, "cannot serialize hook of type configs.FuncHook") {
		return nil, nil
	}
	return f.Formatter.Format(e)
}

// mountHierarchies has the hierarchies of cgroup v1 mounted into the container
// by us. Libcontainer would look for the place of each of them anew, on the
// guard against links of the image, which takes a fifth of the time that a
// container's init works; here they lie in the sysfs that it has just mounted,
// where no image has links. Containers that are not plain are left to it, and so
// is cgroup v2, which is one mount.
func mountHierarchies(config *configs.Config) {
	all := plainHierarchies(config)
	if all == nil {
		return
	}
	config.Mounts = slices.DeleteFunc(config.Mounts, func(m *configs.Mount) bool { return m == all })
	config.Hooks[configs.CreateRuntime] = configs.HookList{configs.NewFunctionHook(func(s *specs.State) error {
		return inMountsOf(s.Pid, func() error { return bindHierarchies(config.Rootfs, all, s.Pid) })
	})}
}

// plainHierarchies is the mount of the hierarchies where it can be ours: below
// a sysfs that has nothing else mounted in it, with no namespace that would
// change what is seen or permitted.
func plainHierarchies(config *configs.Config) *configs.Mount {
	if cgroups.IsCgroup2UnifiedMode() || userns.RunningInUserNS() || config.MountLabel != "" || config.Hooks == nil ||
		config.Namespaces.Contains(configs.NEWUSER) || config.Namespaces.Contains(configs.NEWCGROUP) || !config.Namespaces.Contains(configs.NEWNS) {
		return nil
	}
	var sysfs, all *configs.Mount
	for _, m := range config.Mounts {
		switch path := filepath.Clean(m.Destination); {
		case path == "/sys" && m.Device == "sysfs" && sysfs == nil:
			sysfs = m
		case path == "/sys/fs/cgroup" && m.Device == "cgroup" && all == nil:
			all = m
		case path == "/" || path == "/sys" || strings.HasPrefix(path, "/sys/"):
			return nil
		}
	}
	if sysfs == nil {
		return nil
	}
	return all
}

// inMountsOf runs f in the mount namespace of a process, on a thread that ends
// with it. The process's first thread never ends, and is not used.
func inMountsOf(pid int, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if unix.Gettid() == unix.Getpid() {
			defer runtime.UnlockOSThread()
			done <- inMountsOf(pid, f) // on another thread, for this one is taken
			return
		}
		ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", pid))
		if err == nil {
			defer func() { _ = ns.Close() }()
			err = errors.Join(os.NewSyscallError("unshare", unix.Unshare(unix.CLONE_FS)),
				os.NewSyscallError("setns", unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS)))
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// bindHierarchies mounts the container's part of each hierarchy as libcontainer
// does: directories in a small file system, and links for controllers that share one.
func bindHierarchies(rootfs string, m *configs.Mount, pid int) error {
	mounts, err := cgroups.GetCgroupMounts(false)
	if err != nil {
		return err
	}
	own, err := cgroups.ParseCgroupFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return err
	}
	top := filepath.Join(rootfs, m.Destination)
	if err := mountAt("tmpfs", top, "tmpfs", unix.MS_NOEXEC|unix.MS_NOSUID|unix.MS_NODEV, "mode=755", m.PropagationFlags); err != nil {
		return err
	}
	for _, h := range mounts {
		dir, err := h.GetOwnCgroup(own)
		if err != nil {
			return err
		}
		below, err := filepath.Rel(h.Root, dir)
		if err != nil {
			return err
		}
		name := filepath.Base(h.Mountpoint)
		target := filepath.Join(top, name)
		if err := os.Mkdir(target, 0o755); err != nil {
			return err
		}
		if err := mountAt(filepath.Join(h.Mountpoint, below), target, "", unix.MS_BIND|unix.MS_REC, "", m.PropagationFlags); err != nil {
			return err
		}
		if err := mountAt("", target, "", unix.MS_BIND|unix.MS_REMOUNT|uintptr(m.Flags), "", nil); err != nil {
			return err
		}
		if err := linkControllers(top, name); err != nil {
			return err
		}
	}
	return nil
}

// linkControllers makes the links of a hierarchy with several controllers.
func linkControllers(top, name string) error {
	if !strings.Contains(name, ",") {
		return nil
	}
	for controller := range strings.SplitSeq(name, ",") {
		if err := os.Symlink(name, filepath.Join(top, controller)); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return nil
}

func mountAt(source, target, kind string, flags uintptr, options string, propagation []int) error {
	if err := unix.Mount(source, target, kind, flags, options); err != nil {
		return &os.PathError{Op: "mount", Path: target, Err: err}
	}
	for _, p := range propagation {
		if err := unix.Mount("", target, "", uintptr(p), ""); err != nil {
			return &os.PathError{Op: "set propagation of", Path: target, Err: err}
		}
	}
	return nil
}
