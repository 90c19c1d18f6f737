package test

import (
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestAFailedStartLeavesNothing comes first (files are run in the order of their names): afterwards the shared cluster
// has the machine.
func TestAFailedStartLeavesNothing(t *testing.T) {
	c := newCluster(t, "f")
	before, err := lookAtHost(c)
	require.NoError(t, err)
	check := func(t *testing.T) {
		t.Helper()
		after, err := lookAtHost(c)
		require.NoError(t, err)
		requireSame(t, before, after)
	}
	t.Run("not in time", func(t *testing.T) {
		_, err := c.Run(t.Context(), "up", append([]string{"--nodes", "2", "--timeout", "300ms"}, c.UpArgs...)...)
		require.ErrorContains(t, err, "not within --timeout 300ms")
		check(t)
	})
	t.Run("port in use", func(t *testing.T) {
		l, err := net.Listen("tcp", "0.0.0.0:"+apiPort)
		require.NoError(t, err)
		defer l.Close()
		_, err = c.Up(t.Context(), 1)
		require.ErrorContains(t, err, "port "+apiPort+" is in use by")
		check(t)
	})
	t.Run("directory not writable", func(t *testing.T) {
		dir := t.TempDir()
		require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", unix.MS_RDONLY, ""))
		defer unix.Unmount(dir, 0)
		readOnly := *c
		readOnly.Root = dir
		_, err = readOnly.Up(t.Context(), 1)
		require.ErrorContains(t, err, "data directory is not writable")
		require.ErrorContains(t, err, "read-only file system")
		check(t)
	})
	t.Run("no shim", func(t *testing.T) {
		alone := *c
		alone.Bin = t.TempDir()
		program, err := os.ReadFile(filepath.Join(programs, "knarr"))
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(alone.Bin, "knarr"), program, 0o755))
		_, err = alone.Up(t.Context(), 1)
		require.ErrorContains(t, err, "knarr-shim is neither beside knarr nor in PATH")
		check(t)
	})
}

// TestAForegroundServer: as a service manager runs it, with a word when it is ready and an end when it is told.
func TestAForegroundServer(t *testing.T) {
	c := newCluster(t, "s")
	before, err := lookAtHost(c)
	require.NoError(t, err)
	socket := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	require.NoError(t, err)
	defer l.Close()
	c.Env = []string{"NOTIFY_SOCKET=" + socket}
	cmd := c.Command(t.Context(), "server", c.UpArgs...)
	require.NoError(t, cmd.Start())
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	require.NoError(t, l.SetReadDeadline(time.Now().Add(settle)))
	buf := make([]byte, 256)
	n, err := l.Read(buf)
	require.NoError(t, err)
	require.Contains(t, string(buf[:n]), "READY=1")
	must(t, c, "get", "--raw", "/readyz")
	second, err := c.Run(t.Context(), "server", c.UpArgs...)
	require.Error(t, err, second)
	require.ErrorContains(t, err, "already runs as process")
	require.NoError(t, cmd.Process.Signal(unix.SIGTERM))
	select {
	case err := <-done:
		require.NoError(t, err, "an end on request is no failure")
	case <-time.After(settle):
		t.Fatal("the server does not end")
	}
	require.NoError(t, c.Down(t.Context(), true))
	after, err := lookAtHost(c)
	require.NoError(t, err)
	requireSame(t, before, after)
}
