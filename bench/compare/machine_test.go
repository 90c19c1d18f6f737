package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"knarr/bench/load"
)

func TestHierarchyOptions(t *testing.T) {
	for in, want := range map[string]string{
		"rw,memory": "memory", "rw,cpu,cpuacct": "cpu,cpuacct", "rw,xattr,name=systemd": "name=systemd",
		"rw,cpuset,clone_children": "cpuset", "rw,release_agent=/x,pids": "pids",
	} {
		require.Equal(t, want, v1Options(in))
	}
	require.Equal(t, "/a:b", cgroupOf("4:memory:/a:b\n0::/\n", "memory"))
	require.Equal(t, "/", cgroupOf("4:memory:/a\n", "cpu"))
}

// TestRoom: free space is looked at for the node that needs it, of a directory that is there.
func TestRoom(t *testing.T) {
	require.NoError(t, roomFor([]string{"knarr"}, "/proc"))
	require.Error(t, roomFor([]string{"upstream"}, filepath.Join(t.TempDir(), "missing")))
}

// TestGroupsComeAndGo: a process that is started in the groups is found in them, and they can be removed after it.
func TestGroupsComeAndGo(t *testing.T) {
	all, err := makeCgroups("knarr-test-" + filepath.Base(t.TempDir()))
	t.Cleanup(func() {
		require.NoError(t, removeCgroups(all))
		for _, h := range all {
			require.NoDirExists(t, h.dir)
		}
	})
	require.NoError(t, err)
	cmd := exec.Command("sleep", "60")
	require.NoError(t, inCgroups(all, cmd.Start))
	m := &machine{cgroups: all}
	require.Equal(t, load.PIDs{cmd.Process.Pid}, m.all())
	require.True(t, m.processes()[0].is("sleep"))
	require.NotContains(t, m.all(), os.Getpid())
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait() // killed
	require.Empty(t, m.all())
}

// TestImagesPack: the archive for containerd has both images, as a stranger would read it.
func TestImagesPack(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "images.tar")
	require.NoError(t, packImages(context.Background(), dir, "/proc/self/exe", file))
	out, err := exec.Command("tar", "-xOf", file, "manifest.json").Output()
	require.NoError(t, err)
	require.Contains(t, string(out), "busybox:1")
	require.Contains(t, string(out), pauseImage)
}
