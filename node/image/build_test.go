package image

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

const busybox = "/bin/busybox" // Debian's busybox-static

// goProgram is a directory with a program that prints who it is.
func goProgram(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "hello")
	require.NoError(t, os.Mkdir(dir, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "go.mod"), []byte("module example.com/hello\n\ngo 1.24\n"), 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "main.go"), []byte(`package main

import "os"

func main() { os.Stdout.WriteString("hello from " + os.Args[0] + "\n") }
`), 0o644))
	return dir
}

// busyboxTree is a root file system with a shell, and one of each kind of file.
func busyboxTree(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{"bin", "etc", "tmp", "var/empty"} {
		require.NoError(t, os.MkdirAll(filepath.Join(dir, d), 0o755))
	}
	data, err := os.ReadFile(busybox)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "bin/busybox"), data, 0o755))
	require.NoError(t, os.Symlink("busybox", filepath.Join(dir, "bin/sh")))
	require.NoError(t, os.Link(filepath.Join(dir, "bin/busybox"), filepath.Join(dir, "bin/cat")))
	require.NoError(t, os.Chmod(filepath.Join(dir, "tmp"), 0o777|os.ModeSticky))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "etc/secret"), []byte("s"), 0o600))
	require.NoError(t, os.Chown(filepath.Join(dir, "etc/secret"), 1234, 5678))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "bin/suid"), []byte("x"), 0o755))
	require.NoError(t, os.Chmod(filepath.Join(dir, "bin/suid"), 0o755|os.ModeSetuid))
	require.NoError(t, unix.Setxattr(filepath.Join(dir, "etc/secret"), "user.knarr", []byte("attr"), 0))
	require.NoError(t, unix.Mkfifo(filepath.Join(dir, "etc/fifo"), 0o640))
	require.NoError(t, unix.Mknod(filepath.Join(dir, "etc/null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	return dir
}

// load builds and imports an image.
func load(t testing.TB, s *Store, o BuildOptions) *Archive {
	t.Helper()
	a, err := Build(t.Context(), o)
	require.NoError(t, err)
	t.Cleanup(func() { a.Close() })
	list, err := s.Import(t.Context(), a)
	require.NoError(t, err)
	require.Len(t, list, 1)
	require.Equal(t, a.ID, list[0].ID)
	require.Equal(t, []string{a.Ref}, list[0].RepoTags)
	require.True(t, strings.HasSuffix(list[0].RepoDigests[0], a.Manifest.String()))
	return a
}

func TestBuildBinary(t *testing.T) {
	s := openStore(t, Options{})
	load(t, s, BuildOptions{Ref: "tools:1", Path: busybox, Env: []string{"A=b"}, ExposedPorts: []string{"80", "53/udp"}, Labels: map[string]string{"l": "v"}, User: "65534", WorkingDir: "/tmp", Cmd: []string{"ls"}})
	im, err := s.Resolve(t.Context(), "tools:1")
	require.NoError(t, err)
	c := im.Config.Config
	require.Equal(t, []string{"/busybox"}, c.Entrypoint)
	require.Equal(t, []string{"ls"}, c.Cmd)
	require.Equal(t, []string{defaultPath, "A=b"}, c.Env)
	require.Equal(t, map[string]struct{}{"80/tcp": {}, "53/udp": {}}, c.ExposedPorts)
	require.Equal(t, "/tmp", c.WorkingDir)
	require.EqualValues(t, 65534, criImage(im).GetUid().GetValue())
	withRootfs(t, s, "c1", "tools:1", func(dir string) {
		require.Contains(t, runIn(t, dir, "/busybox", "cat", "/etc/passwd"), "nobody:x:65534")
		require.Contains(t, runIn(t, dir, "/busybox", "ls", "-ld", "/tmp"), "drwxrwxrwt")
		_, err := os.Stat(caBundle)
		_, inImage := os.Stat(filepath.Join(dir, caBundle))
		require.Equal(t, err == nil, inImage == nil, "CA certificates")
	})
}

func TestBuildGoPackage(t *testing.T) {
	s := openStore(t, Options{})
	dir := goProgram(t)
	a := load(t, s, BuildOptions{Ref: "example.com/hello:2", Path: dir})
	withRootfs(t, s, "c1", "example.com/hello:2", func(dir string) {
		require.Equal(t, "hello from /hello\n", runIn(t, dir, "/hello"))
	})
	b, err := Build(t.Context(), BuildOptions{Ref: "example.com/hello:2", Path: dir})
	require.NoError(t, err)
	defer b.Close()
	require.Equal(t, a.Manifest, b.Manifest, "the same input gives the same digest")

	require.NoError(t, os.WriteFile(filepath.Join(dir, "main.go"), []byte("package main\nfunc main() { nope }\n"), 0o644))
	_, err = Build(t.Context(), BuildOptions{Ref: "x", Path: dir})
	require.ErrorContains(t, err, "undefined: nope")
}

func TestBuildRootfs(t *testing.T) {
	s := openStore(t, Options{})
	tree := busyboxTree(t)
	a := load(t, s, BuildOptions{Ref: "bb", Path: tree, Entrypoint: []string{"/bin/sh"}})
	require.Equal(t, "docker.io/library/bb:latest", a.Ref)
	withRootfs(t, s, "c1", "bb", func(dir string) {
		require.Equal(t, "65534\n", runIn(t, dir, "/bin/sh", "-c", "echo $((65535-1))"))
		var st, st2 syscall.Stat_t
		require.NoError(t, syscall.Lstat(filepath.Join(dir, "etc/secret"), &st))
		require.EqualValues(t, []uint32{1234, 5678, 0o600}, []uint32{st.Uid, st.Gid, st.Mode & 0o7777})
		require.NoError(t, syscall.Lstat(filepath.Join(dir, "bin/suid"), &st))
		require.EqualValues(t, 0o4755, st.Mode&0o7777)
		require.NoError(t, syscall.Lstat(filepath.Join(dir, "bin/busybox"), &st))
		require.NoError(t, syscall.Lstat(filepath.Join(dir, "bin/cat"), &st2))
		require.Equal(t, st.Ino, st2.Ino, "hard link")
		require.NoError(t, syscall.Lstat(filepath.Join(dir, "etc/null"), &st))
		require.EqualValues(t, unix.Mkdev(1, 3), st.Rdev)
		require.NoError(t, syscall.Lstat(filepath.Join(dir, "etc/fifo"), &st))
		require.EqualValues(t, unix.S_IFIFO|0o640, st.Mode)
		value := make([]byte, 16)
		n, err := unix.Getxattr(filepath.Join(dir, "etc/secret"), "user.knarr", value)
		require.NoError(t, err)
		require.Equal(t, "attr", string(value[:n]))
	})
	require.NoError(t, os.Chtimes(filepath.Join(tree, "etc/secret"), unixTime(1e9), unixTime(1e9)))
	b, err := Build(t.Context(), BuildOptions{Ref: "bb", Path: tree, Entrypoint: []string{"/bin/sh"}})
	require.NoError(t, err)
	defer b.Close()
	require.Equal(t, sum(t, a), sum(t, b), "times do not change the archive")
}

func sum(t testing.TB, a *Archive) digest.Digest {
	t.Helper()
	_, err := a.Seek(0, io.SeekStart)
	require.NoError(t, err)
	d, err := digest.FromReader(a)
	require.NoError(t, err)
	return d
}

func TestBuildBad(t *testing.T) {
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	script := filepath.Join(t.TempDir(), "script")
	require.NoError(t, os.WriteFile(script, []byte("#!/bin/sh\n"), 0o755))
	for _, tc := range []struct{ ref, path, want string }{
		{"a", "", "path"},
		{"", busybox, "name"},
		{"A B", busybox, "invalid image name"},
		{"a@sha256:" + noDigest, busybox, "digest"},
		{"a", "/does/not/exist", "no such file"},
		{"a", script, "not a Linux program"},
		{"a", "/bin/ls", "dynamically"},
		{"a", "/dev/null", "neither a file nor a directory"},
	} {
		_, err := Build(t.Context(), BuildOptions{Ref: tc.ref, Path: tc.path})
		require.ErrorContains(t, err, tc.want, tc.path)
	}
	_, err := Build(t.Context(), BuildOptions{Ref: "a", Path: busybox, Arch: "arm64"})
	require.ErrorContains(t, err, "for arm64")
	left, err := os.ReadDir(tmp)
	require.NoError(t, err)
	require.Empty(t, left)
}
