package image

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

const (
	crashTags    = 3
	crashVariety = 5
	crashLayer   = 200_000 // bytes
)

// crashArchive is the docker save form of image number i as c:<tag>; i tells what is in its files.
func crashArchive(t testing.TB, tag, i int) []byte {
	img := imageOf(t,
		layerOf(t, file{"base", noise(99, crashLayer), 0o644}),
		layerOf(t, file{"data", noise(uint64(i), crashLayer), 0o644}, file{"number", fmt.Sprint(i), 0o644}))
	return dockerSave(t, img, fmt.Sprintf("c:%d", tag))
}

// crashChild works on the store in root until it is killed. It prints what is done once that is done.
func crashChild(root string) {
	if err := crashWork(root); err != nil {
		fmt.Println("failed", err)
		os.Exit(1)
	}
}

func crashWork(root string) error {
	ctx := context.Background()
	s, err := Open(ctx, Options{Root: root})
	if err != nil {
		return err
	}
	var archives [crashTags][crashVariety][]byte
	for tag := range crashTags {
		for i := range crashVariety {
			if archives[tag][i], err = os.ReadFile(filepath.Join(filepath.Dir(root), fmt.Sprintf("%d-%d.tar", tag, i))); err != nil {
				return err
			}
		}
	}
	fmt.Println("ready")
	r := rand.New(rand.NewPCG(uint64(os.Getpid()), 2))
	for n := 0; ; n++ {
		tag, i := r.IntN(crashTags), r.IntN(crashVariety)
		if _, err := s.Import(ctx, bytes.NewReader(archives[tag][i])); err != nil {
			return err
		}
		fmt.Println("image", tag, i)
		id := fmt.Sprintf("%d-%d", os.Getpid(), n)
		if _, err := s.NewRootfs(ctx, id, fmt.Sprintf("c:%d", tag)); err != nil {
			return err
		}
		fmt.Println("rootfs", id)
		if r.IntN(2) == 0 {
			fmt.Println("remove", id)
			if err := s.RemoveRootfs(ctx, id); err != nil {
				return err
			}
		}
		if r.IntN(4) == 0 {
			fmt.Println("untag", tag)
			if err := s.Remove(ctx, fmt.Sprintf("c:%d", tag)); err != nil {
				return err
			}
		}
	}
}

// TestKilled kills a process that works on a store, again and again at random times: what it said to be done is there,
// every image is whole, and nothing of what was half done stays on the disk.
func TestKilled(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	base := t.TempDir()
	root := filepath.Join(base, "images")
	for tag := range crashTags {
		for i := range crashVariety {
			require.NoError(t, os.WriteFile(filepath.Join(base, fmt.Sprintf("%d-%d.tar", tag, i)), crashArchive(t, tag, i), 0o600))
		}
	}
	for range 12 {
		said := runAndKill(t, root, time.Duration(r.IntN(150))*time.Millisecond)
		s := openStore(t, Options{Root: root})
		verifyKilled(t, s, said)
		require.NoError(t, s.Close())
		// The process of the next round finds a store as a killed one leaves it, not as Close does.
		require.NoError(t, os.WriteFile(filepath.Join(root, "running"), nil, 0o600))
	}
}

func runAndKill(t *testing.T, root string, after time.Duration) (said []string) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "KNARR_IMAGE_CRASH_ROOT="+root)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if lines.Text() == "ready" {
			time.AfterFunc(after, func() { cmd.Process.Kill() })
			continue
		}
		require.NotContains(t, lines.Text(), "failed")
		said = append(said, lines.Text())
	}
	_ = cmd.Wait() // killed
	return said
}

func verifyKilled(t *testing.T, s *Store, said []string) {
	t.Helper()
	tags, rootfs := expectations(said)
	for tag, i := range tags {
		im, err := s.Resolve(t.Context(), fmt.Sprintf("c:%d", tag))
		require.NoError(t, err, "tag %d, said: %v", tag, said)
		require.Len(t, im.RepoDigests, len(slices.Compact(im.RepoDigests)))
		_ = i // the import that was under way may have moved it since
	}
	have, err := s.Rootfs(t.Context())
	require.NoError(t, err)
	for id := range rootfs {
		require.Contains(t, have, id, "said: %v", said)
	}
	list, err := s.List(t.Context())
	require.NoError(t, err)
	for n, im := range list {
		withRootfs(t, s, fmt.Sprint("verify", n), im.ID, func(dir string) {
			number, err := os.ReadFile(filepath.Join(dir, "number"))
			require.NoError(t, err)
			var i uint64
			_, err = fmt.Sscan(string(number), &i)
			require.NoError(t, err)
			for name, want := range map[string]string{"base": noise(99, crashLayer), "data": noise(i, crashLayer)} {
				data, err := os.ReadFile(filepath.Join(dir, name))
				require.NoError(t, err)
				require.True(t, want == string(data), "content of %s", name)
			}
		})
		require.NoError(t, s.RemoveRootfs(t.Context(), fmt.Sprint("verify", n)))
	}
	verifyNoLeftovers(t, s, list)
	for _, id := range have {
		require.NoError(t, s.RemoveRootfs(t.Context(), id))
	}
}

// expectations returns what must be there after said, but for the last step, which may have begun without being said.
func expectations(said []string) (tags map[int]int, rootfs map[string]bool) {
	tags, rootfs = map[int]int{}, map[string]bool{}
	for _, line := range said {
		var tag, i int
		if n, _ := fmt.Sscanf(line, "image %d %d", &tag, &i); n == 2 {
			tags[tag] = i
		} else if n, _ := fmt.Sscanf(line, "untag %d", &tag); n == 1 {
			delete(tags, tag)
		} else if id, ok := strings.CutPrefix(line, "rootfs "); ok {
			rootfs[id] = true
		} else if id, ok := strings.CutPrefix(line, "remove "); ok {
			delete(rootfs, id)
		}
	}
	return tags, rootfs
}

// verifyNoLeftovers checks that databases and directories agree, and that there is nothing besides the images of list
// and the root file systems of containers.
func verifyNoLeftovers(t *testing.T, s *Store, list []Image) {
	t.Helper()
	ctx, end, err := s.begin(t.Context()) // waits for the recovery, as all writes do
	require.NoError(t, err)
	defer end()
	known := 0
	require.NoError(t, s.snap.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		known++
		require.False(t, strings.HasPrefix(info.Name, "extract-"), "half unpacked: %s", info.Name)
		return nil
	}))
	dirs, err := os.ReadDir(s.path("overlay/snapshots"))
	require.NoError(t, err)
	require.Len(t, dirs, known, "snapshot directories")
	blobs := 0
	require.NoError(t, s.content.Walk(ctx, func(content.Info) error { blobs++; return nil }))
	_, files := diskUse(t, s.path("content/blobs"))
	require.Equal(t, blobs, files, "blobs in the database and on disk")
	_, files = diskUse(t, s.path("content/ingest"))
	require.Zero(t, files, "half-written blobs")
	// Configuration, manifest and one layer for each image, and the layer that all share.
	want := 3 * len(list)
	if len(list) > 0 {
		want++
	}
	require.Equal(t, want, blobs)
}

// TestCloseDuringWork closes a store under imports and removals: they fail or end, and the store is whole afterwards.
func TestCloseDuringWork(t *testing.T) {
	root := filepath.Join(t.TempDir(), "images")
	s := openStore(t, Options{Root: root})
	archives := [][]byte{crashArchive(t, 0, 0), crashArchive(t, 1, 1)}
	for range 5 {
		var wg sync.WaitGroup
		begun := make(chan struct{}, len(archives))
		for _, a := range archives {
			wg.Go(func() {
				begun <- struct{}{}
				for n := 0; ; n++ {
					if _, err := s.Import(context.Background(), bytes.NewReader(a)); err != nil {
						return
					}
					if _, err := s.NewRootfs(context.Background(), fmt.Sprintf("%p%d", a, n), "c:0"); err != nil && !errdefs.IsNotFound(err) {
						return
					}
				}
			})
		}
		for range archives {
			<-begun
		}
		_, err := s.List(t.Context())
		require.NoError(t, err)
		require.NoError(t, s.Close())
		wg.Wait()
		s = openStore(t, Options{Root: root})
		require.False(t, s.unclean)
		left, err := s.leases.List(s.background())
		require.NoError(t, err)
		require.Empty(t, left, "leases")
		ids, err := s.Rootfs(t.Context())
		require.NoError(t, err)
		for _, id := range ids {
			require.NoError(t, s.RemoveRootfs(t.Context(), id))
		}
	}
}
