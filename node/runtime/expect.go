package runtime

import (
	"os"
	"path/filepath"

	"github.com/opencontainers/cgroups"
)

// anyController is one that every node with cgroup v1 has.
const anyController = "devices"

// expectStart is to be called when a container is about to start. To move the
// container's init into its control group the kernel takes a lock of all control
// groups, for which it waits until each processor has passed through the
// scheduler (8 ms at 250 ticks a second), unless the lock was taken some
// milliseconds ago. That time passes beside the making of the sandbox and of the
// container.
func (r *Runtime) expectStart() {
	if !r.expecting.CompareAndSwap(false, true) {
		return // somebody waits for it already
	}
	r.spawn(func() {
		defer r.expecting.Store(false)
		if err := rejoinCgroup(r.feats.cgroup2); err != nil {
			r.log.Debug("containers start some milliseconds later", "error", err)
		}
	})
}

// rejoinCgroup moves this process into the control group that it is in, which
// changes nothing but takes the lock.
func rejoinCgroup(cgroup2 bool) error {
	dir, err := ownCgroup(cgroup2)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, cgroups.CgroupProcesses), []byte("0"), 0)
}

// ownCgroup is the directory of the control group that this process is in.
func ownCgroup(cgroup2 bool) (string, error) {
	if !cgroup2 {
		return cgroups.GetOwnCgroupPath(anyController)
	}
	groups, err := cgroups.ParseCgroupFile("/proc/self/cgroup")
	return filepath.Join(cgroupRoot, groups[""]), err
}
