package netns

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestCreateEnterDelete(t *testing.T) {
	path := filepath.Join(t.TempDir(), fmt.Sprintf("ns%x", rand.Uint32()))
	t.Cleanup(func() { _ = Delete(path) })
	require.NoError(t, Create(path, nil))
	require.True(t, Exists(path))
	require.NoError(t, Create(path, nil), "making it again keeps it")

	require.NoError(t, Do(path, func() error {
		links, err := net.Interfaces()
		for _, l := range links {
			require.NotEqual(t, "eth0", l.Name, "a new namespace has no link of the host")
		}
		return err
	}))
	out := exec.Command("cat", "/proc/self/net/dev")
	pipe, err := out.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, Start(path, out))
	buf := make([]byte, 4096)
	n, _ := pipe.Read(buf)
	require.NoError(t, out.Wait())
	require.NotContains(t, string(buf[:n]), "eth0")

	require.NoError(t, Delete(path))
	require.NoError(t, Delete(path), "deleting it again is no error")
	require.False(t, Exists(path))
}

func TestCreateFailureLeavesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ns")
	err := Create(path, func() error { return fmt.Errorf("set-up failed") })
	require.ErrorContains(t, err, "set-up failed")
	require.NoFileExists(t, path)
}
