// Package netns makes, enters and deletes named network namespaces.
//
// A namespace is pinned by a bind mount of /proc/<tid>/ns/net on an empty file, as iproute2 does: it lives as long as the mount, needs
// no process, and is found again by its path after a crash. Functions are safe for concurrent use with different paths.
package netns

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"

	vns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// nsfsMagic is the file system type of namespace files (NSFS_MAGIC of linux/magic.h).
const nsfsMagic = 0x6e736673

// Exists says whether path is a pinned namespace (a file of the nsfs file system).
func Exists(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == nsfsMagic
}

// Create makes a new network namespace, pins it at path and brings its loopback interface up by way of setUp, which runs inside the
// new namespace (nil: nothing runs). A namespace that is already pinned there is kept and setUp runs inside it.
// The parent directory is made with mode 0700 where it is missing.
func Create(path string, setUp func() error) error {
	if Exists(path) {
		return Do(path, setUp)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("netns: make the directory of %s: %w", path, err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o600)
	if err != nil {
		return fmt.Errorf("netns: make the mount point %s: %w", path, err)
	}
	f.Close()
	err = onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("netns: unshare (root is needed): %w", err)
		}
		self := fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())
		if err := unix.Mount(self, path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("netns: pin %s: %w", path, err)
		}
		return call(setUp)
	})
	if err != nil {
		return errors.Join(err, Delete(path))
	}
	return nil
}

// Delete unpins the namespace at path and removes the file. A path that is not there is no error. The kernel destroys the namespace, with
// its links, when the last process and file that hold it are gone.
func Delete(path string) error {
	for Exists(path) { // a crash between two set-ups can leave two mounts on top of each other
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("netns: unpin %s: %w", path, err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("netns: remove %s: %w", path, err)
	}
	return nil
}

// Do runs fn on a thread that is inside the namespace at path ("" means the namespace of the process). Goroutines that fn starts are not inside.
// Sockets and files under /proc/sys/net that fn opens belong to the namespace for good.
func Do(path string, fn func() error) error {
	if path == "" {
		return call(fn)
	}
	h, err := vns.GetFromPath(path)
	if err != nil {
		return fmt.Errorf("netns: open %s: %w", path, err)
	}
	defer h.Close()
	return onThread(func() error {
		if err := vns.Set(h); err != nil {
			return fmt.Errorf("netns: enter %s: %w", path, err)
		}
		return call(fn)
	})
}

// Open returns a handle of the namespace at path; "" is the namespace of the calling thread. The caller closes it.
func Open(path string) (vns.NsHandle, error) {
	if path == "" {
		return vns.Get()
	}
	h, err := vns.GetFromPath(path)
	if err != nil {
		return h, fmt.Errorf("netns: open %s: %w", path, err)
	}
	return h, nil
}

// Start starts cmd inside the namespace at path ("": as it is). All threads of the new process are inside from its first instruction on,
// because the thread that forks has entered before. cmd is as for (*exec.Cmd).Start; the caller waits for it.
func Start(path string, cmd *exec.Cmd) error {
	return Do(path, cmd.Start)
}

// Run is Start followed by Wait, ended by ctx.
func Run(ctx context.Context, path string, cmd *exec.Cmd) error {
	if err := Start(path, cmd); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer stop()
	return cmd.Wait()
}

// onThread runs fn on an operating system thread of its own, which may change its namespace: the thread is never given back to the Go
// scheduler, it ends with fn.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime ends the thread with the goroutine
		done <- fn()
	}()
	return <-done
}

func call(fn func() error) error {
	if fn == nil {
		return nil
	}
	return fn()
}
