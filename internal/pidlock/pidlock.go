// Package pidlock holds lock files that name the process that holds them.
//
// A process holds its lock for as long as it lives. The kernel drops the lock with the process and is who tells whose it
// is, in one question (fcntl's F_GETLK): a holder is never without a name, never another process that got the same number
// later, and who asks takes nothing that the holder could want.
package pidlock

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ErrLocked is returned by Take and TakeWithin when a process, also this one, holds the lock.
var ErrLocked = errors.New("locked by another process")

// own are the locks of this process. The kernel drops a process's lock when the process closes any descriptor of the file,
// so none of these is opened again, and none is left to the garbage collector.
var own = struct {
	sync.Mutex
	locks map[string]*Lock
}{locks: map[string]*Lock{}}

// Lock is a held lock file. It is released when the process ends, or by Release or Remove, which may be called once.
type Lock struct {
	f    *os.File
	path string
}

// Take takes the lock at path, whose file it makes (mode 0600) if need be, or returns ErrLocked.
func Take(path string) (*Lock, error) { return TakeWithin(path, 0) }

// TakeWithin is Take that waits up to d for the holder to end. A wait that was for nothing leaves a thread behind until
// the holder ends, so that it is for processes that end themselves then.
func TakeWithin(path string, d time.Duration) (*Lock, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	own.Lock()
	defer own.Unlock()
	if own.locks[path] != nil {
		return nil, ErrLocked
	}
	for {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return nil, err
		}
		if err := lockWithin(f, d); err != nil {
			return nil, err
		}
		if stillAt(f, path) {
			l := &Lock{f, path}
			own.locks[path] = l
			return l, nil
		}
		f.Close() // removed by its last holder between our open and our lock
	}
}

// lockWithin locks f, or closes it: at once, or when it no longer waits for the lock.
func lockWithin(f *os.File, d time.Duration) error {
	err := request(f, unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
	if err == nil {
		return nil
	}
	if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES) {
		f.Close()
		return err
	}
	if d <= 0 {
		f.Close()
		return ErrLocked
	}
	done := make(chan error, 1)
	go func() { done <- request(f, unix.F_SETLKW, &unix.Flock_t{Type: unix.F_WRLCK}) }()
	select {
	case err := <-done:
		if err != nil {
			f.Close()
		}
		return err
	case <-time.After(d):
		go func() { <-done; f.Close() }()
		return ErrLocked
	}
}

// request is fcntl with a lock of the whole file.
func request(f *os.File, cmd int, l *unix.Flock_t) error {
	l.Whence = io.SeekStart
	for {
		err := unix.FcntlFlock(f.Fd(), cmd, l)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		return nil
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

// Release gives the lock up; the file stays.
func (l *Lock) Release() {
	own.Lock()
	defer own.Unlock()
	delete(own.locks, l.path)
	l.f.Close()
}

// Remove deletes the file and gives the lock up.
func (l *Lock) Remove() {
	os.Remove(l.path)
	l.Release()
}

// Owner returns the process id of the holder of the lock at path, or 0 when nobody holds it or there is no such file.
func Owner(path string) (int, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return 0, err
	}
	own.Lock()
	defer own.Unlock()
	if own.locks[path] != nil {
		return os.Getpid(), nil
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer f.Close()
	l := unix.Flock_t{Type: unix.F_WRLCK}
	if err := request(f, unix.F_GETLK, &l); err != nil {
		return 0, err
	}
	if l.Type == unix.F_UNLCK {
		return 0, nil
	}
	if l.Pid <= 0 {
		return 0, fmt.Errorf("%s is held by a process of another PID namespace or machine: run this where it runs", path)
	}
	return int(l.Pid), nil
}
