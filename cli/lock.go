package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A process of a cluster holds a lock file for as long as it lives and writes its process id into it. The kernel drops
// the lock with the process, so that a lock that is held proves life, and a process id is never taken for another
// process's that got the same number later.

// errLocked is returned by takeLock when another process holds the lock.
var errLocked = errors.New("locked by another process")

// pidLock is a held lock file.
type pidLock struct{ f *os.File }

// takeLock takes the lock at path and writes our process id into it.
func takeLock(path string) (*pidLock, error) {
	for {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, errLocked
			}
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if !stillAt(f, path) { // removed by its last holder between our open and our lock
			f.Close()
			continue
		}
		l := &pidLock{f}
		if err := l.writePID(); err != nil {
			l.release()
			return nil, err
		}
		return l, nil
	}
}

func stillAt(f *os.File, path string) bool {
	have, err := f.Stat()
	if err != nil {
		return false
	}
	want, err := os.Stat(path)
	return err == nil && os.SameFile(have, want)
}

func (l *pidLock) writePID() error {
	if err := l.f.Truncate(0); err != nil {
		return err
	}
	_, err := l.f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	return err
}

// release gives the lock up; the file stays.
func (l *pidLock) release() { l.f.Close() }

// remove deletes the file and gives the lock up.
func (l *pidLock) remove() {
	os.Remove(l.f.Name())
	l.f.Close()
}

// lockOwner returns the process id of the living holder of a lock file, or 0 when nobody holds it.
func lockOwner(path string) (int, error) { return lockOwnerPID(path, path) }

// lockOwnerPID is lockOwner for programs that write their process id to a file of its own.
func lockOwnerPID(path, pidPath string) (int, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer f.Close()
	err = unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	if err == nil {
		return 0, nil // closing f drops our shared lock
	}
	if !errors.Is(err, unix.EWOULDBLOCK) {
		return 0, fmt.Errorf("lock %s: %w", path, err)
	}
	b, err := os.ReadFile(pidPath)
	if err != nil {
		return 0, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 0 {
		return 0, fmt.Errorf("%s is held, but names no process: try again", filepath.Base(path))
	}
	return pid, nil
}
