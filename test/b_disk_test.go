package test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// fullDiskBytes is the size of the disk that gets full.
const fullDiskBytes = 160 << 20

// TestBFullDisk: on a full disk writes fail with a clear message and reads go on; with room again writes go on; nothing
// that was acknowledged is lost, also not by kill -9. It has a cluster of its own, before the shared one starts.
func TestBFullDisk(t *testing.T) {
	c := newCluster(t, "d")
	c.Root = t.TempDir()
	require.NoError(t, unix.Mount("tmpfs", c.Root, "tmpfs", 0, fmt.Sprintf("size=%d", fullDiskBytes)))
	defer unix.Unmount(c.Root, unix.MNT_DETACH)
	defer func() { require.NoError(t, c.Down(t.Context(), true)) }()
	_, err := c.Up(t.Context(), 1)
	require.NoError(t, err)
	client := clientOf(t, c).CoreV1().ConfigMaps("default")
	data := map[string]string{"data": strings.Repeat("x", 100_000)}
	var acked []string
	tried := 0
	write := func() error {
		tried++ // a write that failed may still be done when there is room: each has a name of its own
		name := fmt.Sprintf("m-%05d", tried)
		_, err := client.Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: data}, metav1.CreateOptions{})
		if err == nil {
			acked = append(acked, name)
		}
		return err
	}
	for range 10 {
		require.NoError(t, write())
	}
	filler := filepath.Join(c.Root, "filler")
	fill(t, filler)
	for i := 0; err == nil; i++ {
		require.Less(t, i, 2*fullDiskBytes/len(data["data"]), "the disk never gets full")
		err = write()
	}
	t.Logf("%d writes, then: %v", len(acked), err)
	require.Regexp(t, "no space left on device|disk.*full|storage.*full", err.Error())
	check := func() {
		t.Helper()
		list, err := client.List(t.Context(), metav1.ListOptions{})
		require.NoError(t, err, "reads must go on")
		have := map[string]bool{}
		for _, m := range list.Items {
			have[m.Name] = true
		}
		for _, name := range acked {
			require.True(t, have[name], "%s was acknowledged and is missing", name)
		}
	}
	check()
	require.NoError(t, os.Remove(filler))
	eventually(t, settle, "writes go on", func() (bool, string) { err := write(); return err == nil, fmt.Sprint(err) })
	check()

	require.NoError(t, syscall.Kill(part(t, c, "server", "").PID, syscall.SIGKILL))
	eventually(t, settle, "the server is gone", func() (bool, string) {
		s, err := c.Status(t.Context())
		return err == nil && !s.Ready, fmt.Sprint(err)
	})
	_, err = c.Up(t.Context(), 1)
	require.NoError(t, err)
	check()
	require.NoError(t, write())
}

// fill writes until nothing more fits.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	require.NoError(t, err)
	defer f.Close()
	block := make([]byte, 1<<20)
	for end := time.Now().Add(settle); err == nil; {
		require.True(t, time.Now().Before(end), "the disk never gets full")
		_, err = f.Write(block)
	}
	require.ErrorIs(t, err, unix.ENOSPC)
}
