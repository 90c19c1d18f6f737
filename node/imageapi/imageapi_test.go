package imageapi

import (
	"context"
	"io"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/stretchr/testify/require"

	"knarr/node/image"
)

// start serves a new store on a socket.
func start(t *testing.T) *Client {
	t.Helper()
	dir := t.TempDir()
	store, err := image.Open(t.Context(), image.Options{Root: filepath.Join(dir, "images")})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	socket := filepath.Join(dir, "agent.sock")
	require.NoError(t, os.WriteFile(socket, nil, 0o644)) // left by a dead process
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, socket, store) }()
	c := NewClient(socket)
	t.Cleanup(func() {
		c.Close()
		cancel()
		require.NoError(t, <-done)
		require.NoError(t, store.Close())
	})
	require.Eventually(t, func() bool { _, err := c.List(t.Context()); return err == nil }, 5e9, 1e6)
	info, err := os.Stat(socket)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode().Perm())
	return c
}

func TestImagesOverTheSocket(t *testing.T) {
	c := start(t)
	list, err := c.List(t.Context())
	require.NoError(t, err)
	require.Empty(t, list)

	root := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(root, "hello"), []byte("world"), 0o644))
	a, err := image.Build(t.Context(), image.BuildOptions{Ref: "hello:1", Path: root})
	require.NoError(t, err)
	defer a.Close()
	list, err = c.Import(t.Context(), a.File)
	require.NoError(t, err)
	require.Len(t, list, 1)
	require.Equal(t, []string{"docker.io/library/hello:1"}, list[0].Names)
	require.True(t, list[0].Pinned)
	_, err = a.Seek(0, io.SeekStart)
	require.NoError(t, err, "an import must leave the archive open for the next node")

	require.ErrorContains(t, c.Remove(t.Context(), "nothing:1"), "nothing:1")
	require.NoError(t, c.Remove(t.Context(), "hello:1"))
	list, err = c.List(t.Context())
	require.NoError(t, err)
	require.Empty(t, list)
	_, err = c.Import(t.Context(), strings.NewReader("no archive"))
	require.ErrorContains(t, err, "archive")
}

func TestPullSaysWhyItFails(t *testing.T) {
	c := start(t)
	r := httptest.NewServer(registry.New())
	defer r.Close()
	_, err := c.Pull(t.Context(), PullRequest{Ref: strings.TrimPrefix(r.URL, "http://") + "/none:1"}, nil)
	require.ErrorContains(t, err, "none")
}
