package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/snapshots/native"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/platforms"
	"github.com/sirupsen/logrus"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

const (
	// namespace is the one namespace of the metadata database that knarr uses.
	namespace = "knarr"
	// maxConcurrentLayers bounds the blobs that one pull downloads at the same time.
	maxConcurrentLayers = 3
	// dbLockTimeout bounds the wait for bbolt's own file lock. The store's lock is taken first, so it is free.
	dbLockTimeout = 2 * time.Second
)

// Options says how to open a Store.
type Options struct {
	// Root is the directory of the store, created with mode 0700 where missing. Required.
	Root string
	// SharedContent is a directory in which the nodes of one machine share blobs by hard links; it must be on the file
	// system of Root. Empty: nothing is shared. On another file system sharing has no effect.
	SharedContent string
	// RegistryConfigPath is a directory with a directory for each registry whose images come from mirrors, in containerd's form
	// (<host>/hosts.toml, _default/hosts.toml; see docs/registries.md). It is read at each pull, and may be missing. Empty, or
	// for a registry that has no directory: by HTTPS from the registry in the image's name (a loopback one: HTTPS, then HTTP).
	RegistryConfigPath string
	// Resolver looks up registries. Nil: that of the system.
	Resolver *net.Resolver
	// ImportedWhenUnreachable makes Pull answer with the imported image of that name when its registry cannot be reached,
	// so that imagePullPolicy Always (and a tag "latest") works for loaded images on a machine without a network.
	ImportedWhenUnreachable bool
	// ForceNative makes a new store use full copies in place of overlay mounts. A store that exists keeps its kind.
	ForceNative bool
}

// Store is the image store of a node. All of its methods may be called concurrently. One process at a time has a
// store open.
type Store struct {
	opts     Options
	platform platforms.MatchComparer

	lock    *os.File
	bdb     *bolt.DB
	db      *metadata.DB
	snap    snapshots.Snapshotter // through db
	backing snapshots.Snapshotter // below db
	kind    string                // "overlayfs" or "native"
	content content.Store         // through db
	opened  bool                  // Open succeeded: Close is a clean stop
	unclean bool                  // the last process that had the store open did not close it
	images  images.Store
	leases  leases.Manager
	blobs   *sharedStore // below db

	index   index
	naming  sync.Mutex // held while names are given or taken to content that no lease protects
	collect collector
	keys    keyedMutex // one unpack per layer chain, one download per blob
	pulls   flightGroup

	ctx       context.Context // ends with Close, and with it the calls that write
	cancel    context.CancelFunc
	recovered chan struct{} // closed when the remains of a killed process are gone; whatever writes waits for it

	closing sync.Mutex
	closed  bool           // guarded by closing
	wg      sync.WaitGroup // calls that write, and recovery; Add under closing
}

// Open opens the store in o.Root, creating it where it does not exist. It fails with "in use by another process" when
// another process has the store open. Leases and half-done work of a process that was killed are removed, in the background.
func Open(ctx context.Context, o Options) (*Store, error) {
	if o.Root == "" {
		return nil, errors.New("image store: Root is not set")
	}
	s := &Store{opts: o, platform: platforms.Default(), recovered: make(chan struct{})}
	s.ctx, s.cancel = context.WithCancel(s.background())
	if err := s.open(ctx); err != nil {
		s.closeFiles()
		s.cancel()
		return nil, fmt.Errorf("image store %s: %w", o.Root, err)
	}
	s.opened = true
	return s, nil
}

func (s *Store) open(ctx context.Context) error {
	ctx = s.scope(ctx)
	if err := os.MkdirAll(s.opts.Root, 0o700); err != nil {
		return err
	}
	if err := s.takeLock(); err != nil {
		return err
	}
	if _, err := os.Stat(s.path("running")); err == nil {
		s.unclean = true
	}
	if err := s.openBlobs(); err != nil {
		return err
	}
	if err := s.openSnapshotter(); err != nil {
		return err
	}
	var err error
	s.bdb, err = bolt.Open(s.path("meta.db"), 0o600, &bolt.Options{Timeout: dbLockTimeout, NoFreelistSync: true, FreelistType: bolt.FreelistMapType})
	if err != nil {
		return fmt.Errorf("meta.db: %w", err)
	}
	s.db = metadata.NewDB(s.bdb, s.blobs, map[string]snapshots.Snapshotter{s.kind: s.backing})
	if err := s.db.Init(ctx); err != nil {
		return fmt.Errorf("meta.db: %w", err)
	}
	s.content = s.db.ContentStore()
	s.snap = s.db.Snapshotter(s.kind)
	s.images = metadata.NewImageStore(s.db)
	s.leases = metadata.NewLeaseManager(s.db)
	s.collect.run = s.collectGarbage
	if err := s.loadIndex(ctx); err != nil {
		return err
	}
	return s.markRunning(ctx)
}

// takeLock makes this process the only one that has the store open. The kernel drops the lock when the process dies.
func (s *Store) takeLock() error {
	f, err := os.OpenFile(s.path("lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return errors.New("in use by another process; stop that one first (knarr down)")
		}
		return fmt.Errorf("lock: %w", err)
	}
	s.lock = f
	return nil
}

func (s *Store) openBlobs() error {
	inner, err := local.NewLabeledStore(s.path("content"), nil)
	if err != nil {
		return fmt.Errorf("content: %w", err)
	}
	s.blobs, err = newSharedStore(inner, s.path("content"), s.opts.SharedContent)
	return err
}

// openSnapshotter opens the snapshotter that the store was made with; for a new store it tries an overlay mount once.
func (s *Store) openSnapshotter() error {
	overlayRoot, nativeRoot := s.path("overlay"), s.path("native")
	_, haveOverlay := os.Stat(overlayRoot)
	_, haveNative := os.Stat(nativeRoot)
	for _, root := range []string{overlayRoot, nativeRoot} {
		if err := s.dropOrphanSnapshots(root); err != nil {
			return fmt.Errorf("snapshots: %w", err)
		}
	}
	useNative := haveOverlay != nil && (haveNative == nil || s.opts.ForceNative || overlayutils.Supported(s.opts.Root) != nil)
	var err error
	if useNative {
		s.kind = "native"
		s.backing, err = native.NewSnapshotter(nativeRoot)
	} else {
		s.kind = "overlayfs"
		s.backing, err = overlay.NewSnapshotter(overlayRoot, overlay.AsynchronousRemove)
	}
	if err != nil {
		return fmt.Errorf("snapshots: %w", err)
	}
	return nil
}

// dropOrphanSnapshots removes directories that a killed process made for snapshots which it did not come to record. The
// snapshotter would fail on them, as it gives their numbers to other snapshots.
func (s *Store) dropOrphanSnapshots(root string) error {
	dirs, err := os.ReadDir(filepath.Join(root, "snapshots"))
	if !s.unclean || errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	ms, err := storage.NewMetaStore(filepath.Join(root, "metadata.db"))
	if err != nil {
		return err
	}
	defer ms.Close()
	var known map[string]string
	err = ms.WithTransaction(s.background(), false, func(ctx context.Context) (err error) {
		known, err = storage.IDMap(ctx)
		return err
	})
	if err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	for _, d := range dirs {
		if _, ok := known[d.Name()]; ok {
			continue
		}
		if err := os.RemoveAll(filepath.Join(root, "snapshots", d.Name())); err != nil {
			return err
		}
	}
	return nil
}

// markRunning leaves a mark for the next Open and, where the last process left one, cleans up behind that process.
func (s *Store) markRunning(ctx context.Context) error {
	if s.unclean {
		if err := s.blobs.dropTornIngests(); err != nil {
			return err
		}
		stale, err := s.leases.List(ctx)
		if err != nil {
			return fmt.Errorf("leases: %w", err)
		}
		for _, l := range stale {
			if err := s.leases.Delete(ctx, l); err != nil {
				return fmt.Errorf("lease %s: %w", l.ID, err)
			}
		}
		s.wg.Add(1)
		go func() {
			defer s.wg.Done()
			defer close(s.recovered)
			if err := s.recover(s.ctx); err != nil && s.ctx.Err() == nil {
				slog.Warn("image store: cleaning up after an unclean stop failed; the disk space is freed at the next removal of an image", "root", s.opts.Root, "error", err)
			}
		}()
		return nil
	}
	close(s.recovered)
	f, err := os.OpenFile(s.path("running"), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

// Close ends the calls that write, waits for them (an Import until its reader returns), and closes the databases. Later
// calls fail. A second Close does nothing.
func (s *Store) Close() error {
	s.closing.Lock()
	again := s.closed
	s.closed = true
	s.closing.Unlock()
	if again {
		return nil
	}
	s.cancel()
	s.pulls.close()
	s.wg.Wait()
	return s.closeFiles()
}

func (s *Store) closeFiles() error {
	var errs []error
	if s.backing != nil {
		errs = append(errs, s.backing.Close())
	}
	if s.bdb != nil {
		errs = append(errs, s.bdb.Close())
	}
	if s.lock != nil {
		if s.opened {
			errs = append(errs, os.Remove(s.path("running")))
		}
		errs = append(errs, s.lock.Close())
	}
	return errors.Join(errs...)
}

func (s *Store) path(name string) string { return filepath.Join(s.opts.Root, name) }

// Root returns the directory of the store.
func (s *Store) Root() string { return s.opts.Root }

// scope gives ctx the namespace of the database and a logger that drops the libraries' chatter: what matters is
// returned as an error.
func (s *Store) scope(ctx context.Context) context.Context {
	return log.WithLogger(namespaces.WithNamespace(ctx, namespace), quietLog())
}

// begin is scope for calls that write: the remains of a killed process must be gone first, as they could be in the way,
// and Close waits until end is called.
func (s *Store) begin(ctx context.Context) (_ context.Context, end func(), err error) {
	s.closing.Lock()
	if s.closed {
		s.closing.Unlock()
		return nil, nil, errClosed
	}
	s.wg.Add(1)
	s.closing.Unlock()
	ctx, cancel := context.WithCancelCause(s.scope(ctx))
	stop := context.AfterFunc(s.ctx, func() { cancel(errClosed) })
	end = func() {
		stop()
		cancel(nil)
		s.wg.Done()
	}
	select {
	case <-s.recovered:
		return ctx, end, nil
	case <-ctx.Done():
		end()
		return nil, nil, context.Cause(ctx)
	}
}

// QuietLibraries sets the process-wide logger that containerd's libraries use outside of any request to errors only.
// Programs call it once at their start; without it, Open prints a warning where the file system lacks fs-verity.
func QuietLibraries() { log.L.Logger.SetLevel(logrus.ErrorLevel) }

func (s *Store) background() context.Context { return s.scope(context.Background()) }

func quietLog() *log.Entry {
	l := logrus.New()
	l.SetOutput(io.Discard)
	l.SetLevel(logrus.PanicLevel)
	return logrus.NewEntry(l)
}

// withLease returns a context under which everything that is written stays until done is called.
func (s *Store) withLease(ctx context.Context) (_ context.Context, done func(), err error) {
	l, err := s.leases.Create(ctx, leases.WithRandomID())
	if err != nil {
		return nil, nil, fmt.Errorf("lease: %w", err)
	}
	done = func() {
		// A failure leaves a lease that the next Open deletes.
		_ = s.leases.Delete(context.WithoutCancel(ctx), l)
	}
	return leases.WithLease(ctx, l.ID), done, nil
}
