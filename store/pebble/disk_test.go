package pebble_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	raw "github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"knarr/store"
	"knarr/store/pebble"
	"knarr/store/storetest"
)

// open opens a store with the table of pods in a directory.
func open(t testing.TB, o pebble.Options, class store.Class) (*store.Store, *store.Table) {
	t.Helper()
	engine, err := pebble.Open(t.Context(), o)
	require.NoError(t, err)
	s, err := store.Open(t.Context(), store.Options{Engine: engine, Debug: true})
	require.NoError(t, err)
	tab, err := s.OpenTable(t.Context(), store.TableOptions{Prefix: storetest.Pods, Codec: storetest.Codec{}, Class: class})
	require.NoError(t, err)
	return s, tab
}

func put(s *store.Store, tab *store.Table, name, content string, ttl time.Duration) (*store.Record, error) {
	key, expect := tab.Prefix()+name, int64(0)
	if r := tab.Get(key); r != nil {
		expect = r.Revision
	}
	out, err := s.Txn(context.Background(), store.Op{Table: tab, Key: key, Object: storetest.Object(name, content), Expect: expect, TTL: ttl})
	if err != nil {
		return nil, err
	}
	return out[0], nil
}

// TestFormat reads the directory without our code and compares with FORMAT.md.
func TestFormat(t *testing.T) {
	dir := t.TempDir() + "/db"
	s, tab := open(t, pebble.Options{Dir: dir}, store.Durable)
	first, err := put(s, tab, "a", "one", 0)
	require.NoError(t, err)
	second, err := put(s, tab, "a", "two", time.Hour)
	require.NoError(t, err)
	gone, err := put(s, tab, "b", "", 0)
	require.NoError(t, err)
	out, err := s.Txn(t.Context(), store.Op{Table: tab, Key: gone.Key, Expect: gone.Revision})
	require.NoError(t, err)
	require.NoError(t, s.Close())

	info, err := os.Stat(dir)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o700), info.Mode().Perm())
	db, err := raw.Open(dir, &raw.Options{ReadOnly: true, Logger: quiet{}})
	require.NoError(t, err)
	defer db.Close()
	got := map[string][]byte{}
	it, err := db.NewIter(nil)
	require.NoError(t, err)
	for ok := it.First(); ok; ok = it.Next() {
		got[string(it.Key())] = append([]byte{}, it.Value()...)
	}
	require.NoError(t, it.Close())
	be := func(n int64) []byte { return binary.BigEndian.AppendUint64(nil, uint64(n)) }
	value := append([]byte{1}, be(first.Revision)...)
	value = append(value, be(second.Revision)...)
	value = append(value, be(second.Expires.UnixNano())...)
	encoded, err := storetest.Codec{}.Encode(t.Context(), "", storetest.Object("a", "two"))
	require.NoError(t, err)
	require.Equal(t, map[string][]byte{
		"\x00format":                   []byte("knarr store 1"),
		"\x00reserved":                 be(2 + 10_000),
		"\x00clean":                    be(out[0].Revision),
		"\x00deleted" + storetest.Pods: be(out[0].Revision),
		"/registry/pods/a":             append(value, encoded...),
	}, got)
}

func TestUnknownFormat(t *testing.T) {
	dir := t.TempDir()
	db, err := raw.Open(dir, &raw.Options{FormatMajorVersion: raw.FormatColumnarBlocks, Logger: quiet{}})
	require.NoError(t, err)
	require.NoError(t, db.Set([]byte("\x00format"), []byte("knarr store 2"), raw.Sync))
	require.NoError(t, db.Close())
	_, err = pebble.Open(t.Context(), pebble.Options{Dir: dir})
	require.ErrorContains(t, err, "use the knarr version that wrote it")
	_, err = pebble.Open(t.Context(), pebble.Options{Dir: dir})
	require.ErrorContains(t, err, "use the knarr version that wrote it", "the first failure must give the lock back")
}

func TestSecondProcess(t *testing.T) {
	dir := t.TempDir() + "/db"
	s, _ := open(t, pebble.Options{Dir: dir}, store.Durable)
	_, err := pebble.Open(t.Context(), pebble.Options{Dir: dir})
	require.ErrorContains(t, err, "in use by another knarr process")
	out, err := storetest.StartChild("open", dir).CombinedOutput()
	require.Error(t, err)
	require.Contains(t, string(out), "in use by another knarr process")
	require.NoError(t, s.Close())
	out, err = storetest.StartChild("open", dir).CombinedOutput()
	require.NoError(t, err, string(out))
	require.Equal(t, "ok\n", string(out))
}

// TestNotWritable runs a child as an ordinary user: for root every directory is writable.
func TestNotWritable(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to become somebody else")
	}
	base, err := os.MkdirTemp("", "knarr-store-") // t.TempDir lies below a directory closed to others
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(base) })
	require.NoError(t, os.Chmod(base, 0o755))
	binary := filepath.Join(base, "test")
	data, err := os.ReadFile(os.Args[0])
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(binary, data, 0o755))
	require.NoError(t, os.Mkdir(base+"/foreign", 0o755))
	for dir, want := range map[string]string{
		base + "/foreign":     "is not writable",
		base + "/foreign/new": "cannot make the data directory",
		binary + "/db":        "cannot make the data directory",
	} {
		cmd := storetest.StartChild("open", dir)
		cmd.Path = binary
		cmd.Dir = base
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		require.Error(t, err)
		require.Contains(t, string(out), want)
		require.Contains(t, string(out), dir)
	}
}

// disk is a disk that can be filled.
type disk struct {
	options    pebble.Options
	fill, free func()
}

// injectedDisk says ENOSPC to every write while it is full.
func injectedDisk(*testing.T) disk {
	var full atomic.Bool
	inject := errorfs.InjectorFunc(func(op errorfs.Op) error {
		if full.Load() && op.Kind.ReadOrWrite() == errorfs.OpIsWrite && op.Kind != errorfs.OpFileSyncData {
			return syscall.ENOSPC
		}
		return nil
	})
	return disk{
		options: pebble.Options{Dir: "/db", FS: errorfs.Wrap(vfs.NewMem(), inject)},
		fill:    func() { full.Store(true) },
		free:    func() { full.Store(false) },
	}
}

// tmpfsDisk is a small real file system with a file that fills it.
func tmpfsDisk(t *testing.T) disk {
	if os.Getuid() != 0 {
		t.Skip("needs root to mount")
	}
	dir := t.TempDir()
	require.NoError(t, syscall.Mount("knarr-store-test", dir, "tmpfs", 0, "size=24m"))
	t.Cleanup(func() { require.NoError(t, syscall.Unmount(dir, syscall.MNT_DETACH)) })
	ballast := dir + "/ballast"
	return disk{
		options: pebble.Options{Dir: dir + "/db"},
		fill: func() {
			f, err := os.Create(ballast)
			require.NoError(t, err)
			defer f.Close()
			block := make([]byte, 4096)
			for err == nil {
				_, err = f.Write(block)
			}
			require.ErrorIs(t, err, syscall.ENOSPC)
		},
		free: func() { require.NoError(t, os.Remove(ballast)) },
	}
}

func TestDiskFull(t *testing.T) {
	for name, make := range map[string]func(*testing.T) disk{"injected": injectedDisk, "tmpfs": tmpfsDisk} {
		t.Run(name, func(t *testing.T) { testDiskFull(t, make(t)) })
	}
}

func testDiskFull(t *testing.T, d disk) {
	s, tab := open(t, d.options, store.Durable)
	acked := map[string]string{}
	n := 0
	write := func() error {
		n++
		name, content := fmt.Sprint("k", n%50), fmt.Sprint(n, strings.Repeat("x", 50_000))
		_, err := put(s, tab, name, content, 0)
		if err == nil {
			acked[name] = content
		}
		return err
	}
	var unavailable *store.UnavailableError
	for round := range 3 {
		for range 20 {
			require.NoError(t, write())
		}
		d.fill()
		var err error
		for err = write(); err == nil; err = write() {
			require.Less(t, n, 10_000, "the full disk takes everything")
		}
		require.ErrorAs(t, err, &unavailable)
		require.ErrorContains(t, err, "disk is full")
		require.ErrorContains(t, s.Check(t.Context()), "disk is full")
		unknown := fmt.Sprint("k", n%50)
		delete(acked, unknown)
		began := time.Now()
		require.ErrorAs(t, write(), &unavailable)
		require.Less(t, time.Since(began), time.Second, "a write to a full disk is refused at once")
		for name, content := range acked {
			require.Equal(t, content, storetest.Content(tab.Get(tab.Prefix()+name)), "reads go on")
		}
		d.free()
		require.Eventually(t, func() bool { return write() == nil }, 10*time.Second, 10*time.Millisecond, "round %d", round)
		require.NoError(t, s.Check(t.Context()))
	}
	before := contents(tab)
	require.NoError(t, s.Close())
	s, tab = open(t, d.options, store.Durable)
	require.Equal(t, before, contents(tab))
	for name, content := range acked {
		require.Equal(t, content, storetest.Content(tab.Get(tab.Prefix()+name)))
	}
	require.NoError(t, s.Close())
}

func contents(tab *store.Table) map[string]string {
	out := map[string]string{}
	tab.Snapshot().Ascend("", "", func(r *store.Record) bool {
		out[r.Key] = fmt.Sprint(r.Revision, storetest.Content(r))
		return true
	})
	return out
}

// TestDiskError lets the disk fail in another way: no more writes, nothing acknowledged is lost.
func TestDiskError(t *testing.T) {
	var broken atomic.Bool
	inject := errorfs.InjectorFunc(func(op errorfs.Op) error {
		if broken.Load() && (op.Kind == errorfs.OpFileSyncData || op.Kind == errorfs.OpFileSync) {
			return syscall.EIO
		}
		return nil
	})
	mem := vfs.NewCrashableMem()
	s, tab := open(t, pebble.Options{Dir: "/db", FS: errorfs.Wrap(mem, inject)}, store.Durable)
	acked, err := put(s, tab, "a", "one", 0)
	require.NoError(t, err)
	broken.Store(true)
	for range 2 {
		_, err = put(s, tab, "a", "two", 0)
		var unavailable *store.UnavailableError
		require.ErrorAs(t, err, &unavailable)
		require.ErrorContains(t, err, "check it and restart")
	}
	require.ErrorContains(t, s.Check(t.Context()), "check it and restart")
	require.Equal(t, acked, tab.Get(acked.Key))
	clone := mem.CrashClone(vfs.CrashCloneCfg{})
	broken.Store(false)
	_ = s.Close() // may report the disk's error again
	s, tab = open(t, pebble.Options{Dir: "/db", FS: clone}, store.Durable)
	require.Equal(t, acked.Revision, tab.Get(acked.Key).Revision)
	require.NoError(t, s.Close())
}

// TestIdle checks that a store that nobody writes to leaves the disk alone, and that opening and closing does not pile anything up.
func TestIdle(t *testing.T) {
	var writes atomic.Int64
	inject := errorfs.InjectorFunc(func(op errorfs.Op) error {
		if op.Kind.ReadOrWrite() == errorfs.OpIsWrite {
			writes.Add(1)
		}
		return nil
	})
	s, tab := open(t, pebble.Options{Dir: "/db", FS: errorfs.Wrap(vfs.NewMem(), inject)}, store.Durable)
	_, err := put(s, tab, "a", "one", 0)
	require.NoError(t, err)
	before := writes.Load()
	require.Never(t, func() bool { return writes.Load() != before }, 300*time.Millisecond, 20*time.Millisecond)
	require.NoError(t, s.Close())
}

// TestGather has as many writers at once as a busy API server, each of which computes a little before it writes: a sync is to make the writes
// of several of them safe, also where it takes no time.
func TestGather(t *testing.T) {
	const writers, each, perSync = 32, 50, 4
	var syncs atomic.Int64
	inject := errorfs.InjectorFunc(func(op errorfs.Op) error {
		if op.Kind == errorfs.OpFileSyncData || op.Kind == errorfs.OpFileSync {
			syncs.Add(1)
		}
		return nil
	})
	s, tab := open(t, pebble.Options{Dir: "/db", FS: errorfs.Wrap(vfs.NewMem(), inject)}, store.Durable)
	before := syncs.Load()
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				_, err := put(s, tab, fmt.Sprint("w", w), strings.Repeat("x", 2000+i), 0)
				assert.NoError(t, err)
			}
		})
	}
	wg.Wait()
	made := syncs.Load() - before
	t.Logf("%d syncs for %d writes", made, writers*each)
	require.Less(t, made, int64(writers*each/perSync))
	require.NoError(t, s.Close())
}

// TestDiskBound overwrites little data many times.
func TestDiskBound(t *testing.T) {
	dir := t.TempDir() + "/db"
	s, tab := open(t, pebble.Options{Dir: dir}, store.Lossy)
	const live, bound = 1 << 20, 24 << 20
	most := int64(0)
	for i := range 4000 { // 80 MB in all
		_, err := put(s, tab, fmt.Sprint("k", i%50), strings.Repeat("x", live/50), 0)
		require.NoError(t, err)
		if i%500 == 0 {
			most = max(most, usage(t, dir))
		}
	}
	require.NoError(t, s.Close())
	most = max(most, usage(t, dir))
	t.Logf("%d bytes of disk at most for %d of live data", most, live)
	require.Less(t, most, int64(bound))
}

func usage(t *testing.T, dir string) (bytes int64) {
	require.NoError(t, filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if info, err := d.Info(); err == nil {
			bytes += info.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return nil
	}))
	return bytes
}

// TestCloseFull closes on a full disk: at once, with an error, and the data is there afterwards. What was under way is held for good, so
// this is for a process of its own.
func TestCloseFull(t *testing.T) {
	cmd := exec.Command(os.Args[0], "-test.run=^TestCloseFullChild$", "-test.v")
	cmd.Env = append(os.Environ(), closeFullRole+"=1")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
	require.Contains(t, string(out), "--- PASS: TestCloseFullChild")
}

const closeFullRole = "KNARR_PEBBLE_CLOSE_FULL"

func TestCloseFullChild(t *testing.T) {
	if os.Getenv(closeFullRole) == "" {
		t.Skip("runs within TestCloseFull")
	}
	d := injectedDisk(t)
	s, tab := open(t, d.options, store.Durable)
	acked, err := put(s, tab, "a", "one", 0)
	require.NoError(t, err)
	d.fill()
	_, err = put(s, tab, "a", "two", 0)
	require.Error(t, err)
	began := time.Now()
	require.ErrorContains(t, s.Close(), "what was acknowledged is safe")
	require.Less(t, time.Since(began), 5*time.Second)
	d.free()
	s, tab = open(t, d.options, store.Durable)
	require.GreaterOrEqual(t, tab.Get(acked.Key).Revision, acked.Revision)
	require.NoError(t, s.Close())
}

// quiet is a raw.Logger.
type quiet struct{}

func (quiet) Infof(string, ...any)           {}
func (quiet) Errorf(string, ...any)          {}
func (quiet) Fatalf(format string, a ...any) { panic(fmt.Sprintf(format, a...)) }
