package runtime

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sort"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// idMap is the mapping of a user namespace.
type idMap struct{ uids, gids []*runtimeapi.IDMapping }

// nsPlan says which namespaces a sandbox gets and how they are set up.
type nsPlan struct {
	net, ipc, uts bool
	hostname      string
	sysctls       map[string]string
	user          *idMap // nil: the node's user namespace
}

func (p nsPlan) files() map[string]int {
	files := map[string]int{}
	if p.net {
		files["net"] = unix.CLONE_NEWNET
	}
	if p.ipc {
		files["ipc"] = unix.CLONE_NEWIPC
	}
	if p.uts {
		files["uts"] = unix.CLONE_NEWUTS
	}
	return files
}

// pin makes the namespaces and keeps each alive by a bind mount of it at
// dir/<name>; unpin is its opposite.
func (p nsPlan) pin(dir, helper string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if p.user != nil {
		return p.pinWithUser(dir, helper)
	}
	flags := 0
	for _, flag := range p.files() {
		flags |= flag
	}
	if flags == 0 {
		return nil
	}
	return onOwnThread(func() error {
		if err := unix.Unshare(flags); err != nil {
			return os.NewSyscallError("unshare", err)
		}
		for name := range p.files() {
			if err := bindFile("/proc/thread-self/ns/"+name, filepath.Join(dir, name)); err != nil {
				return err
			}
		}
		return p.setUp()
	})
}

// pinWithUser makes the namespaces inside a new user namespace, which owns
// them. A process has to be born in there: the shim's pause.
func (p nsPlan) pinWithUser(dir, helper string) error {
	flags := uintptr(unix.CLONE_NEWUSER)
	names := []string{"user"}
	for name, flag := range p.files() {
		flags |= uintptr(flag)
		names = append(names, name)
	}
	cmd := exec.Command(helper, "pause")
	cmd.Dir = "/"
	cmd.Env = []string{}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:                 flags,
		UidMappings:                sysIDMap(p.user.uids),
		GidMappings:                sysIDMap(p.user.gids),
		GidMappingsEnableSetgroups: true,
		Pdeathsig:                  syscall.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("create user namespace: %w", err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	for _, name := range names {
		source := "/proc/" + strconv.Itoa(cmd.Process.Pid) + "/ns/" + name
		if err := bindFile(source, filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return inNamespaces(dir, []string{"net", "ipc", "uts"}, p.setUp)
}

func sysIDMap(in []*runtimeapi.IDMapping) []syscall.SysProcIDMap {
	var out []syscall.SysProcIDMap
	for _, m := range in {
		out = append(out, syscall.SysProcIDMap{ContainerID: int(m.ContainerId), HostID: int(m.HostId), Size: int(m.Length)})
	}
	return out
}

// setUp runs inside of the new namespaces.
func (p nsPlan) setUp() error {
	if p.net {
		if err := loopbackUp(); err != nil {
			return err
		}
	}
	if p.uts && p.hostname != "" {
		if err := unix.Sethostname([]byte(p.hostname)); err != nil {
			return os.NewSyscallError("sethostname", err)
		}
	}
	keys := make([]string, 0, len(p.sysctls))
	for key := range p.sysctls {
		keys = append(keys, key)
	}
	sort.Strings(keys)
	for _, key := range keys {
		if err := p.sysctl(key, p.sysctls[key]); err != nil {
			return err
		}
	}
	return nil
}

// sysctl sets one of the namespaced kernel parameters; others would change the
// node.
func (p nsPlan) sysctl(key, value string) error {
	key = strings.ReplaceAll(key, "/", ".")
	ipc := strings.HasPrefix(key, "kernel.shm") || strings.HasPrefix(key, "kernel.msg") ||
		key == "kernel.sem" || strings.HasPrefix(key, "fs.mqueue.")
	if !(ipc && p.ipc || strings.HasPrefix(key, "net.") && p.net) {
		return fmt.Errorf("sysctl %q is not in a namespace of the pod", key)
	}
	path := "/proc/sys/" + strings.ReplaceAll(key, ".", "/")
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		return fmt.Errorf("sysctl %s=%s: %w", key, value, err)
	}
	return nil
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer func() { _ = unix.Close(fd) }()
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING | unix.IFF_LOOPBACK)
	return os.NewSyscallError("ioctl(SIOCSIFFLAGS lo)", unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req))
}

// onOwnThread runs f on a thread that ends with it, so that what f changes of
// the thread stays there. The process's first thread never ends, and
// /proc/self shows its namespaces: it is never used.
func onOwnThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			defer runtime.UnlockOSThread()
			done <- onOwnThread(f) // on another thread, for this one is taken
			return
		}
		done <- f() // never unlocked: the thread ends with the goroutine
	}()
	return <-done
}

// inNamespaces runs f in those of the named namespaces that are pinned in dir.
func inNamespaces(dir string, names []string, f func() error) error {
	return onOwnThread(func() error {
		for _, name := range names {
			ns, err := os.Open(filepath.Join(dir, name))
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			if err != nil {
				return err
			}
			err = unix.Setns(int(ns.Fd()), 0)
			_ = ns.Close()
			if err != nil {
				return fmt.Errorf("enter namespace %s: %w", ns.Name(), err)
			}
		}
		return f()
	})
}

// bindFile mounts source over a new empty file.
func bindFile(source, target string) error {
	f, err := os.OpenFile(target, os.O_CREATE|os.O_RDONLY, 0o600)
	if err != nil {
		return err
	}
	_ = f.Close()
	if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
		return &os.PathError{Op: "bind mount on", Path: target, Err: err}
	}
	return nil
}

// unpin lets the namespaces go.
func unpin(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		errs = append(errs, unmount(filepath.Join(dir, e.Name())))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

// unmount detaches everything that is mounted at path, which may be nothing.
func unmount(path string) error {
	const maxLayers = 16
	for range maxLayers {
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if err != nil {
			return &os.PathError{Op: "unmount", Path: path, Err: err}
		}
	}
	return nil
}
