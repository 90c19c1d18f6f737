package pebble

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"syscall"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"knarr/store"
)

const (
	// revisionBlock is how many revisions are reserved at a time: at most that many are skipped by an unclean stop.
	revisionBlock = 10_000
	// memTableBytes is Pebble's write buffer and with it the size of a log file; there are at most memTables of them.
	memTableBytes = 2 << 20
	memTables     = 4
	// cacheBytes is Pebble's block cache: small, because the store's memory holds every object.
	cacheBytes = 1 << 20
	// maxOpenFiles bounds Pebble's open tables.
	maxOpenFiles = 64
	// maxGroup and maxGroupBytes bound what one sync makes durable.
	maxGroup      = 256
	maxGroupBytes = 1 << 20
	// maxQueue bounds the commits that wait; further callers wait for a place.
	maxQueue = 4096
)

// Options of an engine.
type Options struct {
	// Dir is the directory; made with mode 0700 when absent. One process at a time can have it open.
	Dir string
	// FS that Dir is in; nil is the disk. Tests use vfs.NewMem or vfs.NewCrashableMem.
	FS vfs.FS
	// Logger gets errors of background work; nil: nobody.
	Logger *slog.Logger
}

// Engine implements store.Engine. Give it to store.Open, which then owns it.
type Engine struct {
	dir   string
	fs    *spaceFS
	space *space
	lock  *pebble.Lock
	db    *pebble.DB
	host  store.Host

	work    chan struct{} // capacity 1: the queue is not empty, or closing
	stopped chan struct{} // closed when the committer has returned

	mu       sync.Mutex
	inflight map[string]struct{} // keys of queued and committing proposals
	settled  chan struct{}       // closed and replaced whenever keys leave inflight
	queue    []*request
	closing  bool
	broken   error // the disk failed: no more writes

	// Own to Start, then to the committer:
	revision int64 // last assigned
	reserved int64 // last reserved on disk
	dirty    bool  // the disk does not say that the stop was clean
	restart  int64 // lower end of Lossy histories: the first revision after an unclean stop, 0 after a clean one; constant after Start
}

// request is one proposal in the queue.
type request struct {
	p    *store.Proposal
	done chan struct{} // closed when published or failed
	err  error
}

// Open opens the directory, creating it if need be. Errors say what to do: the directory is in use by another process, is not writable,
// was written by a newer version, or is damaged.
func Open(ctx context.Context, o Options) (*Engine, error) {
	if o.FS == nil {
		o.FS = vfs.Default
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := o.FS.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the data directory %s: %w; choose another or change its permissions", o.Dir, err)
	}
	lock, err := pebble.LockDirectory(o.Dir, o.FS)
	switch {
	case err == nil:
	case errors.Is(err, syscall.EACCES) && !writable(o.FS, o.Dir), errors.Is(err, syscall.EROFS), errors.Is(err, syscall.EPERM):
		return nil, fmt.Errorf("the data directory %s is not writable: %w", o.Dir, err)
	case isFull(err):
		return nil, fmt.Errorf("no space left for the data directory %s: %w", o.Dir, err)
	default:
		return nil, fmt.Errorf("the data directory %s is in use by another knarr process; stop that one first (%w)", o.Dir, err)
	}
	sp := newSpace()
	e := &Engine{
		dir:      o.Dir,
		fs:       &spaceFS{FS: o.FS, space: sp},
		space:    sp,
		lock:     lock,
		work:     make(chan struct{}, 1),
		stopped:  make(chan struct{}),
		inflight: map[string]struct{}{},
		settled:  make(chan struct{}),
	}
	if e.db, err = openDB(o, e.fs, lock); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot open the database in %s: %w", o.Dir, err), lock.Close())
	}
	if err := e.readState(); err != nil {
		return nil, errors.Join(fmt.Errorf("database in %s: %w", o.Dir, err), e.db.Close(), lock.Close())
	}
	return e, nil
}

// writable tells a missing permission from a lock that another process holds: fcntl(2) may report both as EACCES.
func writable(fs vfs.FS, dir string) bool {
	name := fs.PathJoin(dir, "probe")
	f, err := fs.Create(name, vfs.WriteCategoryUnspecified)
	if err != nil {
		return false
	}
	return errors.Join(f.Close(), fs.Remove(name)) == nil
}

func openDB(o Options, fs vfs.FS, lock *pebble.Lock) (*pebble.DB, error) {
	cache := pebble.NewCache(cacheBytes)
	defer cache.Unref()
	opts := &pebble.Options{
		FS:                          fs,
		Lock:                        lock,
		Cache:                       cache,
		MemTableSize:                memTableBytes,
		MemTableStopWritesThreshold: memTables,
		MaxOpenFiles:                maxOpenFiles,
		FormatMajorVersion:          pebble.FormatColumnarBlocks, // below the one that logs sync offsets, see doc.go
		Logger:                      logger{o.Logger},
	}
	opts.Experimental.CompactionScheduler = newCompactor()
	return pebble.Open(o.Dir, opts)
}

// readState finds out where the last owner of the directory left off, and marks a new directory.
func (e *Engine) readState() error {
	name, err := e.get(keyFormat)
	if err != nil {
		return err
	}
	if name == nil {
		if err := e.db.Set([]byte(keyFormat), []byte(formatName), pebble.Sync); err != nil {
			return err
		}
	} else if string(name) != formatName {
		return fmt.Errorf("the format %q is unknown (known is %q); use the knarr version that wrote it", name, formatName)
	}
	if e.reserved, err = e.getRevision(keyReserve); err != nil {
		return err
	}
	if e.revision, err = e.getRevision(keyClean); err != nil {
		return err
	}
	if e.revision == 0 { // new, or not stopped cleanly
		e.dirty = true
		e.revision = e.reserved + 1
		e.restart = e.revision
	}
	return nil
}

// get returns a copy of a value, nil when there is none.
func (e *Engine) get(key string) ([]byte, error) {
	v, closer, err := e.db.Get([]byte(key))
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return append([]byte{}, v...), closer.Close()
}

// getRevision returns a stored revision, 0 when there is none.
func (e *Engine) getRevision(key string) (int64, error) {
	v, err := e.get(key)
	if v == nil || err != nil {
		return 0, err
	}
	return parseRevision(v)
}

// Start implements store.Engine.
func (e *Engine) Start(_ context.Context, host store.Host) (int64, error) {
	e.host = host
	rev := e.revision
	go e.run()
	return rev, nil
}

// Load implements store.Engine.
func (e *Engine) Load(ctx context.Context, prefix string, class store.Class, fn func(store.Entry) error, done func(int64)) error {
	if err := e.awaitSettled(ctx, prefix); err != nil {
		return err
	}
	history, err := e.getRevision(keyDeleted + prefix)
	if err != nil {
		return err
	}
	if class == store.Lossy {
		history = max(history, e.restart)
	}
	upper := []byte(prefix)
	upper[len(upper)-1]++ // a prefix ends in a slash
	it, err := e.db.NewIterWithContext(ctx, &pebble.IterOptions{LowerBound: []byte(prefix), UpperBound: upper})
	if err != nil {
		return err
	}
	for ok := it.First(); ok; ok = it.Next() {
		entry, err := loadEntry(it)
		if err == nil {
			err = ctx.Err()
		}
		if err == nil {
			err = fn(entry)
		}
		if err != nil {
			return errors.Join(err, it.Close())
		}
		history = max(history, entry.Revision)
	}
	if err := it.Close(); err != nil {
		return err
	}
	done(history)
	return nil
}

// awaitSettled waits until no write under the prefix is under way: one that Commit gave up because of a full disk may still be.
func (e *Engine) awaitSettled(ctx context.Context, prefix string) error {
	for {
		e.mu.Lock()
		busy := false
		for key := range e.inflight {
			busy = busy || strings.HasPrefix(key, prefix)
		}
		wait := e.settled
		e.mu.Unlock()
		if !busy {
			return nil
		}
		becomesFull, full := e.space.state()
		if full != nil {
			return unavailable(full)
		}
		select {
		case <-wait:
		case <-becomesFull:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func loadEntry(it *pebble.Iterator) (store.Entry, error) {
	key := string(it.Key())
	value, err := it.ValueAndErr()
	if err != nil {
		return store.Entry{}, err
	}
	e, err := parseValue(key, value)
	if err != nil {
		return e, &store.CorruptError{Key: key, Err: err}
	}
	return e, nil
}

// Close implements store.Engine. With a full disk it cannot finish what is under way: it then leaves everything as a crash would, which loses
// nothing that was acknowledged, and says so.
func (e *Engine) Close() error {
	e.mu.Lock()
	if e.closing {
		e.mu.Unlock()
		return nil
	}
	e.closing = true
	e.mu.Unlock()
	if e.host != nil {
		e.signal()
		if err := e.awaitCommitter(); err != nil {
			return err
		}
	}
	return e.closeDB()
}

func (e *Engine) awaitCommitter() error {
	becomesFull, full := e.space.state()
	if full == nil {
		select {
		case <-e.stopped:
			return nil
		case <-becomesFull:
			_, full = e.space.state()
		}
	}
	return e.abandon(full)
}

// abandon stops all writing and gives the directory away. What the database was doing is held for good.
func (e *Engine) abandon(why error) error {
	close(e.space.abandon)
	// One reference to the lock is ours, one the database's, which can no longer be closed.
	return errors.Join(fmt.Errorf("stopped with a full disk, what was acknowledged is safe: %w", why), e.lock.Close(), e.lock.Close())
}

func (e *Engine) closeDB() error {
	result := make(chan error, 1)
	go func() { result <- e.finish() }()
	becomesFull, full := e.space.state()
	if full == nil {
		select {
		case err := <-result:
			return err
		case <-becomesFull:
			_, full = e.space.state()
		}
	}
	return e.abandon(full)
}

// finish notes the clean stop and closes the database.
func (e *Engine) finish() error {
	var err error
	if e.dirty && e.broken == nil && e.host != nil {
		err = e.db.Set([]byte(keyClean), revisionBytes(e.revision), pebble.Sync)
	}
	return errors.Join(err, e.db.Close(), e.lock.Close())
}

// logger passes Pebble's errors on.
type logger struct{ to *slog.Logger }

// Infof implements pebble.Logger.
func (logger) Infof(string, ...any) {}

// Errorf implements pebble.Logger.
func (l logger) Errorf(format string, args ...any) {
	if l.to != nil {
		l.to.Error("database", "error", fmt.Sprintf(format, args...))
	}
}

// Fatalf implements pebble.Logger: Pebble cannot go on, and must not be returned to. Everything acknowledged is on the disk.
func (l logger) Fatalf(format string, args ...any) {
	msg := fmt.Sprintf(format, args...)
	if l.to != nil {
		l.to.Error("database failed, stopping", "error", msg)
	}
	panic("the database failed, acknowledged data is safe, check the disk and restart: " + msg)
}
