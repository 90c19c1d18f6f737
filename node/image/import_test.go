package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/require"
)

// dockerSave is what docker save prints for img.
func dockerSave(t testing.TB, img v1.Image, tags ...string) []byte {
	t.Helper()
	m := map[name.Tag]v1.Image{}
	for _, n := range tags {
		tag, err := name.NewTag(n)
		require.NoError(t, err)
		m[tag] = img
	}
	var buf bytes.Buffer
	require.NoError(t, tarball.MultiWrite(m, &buf))
	return buf.Bytes()
}

// ociArchive is an OCI layout of img as a tar.
func ociArchive(t testing.TB, img v1.Image, refName string) []byte {
	t.Helper()
	dir := t.TempDir()
	p, err := layout.Write(dir, emptyIndex())
	require.NoError(t, err)
	require.NoError(t, p.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": refName})))
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	require.NoError(t, tw.AddFS(os.DirFS(dir)))
	require.NoError(t, tw.Close())
	return buf.Bytes()
}

func gzipped(t testing.TB, b []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	_, err := w.Write(b)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	return buf.Bytes()
}

func zstded(t testing.TB, b []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	require.NoError(t, err)
	defer w.Close()
	return w.EncodeAll(b, nil)
}

func TestImportForms(t *testing.T) {
	img := imageOf(t,
		layerOf(t, file{"etc/", "", 0o755}, file{"etc/a", "one", 0o644}, file{"etc/b", "gone", 0o644}, file{"tmp/", "", 0o1777}),
		layerOf(t, file{"etc/.wh.b", "", 0}, file{"etc/a", "two", 0o600}, file{"tmp/x", noise(1, 300_000), 0o644}))
	save := dockerSave(t, img, "docker.io/library/whoami:1", "example.com/team/whoami:2")
	oci := ociArchive(t, img, "example.com/team/whoami:3")
	for _, tc := range []struct {
		form string
		data []byte
		ref  string
	}{
		{"docker save", save, "whoami:1"},
		{"docker save gzip", gzipped(t, save), "example.com/team/whoami:2"},
		{"docker save zstd", zstded(t, save), "docker.io/library/whoami:1"},
		{"oci", oci, "example.com/team/whoami:3"},
		{"oci gzip", gzipped(t, oci), "example.com/team/whoami:3"},
	} {
		for _, native := range []bool{false, true} {
			t.Run(tc.form+map[bool]string{true: " native"}[native], func(t *testing.T) {
				s := openStore(t, Options{ForceNative: native})
				// A reader without Seek, in small pieces.
				list, err := s.Import(t.Context(), io.MultiReader(bytes.NewReader(tc.data[:100]), bytes.NewReader(tc.data[100:])))
				require.NoError(t, err)
				require.Equal(t, imageID(t, img), list[0].ID)
				require.True(t, list[0].Pinned)
				s = reopen(t, s)
				im, err := s.Resolve(t.Context(), tc.ref)
				require.NoError(t, err)
				require.Equal(t, imageID(t, img), im.ID)
				require.Equal(t, []string{"/hello"}, im.Config.Config.Cmd)
				require.Positive(t, im.Size)
				withRootfs(t, s, "c1", tc.ref, func(dir string) {
					data, err := os.ReadFile(filepath.Join(dir, "etc/a"))
					require.NoError(t, err)
					require.Equal(t, "two", string(data))
					require.NoFileExists(t, filepath.Join(dir, "etc/b"), "whiteout")
					fi, err := os.Stat(filepath.Join(dir, "tmp"))
					require.NoError(t, err)
					require.Equal(t, os.ModeSticky|os.ModeDir|0o777, fi.Mode(), "a layer without an entry for a directory keeps its mode")
				})
			})
		}
	}
}

func TestImportNames(t *testing.T) {
	s := openStore(t, Options{})
	img := imageOf(t, layerOf(t, file{"a", "1", 0o644}))
	_, err := s.Import(t.Context(), bytes.NewReader(ociArchive(t, img, "latest")))
	require.NoError(t, err)
	id := imageID(t, img)
	im, err := s.Resolve(t.Context(), id)
	require.NoError(t, err)
	require.Empty(t, im.RepoTags, "a bare tag is no name")

	_, err = s.Import(t.Context(), bytes.NewReader(ociArchive(t, img, "latest")), "mine:1")
	require.NoError(t, err)
	for _, ref := range []string{"mine:1", "docker.io/mine:1", "library/mine:1", id, id[7:], id[7:19], id[:20]} {
		im, err = s.Resolve(t.Context(), ref)
		require.NoError(t, err, ref)
		require.Equal(t, id, im.ID)
	}
	require.Len(t, im.RepoDigests, 1)
	_, err = s.Resolve(t.Context(), im.RepoDigests[0])
	require.NoError(t, err)
	for _, ref := range []string{"mine", "mine:2", "sha256:" + noDigest, "mine@sha256:" + noDigest, "example.com/mine:1"} {
		_, err = s.Resolve(t.Context(), ref)
		require.True(t, errdefs.IsNotFound(err), "%s: %v", ref, err)
	}
	_, err = s.Resolve(t.Context(), "Not A Name")
	require.True(t, errdefs.IsInvalidArgument(err), "%v", err)

	require.NoError(t, s.Tag(t.Context(), "mine:1", "other:2"))
	require.NoError(t, s.Remove(t.Context(), "mine:1"))
	s = reopen(t, s)
	im, err = s.Resolve(t.Context(), "other:2")
	require.NoError(t, err)
	require.True(t, im.Pinned)
	list, err := s.List(t.Context())
	require.NoError(t, err)
	require.Len(t, list, 1)
}

const noDigest = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func TestImportBad(t *testing.T) {
	s := openStore(t, Options{})
	img := imageOf(t, layerOf(t, file{"a", noise(2, 100_000), 0o644}))
	good := ociArchive(t, img, "a:1")
	broken := bytes.Clone(good)
	// The layer is the only large file: change it where neither headers nor JSON are.
	at := bytes.Index(broken, []byte{0x1f, 0x8b, 0x08})
	require.Positive(t, at)
	broken[at+50_000] ^= 1
	for _, tc := range []struct {
		what string
		data []byte
		want string
	}{
		{"empty", nil, "no"},
		{"text", []byte("hello, world\n"), "not an image archive"},
		{"truncated", good[:len(good)/2], "cut off"},
		{"broken layer", broken, "unexpected commit digest"},
		{"truncated gzip", gzipped(t, good)[:3000], "cut off"},
	} {
		_, err := s.Import(t.Context(), bytes.NewReader(tc.data))
		require.ErrorContains(t, err, tc.want, tc.what)
		list, err := s.List(t.Context())
		require.NoError(t, err)
		require.Empty(t, list, tc.what)
	}
	_, files := diskUse(t, s.path("content/blobs"))
	require.Zero(t, files, "blobs of failed imports")
	_, err := s.Import(t.Context(), bytes.NewReader(good))
	require.NoError(t, err)
	withRootfs(t, s, "c", "a:1", func(dir string) { require.FileExists(t, filepath.Join(dir, "a")) })
}

func TestImportOtherPlatform(t *testing.T) {
	img := imageOf(t, layerOf(t, file{"a", "1", 0o644}))
	s := openStore(t, Options{})
	_, err := s.Import(t.Context(), bytes.NewReader(dockerSave(t, withArch(t, img, "s390x"), "a:1")))
	require.ErrorContains(t, err, "linux/s390x")
}

func TestSharedContent(t *testing.T) {
	base := t.TempDir()
	shared := filepath.Join(base, "shared")
	a := openStore(t, Options{Root: filepath.Join(base, "a"), SharedContent: shared})
	b := openStore(t, Options{Root: filepath.Join(base, "b"), SharedContent: shared})
	img := imageOf(t, layerOf(t, file{"big", noise(3, 1<<20), 0o644}))
	for _, data := range [][]byte{dockerSave(t, img, "a:1"), ociArchive(t, img, "example.com/b:1")} {
		for _, s := range []*Store{a, b} {
			_, err := s.Import(t.Context(), bytes.NewReader(data))
			require.NoError(t, err)
		}
	}
	layers, err := img.Layers()
	require.NoError(t, err)
	h, err := layers[0].Digest()
	require.NoError(t, err)
	inA, err := os.Stat(filepath.Join(base, "a/content/blobs/sha256", h.Hex))
	require.NoError(t, err)
	inB, err := os.Stat(filepath.Join(base, "b/content/blobs/sha256", h.Hex))
	require.NoError(t, err)
	require.True(t, os.SameFile(inA, inB), "one inode for both nodes")

	for i, s := range []*Store{a, b} {
		require.NoError(t, s.Remove(t.Context(), imageID(t, img)))
		_, err := os.Stat(filepath.Join(shared, "sha256", h.Hex))
		require.Equal(t, i == 1, os.IsNotExist(err), "the last node takes the shared blob with it")
	}
	_, files := diskUse(t, shared)
	require.Zero(t, files)
}

func BenchmarkImport(b *testing.B) {
	img := imageOf(b, layerOf(b, file{"big", noise(4, 16<<20), 0o644}))
	data := dockerSave(b, img, "a:1")
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		s := openStore(b, Options{})
		_, err := s.Import(context.Background(), bytes.NewReader(data))
		require.NoError(b, err)
		require.NoError(b, s.Close())
	}
}
