package agent_test

import (
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

func unmount(path string) { _ = unix.Unmount(path, unix.MNT_DETACH) }

// removeCgroups removes a cgroup in every hierarchy, children first.
func removeCgroups(name string) {
	roots, _ := filepath.Glob("/sys/fs/cgroup/*")
	for _, r := range append(roots, "/sys/fs/cgroup") {
		removeTree(filepath.Join(r, name))
	}
}

func removeTree(dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		if e.IsDir() {
			removeTree(filepath.Join(dir, e.Name()))
		}
	}
	_ = os.Remove(dir)
}
