package image

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	QuietLibraries()
	if dir := os.Getenv("KNARR_IMAGE_CRASH_ROOT"); dir != "" {
		crashChild(dir)
		return
	}
	goleak.VerifyTestMain(m)
}

// openStore opens a store in a directory of its own, or in o.Root, and closes it when the test ends.
func openStore(t testing.TB, o Options) *Store {
	t.Helper()
	if o.Root == "" {
		o.Root = filepath.Join(t.TempDir(), "images")
	}
	s, err := Open(context.Background(), o)
	require.NoError(t, err)
	t.Cleanup(func() { s.Close() })
	return s
}

// reopen closes s and opens its directory again.
func reopen(t testing.TB, s *Store) *Store {
	t.Helper()
	require.NoError(t, s.Close())
	return openStore(t, s.opts)
}

type file struct {
	name, data string
	mode       int64
}

// layerOf packs files into a layer; a name that ends in / is a directory.
func layerOf(t testing.TB, files ...file) v1.Layer {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, f := range files {
		hdr := &tar.Header{Typeflag: tar.TypeReg, Name: f.name, Mode: f.mode, Size: int64(len(f.data))}
		if strings.HasSuffix(f.name, "/") {
			hdr.Typeflag = tar.TypeDir
		}
		require.NoError(t, tw.WriteHeader(hdr))
		_, err := tw.Write([]byte(f.data))
		require.NoError(t, err)
	}
	require.NoError(t, tw.Close())
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil })
	require.NoError(t, err)
	return l
}

// imageOf is an image of layers for this platform.
func imageOf(t testing.TB, layers ...v1.Layer) v1.Image {
	t.Helper()
	img, err := mutate.AppendLayers(empty.Image, layers...)
	require.NoError(t, err)
	c, err := img.ConfigFile()
	require.NoError(t, err)
	c = c.DeepCopy()
	c.Config.Cmd = []string{"/hello"}
	c.Config.User = "1000:1000"
	img, err = mutate.ConfigFile(img, c)
	require.NoError(t, err)
	return img
}

// noise is text that does not compress, the same for the same seed.
func noise(seed uint64, size int) string {
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return string(b)
}

func imageID(t testing.TB, img v1.Image) string {
	t.Helper()
	h, err := img.ConfigName()
	require.NoError(t, err)
	return h.String()
}

// withRootfs mounts the root file system of container id on image ref while fn runs.
func withRootfs(t testing.TB, s *Store, id, ref string, fn func(dir string)) {
	t.Helper()
	mounts, err := s.NewRootfs(context.Background(), id, ref)
	require.NoError(t, err)
	dir := t.TempDir()
	require.NoError(t, mount.All(mounts, dir))
	defer func() { require.NoError(t, mount.UnmountAll(dir, 0)) }()
	fn(dir)
}

// runIn runs a program of the root file system dir.
func runIn(t testing.TB, dir string, args ...string) string {
	t.Helper()
	cmd := &exec.Cmd{Path: args[0], Args: args, Dir: "/", Env: []string{"PATH=/bin"}, SysProcAttr: &syscall.SysProcAttr{Chroot: dir}}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	return string(out)
}

// diskUse adds up the sizes of the files below dir, in bytes, without databases (which keep their size).
func diskUse(t testing.TB, dir string) (bytes int64, files int) {
	t.Helper()
	require.NoError(t, filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() || strings.HasSuffix(path, ".db") {
			return err
		}
		fi, err := e.Info()
		bytes += fi.Size()
		files++
		return err
	}))
	return bytes, files
}

func emptyIndex() v1.ImageIndex { return empty.Index }

func withArch(t testing.TB, img v1.Image, arch string) v1.Image {
	t.Helper()
	c, err := img.ConfigFile()
	require.NoError(t, err)
	c = c.DeepCopy()
	c.OS, c.Architecture = "linux", arch
	img, err = mutate.ConfigFile(img, c)
	require.NoError(t, err)
	return img
}

func unixTime(sec int64) time.Time { return time.Unix(sec, 0) }

const hostArch = runtime.GOARCH
