package pebble

import (
	"errors"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// spaceRetry is the pause before an operation that found the disk full is tried again.
const spaceRetry = 500 * time.Millisecond

func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// space is the state of the disk: full or not.
type space struct {
	mu      sync.Mutex
	held    int           // operations that wait for space
	err     error         // of the newest of them
	full    chan struct{} // closed while held > 0
	abandon chan struct{} // closed: held operations are to be held for good
}

func newSpace() *space {
	return &space{full: make(chan struct{}), abandon: make(chan struct{})}
}

// state returns the error of a full disk, or nil and a channel that is closed when the disk becomes full.
func (s *space) state() (becomesFull <-chan struct{}, full error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held > 0 {
		return nil, s.err
	}
	return s.full, nil
}

// do runs an operation, again and again while there is no space for it.
func (s *space) do(op func() error) error {
	select {
	case <-s.abandon:
		select {} // another process may own the directory by now
	default:
	}
	err := op()
	if !isFull(err) {
		return err
	}
	s.hold(err)
	defer s.release()
	for {
		select {
		case <-time.After(spaceRetry):
		case <-s.abandon:
			select {}
		}
		if err = op(); !isFull(err) {
			return err
		}
	}
}

func (s *space) hold(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held++
	s.err = err
	if s.held == 1 {
		close(s.full)
	}
}

func (s *space) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held--
	if s.held == 0 {
		s.full, s.err = make(chan struct{}), nil
	}
}

// spaceFS is a file system whose writing operations wait for space, and whose log files can skip a sync.
type spaceFS struct {
	vfs.FS
	space *space
	// skipSync is set while a batch is committed that need not be synced.
	skipSync atomic.Bool
}

// Unwrap implements vfs.FS.
func (fs *spaceFS) Unwrap() vfs.FS { return fs.FS }

func (fs *spaceFS) wrap(name string, open func() (vfs.File, error)) (f vfs.File, err error) {
	err = fs.space.do(func() error { f, err = open(); return err })
	if err != nil {
		return nil, err
	}
	sf := spaceFile{File: f, space: fs.space}
	if strings.HasSuffix(name, ".log") {
		return &walFile{spaceFile: sf, skip: &fs.skipSync}, nil
	}
	return &sf, nil
}

// Create implements vfs.FS.
func (fs *spaceFS) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	return fs.wrap(name, func() (vfs.File, error) { return fs.FS.Create(name, c) })
}

// OpenReadWrite implements vfs.FS.
func (fs *spaceFS) OpenReadWrite(name string, c vfs.DiskWriteCategory, opts ...vfs.OpenOption) (vfs.File, error) {
	return fs.wrap(name, func() (vfs.File, error) { return fs.FS.OpenReadWrite(name, c, opts...) })
}

// ReuseForWrite implements vfs.FS.
func (fs *spaceFS) ReuseForWrite(oldname, newname string, c vfs.DiskWriteCategory) (vfs.File, error) {
	return fs.wrap(newname, func() (vfs.File, error) { return fs.FS.ReuseForWrite(oldname, newname, c) })
}

// Link implements vfs.FS.
func (fs *spaceFS) Link(oldname, newname string) error {
	return fs.space.do(func() error { return fs.FS.Link(oldname, newname) })
}

// Rename implements vfs.FS.
func (fs *spaceFS) Rename(oldname, newname string) error {
	return fs.space.do(func() error { return fs.FS.Rename(oldname, newname) })
}

// MkdirAll implements vfs.FS.
func (fs *spaceFS) MkdirAll(dir string, perm os.FileMode) error {
	return fs.space.do(func() error { return fs.FS.MkdirAll(dir, perm) })
}

// spaceFile is a file whose writes wait for space.
type spaceFile struct {
	vfs.File
	space *space
}

// Write implements vfs.File. What a full disk took of p is not written again.
func (f *spaceFile) Write(p []byte) (n int, err error) {
	err = f.space.do(func() error {
		m, err := f.File.Write(p[n:])
		n += m
		return err
	})
	return n, err
}

// WriteAt implements vfs.File.
func (f *spaceFile) WriteAt(p []byte, off int64) (n int, err error) {
	err = f.space.do(func() error {
		m, err := f.File.WriteAt(p[n:], off+int64(n))
		n += m
		return err
	})
	return n, err
}

// walFile is a log file: it skips syncs while skip is set, and never closes without the one it owes.
type walFile struct {
	spaceFile
	skip *atomic.Bool
	owes atomic.Bool
}

// Sync implements vfs.File.
func (f *walFile) Sync() error { return f.sync(f.File.Sync) }

// SyncData implements vfs.File.
func (f *walFile) SyncData() error { return f.sync(f.File.SyncData) }

func (f *walFile) sync(do func() error) error {
	if f.skip.Load() {
		f.owes.Store(true)
		return nil
	}
	if err := do(); err != nil {
		return err
	}
	f.owes.Store(false)
	return nil
}

// Close implements vfs.File.
func (f *walFile) Close() error {
	var err error
	if f.owes.Load() {
		err = f.File.SyncData()
	}
	return errors.Join(err, f.File.Close())
}
