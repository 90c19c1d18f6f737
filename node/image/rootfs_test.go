package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// importNoise imports an image of one layer with size random bytes of the seed.
func importNoise(t testing.TB, s *Store, ref string, seed uint64, size int) (id string) {
	t.Helper()
	img := imageOf(t, layerOf(t, file{"data", noise(seed, size), 0o644}))
	_, err := s.Import(context.Background(), bytes.NewReader(dockerSave(t, img, ref)))
	require.NoError(t, err)
	return imageID(t, img)
}

// storeUse is what blobs and snapshots take, in bytes.
func storeUse(t testing.TB, s *Store) int64 {
	t.Helper()
	blobs, _ := diskUse(t, s.path("content"))
	snaps, _ := diskUse(t, s.path("overlay/snapshots"))
	return blobs + snaps
}

func TestRootfs(t *testing.T) {
	s := openStore(t, Options{})
	importNoise(t, s, "a:1", 1, 1000)
	_, err := s.NewRootfs(t.Context(), "", "a:1")
	require.True(t, errdefs.IsInvalidArgument(err))
	_, err = s.NewRootfs(t.Context(), "c1", "b:1")
	require.True(t, errdefs.IsNotFound(err), "%v", err)

	withRootfs(t, s, "c1", "a:1", func(dir string) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, "written"), make([]byte, 100_000), 0o644))
	})
	first, err := s.NewRootfs(t.Context(), "c1", "a:1")
	require.NoError(t, err)
	u, err := s.Usage(t.Context(), "c1")
	require.NoError(t, err)
	require.Greater(t, u.Size, int64(100_000))
	all, err := s.DiskUsage(t.Context())
	require.NoError(t, err)
	require.Equal(t, u.Size, all.Writable.Size)
	require.Greater(t, all.Layers.Size, int64(1000))
	require.Greater(t, all.Blobs, int64(1000))

	s = reopen(t, s)
	again, err := s.NewRootfs(t.Context(), "c1", "moved-meanwhile:1")
	require.NoError(t, err)
	require.Equal(t, first, again, "idempotent, also after a restart")
	withRootfs(t, s, "c1", "a:1", func(dir string) {
		require.FileExists(t, filepath.Join(dir, "written"))
	})
	withRootfs(t, s, "c2", "a:1", func(dir string) {
		require.NoFileExists(t, filepath.Join(dir, "written"), "containers do not see each other's files")
	})
	ids, err := s.Rootfs(t.Context())
	require.NoError(t, err)
	require.ElementsMatch(t, []string{"c1", "c2"}, ids)

	before := storeUse(t, s)
	require.NoError(t, s.RemoveRootfs(t.Context(), "c1"))
	require.NoError(t, s.RemoveRootfs(t.Context(), "c1"), "removing what is gone")
	require.LessOrEqual(t, storeUse(t, s), before-100_000, "space is free")
	_, err = s.Usage(t.Context(), "c1")
	require.True(t, errdefs.IsNotFound(err), "%v", err)
}

func TestView(t *testing.T) {
	s := openStore(t, Options{})
	importNoise(t, s, "a:1", 1, 1000)
	mounts, err := s.NewView(t.Context(), "v", "a:1")
	require.NoError(t, err)
	dir := t.TempDir()
	require.NoError(t, mount.All(mounts, dir))
	require.FileExists(t, filepath.Join(dir, "data"))
	require.ErrorIs(t, os.WriteFile(filepath.Join(dir, "x"), nil, 0o644), unix.EROFS)
	require.NoError(t, mount.UnmountAll(dir, 0))
	again, err := s.NewView(t.Context(), "v", "a:1")
	require.NoError(t, err)
	require.Equal(t, mounts, again)
	require.NoError(t, s.RemoveView(t.Context(), "v"))
	ids, err := s.Rootfs(t.Context())
	require.NoError(t, err)
	require.Empty(t, ids)
}

func TestRootfsConcurrently(t *testing.T) {
	s := openStore(t, Options{})
	importNoise(t, s, "a:1", 1, 1000)
	const containers, callers = 10, 3
	var wg sync.WaitGroup
	errs := make(chan error, containers*(callers+1))
	for i := range containers * callers {
		wg.Go(func() {
			id := fmt.Sprint("c", i%containers)
			_, err := s.NewRootfs(t.Context(), id, "a:1")
			errs <- err
		})
	}
	wg.Wait()
	for i := range containers {
		wg.Go(func() { errs <- s.RemoveRootfs(t.Context(), fmt.Sprint("c", i)) })
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		require.NoError(t, err)
	}
	dirs, err := os.ReadDir(s.path("overlay/snapshots"))
	require.NoError(t, err)
	require.Len(t, dirs, 1, "the image's layer")
}

func TestRemoveFreesDisk(t *testing.T) {
	s := openStore(t, Options{})
	base := layerOf(t, file{"base", noise(7, 500_000), 0o644})
	one := imageOf(t, base, layerOf(t, file{"one", noise(8, 500_000), 0o644}))
	two := imageOf(t, base, layerOf(t, file{"two", noise(9, 500_000), 0o644}))
	for ref, data := range map[string][]byte{"one:1": dockerSave(t, one, "one:1"), "two:1": dockerSave(t, two, "two:1")} {
		_, err := s.Import(t.Context(), bytes.NewReader(data))
		require.NoError(t, err, ref)
	}
	full := storeUse(t, s)
	require.Greater(t, full, int64(3_000_000))
	require.NoError(t, s.Remove(t.Context(), "one:1"))
	require.Less(t, storeUse(t, s), full-990_000)
	require.Greater(t, storeUse(t, s), int64(2_000_000), "the shared layer stays")

	// A container keeps its layers, though not the image.
	withRootfs(t, s, "c", "two:1", func(dir string) {
		require.NoError(t, s.Remove(t.Context(), "two:1"))
		data, err := os.ReadFile(filepath.Join(dir, "two"))
		require.NoError(t, err)
		require.Equal(t, noise(9, 500_000), string(data))
	})
	_, err := s.Resolve(t.Context(), "two:1")
	require.True(t, errdefs.IsNotFound(err))
	require.NoError(t, s.RemoveRootfs(t.Context(), "c"))
	require.Zero(t, storeUse(t, s))
	err = s.Remove(t.Context(), "two:1")
	require.True(t, errdefs.IsNotFound(err), "%v", err)
}

func TestMovedTagFreesDisk(t *testing.T) {
	s := openStore(t, Options{})
	importNoise(t, s, "a:1", 1, 500_000)
	id := importNoise(t, s, "a:1", 2, 500_000)
	require.Less(t, storeUse(t, s), int64(1_100_000), "only the second image is left")
	list, err := s.List(t.Context())
	require.NoError(t, err)
	require.Len(t, list, 1)
	require.Equal(t, id, list[0].ID)
}

func TestGC(t *testing.T) {
	s := openStore(t, Options{})
	ids := map[string]string{}
	for i, ref := range []string{"pinned:1", "used:1", "old:1", "new:1"} {
		ids[ref] = importNoise(t, s, ref, uint64(i), 10_000)
		if ref != "pinned:1" {
			unpin(t, s, ref)
		}
	}
	inUse := func(id string) bool { return id == ids["used:1"] }
	freed, err := s.GC(t.Context(), inUse, 1)
	require.NoError(t, err)
	require.Greater(t, freed, int64(10_000))
	_, err = s.Resolve(t.Context(), "old:1")
	require.True(t, errdefs.IsNotFound(err), "the oldest goes first")
	_, err = s.Resolve(t.Context(), "new:1")
	require.NoError(t, err, "enough was freed before")
	_, err = s.GC(t.Context(), inUse, -1)
	require.NoError(t, err)
	list, err := s.List(t.Context())
	require.NoError(t, err)
	var names []string
	for _, im := range list {
		names = append(names, im.RepoTags...)
	}
	require.Equal(t, []string{"docker.io/library/pinned:1", "docker.io/library/used:1"}, names)
}

// unpin makes an imported image one that could have been pulled.
func unpin(t testing.TB, s *Store, ref string) {
	t.Helper()
	d, full, err := s.index.find(ref)
	require.NoError(t, err)
	require.NoError(t, s.name(s.background(), full, s.index.targetOf(d.id, full), d, false))
}

func TestLostSnapshotsAreUnpackedAgain(t *testing.T) {
	s := openStore(t, Options{})
	importNoise(t, s, "a:1", 1, 1000)
	// The record of the layer goes behind the image's back.
	d, _, err := s.index.find("a:1")
	require.NoError(t, err)
	require.NoError(t, s.snap.Remove(s.background(), d.chainID))
	withRootfs(t, s, "c", "a:1", func(dir string) { require.FileExists(t, filepath.Join(dir, "data")) })
}

// TestDiskFull fills the file system of a store during an import.
func TestDiskFull(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=12m"))
	defer func() { require.NoError(t, unix.Unmount(dir, 0)) }()
	s := openStore(t, Options{Root: filepath.Join(dir, "images")})
	defer s.Close()
	importNoise(t, s, "small:1", 1, 100_000)
	for _, size := range []int{6 << 20, 20 << 20} { // too large unpacked, too large packed
		img := imageOf(t, layerOf(t, file{"data", noise(2, size), 0o644}))
		_, err := s.Import(t.Context(), bytes.NewReader(dockerSave(t, img, "large:1")))
		require.ErrorIs(t, err, unix.ENOSPC)
		_, err = s.Resolve(t.Context(), "large:1")
		require.True(t, errdefs.IsNotFound(err))
	}
	withRootfs(t, s, "c", "small:1", func(dir string) { require.FileExists(t, filepath.Join(dir, "data")) })
	require.Less(t, storeUse(t, s), int64(300_000), "nothing of the failed imports stays")
	importNoise(t, s, "small:2", 3, 3_000_000)
}

func TestOpenTwice(t *testing.T) {
	s := openStore(t, Options{})
	_, err := Open(t.Context(), Options{Root: s.Root()})
	require.ErrorContains(t, err, "in use by another process")
	require.NoError(t, s.Close())
	s = openStore(t, Options{Root: s.Root()})
	require.NoError(t, s.Close())
	_, err = s.Pull(t.Context(), "a:1", Auth{}, nil)
	require.True(t, errors.Is(err, errClosed), "%v", err)
}

func TestOpenBad(t *testing.T) {
	_, err := Open(t.Context(), Options{})
	require.ErrorContains(t, err, "Root")
	f := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(f, nil, 0o644))
	_, err = Open(t.Context(), Options{Root: f})
	require.ErrorContains(t, err, "not a directory")
}

func BenchmarkOpen(b *testing.B) {
	s := openStore(b, Options{})
	for i := range 5 {
		importNoise(b, s, fmt.Sprintf("a:%d", i), uint64(i), 10_000)
	}
	require.NoError(b, s.Close())
	for b.Loop() {
		s, err := Open(context.Background(), s.opts)
		require.NoError(b, err)
		b.StopTimer()
		require.NoError(b, s.Close())
		b.StartTimer()
	}
}

func BenchmarkRootfs(b *testing.B) {
	s := openStore(b, Options{})
	importNoise(b, s, "a:1", 1, 10_000)
	i := 0
	for b.Loop() {
		i++
		_, err := s.NewRootfs(context.Background(), fmt.Sprint("c", i), "a:1")
		require.NoError(b, err)
	}
}

func BenchmarkRootfsRemove(b *testing.B) {
	s := openStore(b, Options{})
	importNoise(b, s, "a:1", 1, 10_000)
	for b.Loop() {
		_, err := s.NewRootfs(context.Background(), "c", "a:1")
		require.NoError(b, err)
		require.NoError(b, s.RemoveRootfs(context.Background(), "c"))
	}
}
