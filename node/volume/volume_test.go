package volume

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestParseOptions(t *testing.T) {
	for in, want := range map[string]struct {
		flags, propagation uintptr
		data               string
	}{
		"":                        {0, 0, ""},
		"ro,size=1m,nosuid":       {unix.MS_RDONLY | unix.MS_NOSUID, 0, "size=1m"},
		"ro,rw":                   {0, 0, ""},
		"bind,remount,ro":         {unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY, 0, ""},
		"rbind,rslave":            {unix.MS_BIND | unix.MS_REC, unix.MS_SLAVE | unix.MS_REC, ""},
		"defaults,_netdev,mode=1": {0, 0, "mode=1"},
	} {
		flags, propagation, data := parseOptions([]string{in})
		require.Equal(t, want.flags, flags, in)
		require.Equal(t, want.propagation, propagation, in)
		require.Equal(t, want.data, data, in)
	}
}

// TestRemoveDir: a pod's directory with something mounted in it stays as it is, whatever it is and wherever; without, it goes.
func TestRemoveDir(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounts need root")
	}
	mounter := NewMounter()
	m := &Manager{host: &host{mounter: mounter}}
	for name, where := range map[string]string{"nothing": "", "volume": "volumes/v", "file": "volume-subpaths/v/c/0", "deep": "volumes/v/deep"} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "uid")
			require.NoError(t, os.MkdirAll(filepath.Join(dir, "volumes", "v", "deep"), 0o755))
			require.NoError(t, os.MkdirAll(filepath.Join(dir, "volume-subpaths", "v", "c"), 0o755))
			require.NoError(t, os.WriteFile(filepath.Join(dir, "volume-subpaths", "v", "c", "0"), nil, 0o600))
			require.NoError(t, os.Symlink("/proc", filepath.Join(dir, "volumes", "a"))) // a mount point, but elsewhere
			require.NoError(t, os.Symlink("nowhere", filepath.Join(dir, "volumes", "b")))
			if where == "" {
				require.NoError(t, m.removeDir(dir))
				require.NoDirExists(t, dir)
				require.NoError(t, m.removeDir(dir))
				return
			}
			target := filepath.Join(dir, where)
			source := t.TempDir()
			if name == "file" {
				source = filepath.Join(source, "f")
				require.NoError(t, os.WriteFile(source, []byte("keep"), 0o600))
			}
			require.NoError(t, mounter.Mount(source, target, "", []string{"bind"}))
			defer func() { _ = mounter.Unmount(target) }()
			require.ErrorContains(t, m.removeDir(dir), target+" is still mounted")
			byTable, err := mounter.mountedBelowByTable(dir)
			require.NoError(t, err)
			require.Equal(t, target, byTable)
			require.NoError(t, mounter.Unmount(target))
			require.NoError(t, m.removeDir(dir))
			require.NoDirExists(t, dir)
			require.FileExists(t, "/proc/self/stat")
		})
	}
}

func TestMounter(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounts need root")
	}
	m, dir := NewMounter(), t.TempDir()
	source, target := filepath.Join(dir, "source"), filepath.Join(dir, "target")
	for _, d := range []string{source, target} {
		require.NoError(t, os.Mkdir(d, 0o755))
	}
	require.NoError(t, m.Mount("tmpfs", source, "tmpfs", []string{"size=64k", "mode=700"}))
	defer func() { _ = m.Unmount(source) }()
	require.NoError(t, os.WriteFile(filepath.Join(source, "f"), []byte("x"), 0o600))
	require.NoError(t, m.Mount(source, target, "", []string{"bind", "ro"}))
	defer func() { _ = m.Unmount(target) }()
	b, err := os.ReadFile(filepath.Join(target, "f"))
	require.NoError(t, err)
	require.Equal(t, "x", string(b))
	require.ErrorIs(t, os.WriteFile(filepath.Join(target, "f"), nil, 0o600), unix.EROFS)
	not, err := m.IsLikelyNotMountPoint(source)
	require.NoError(t, err)
	require.False(t, not)
	require.NoError(t, m.Unmount(target))
	require.NoError(t, m.Unmount(source))
	require.ErrorIs(t, m.Unmount(source), unix.EINVAL)
}
