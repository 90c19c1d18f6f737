package runtime

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// features is what this node's kernel can do, found once.
type features struct {
	cgroup2           bool
	swap              bool // swap can be limited per cgroup
	hugetlb           bool
	apparmor          bool
	recursiveReadOnly bool // mount_setattr
	idmappedMounts    bool
	// cgroupOptions of the node's cgroup2 mount that a mount without a cgroup
	// namespace would change for all.
	cgroupOptions []string
}

const cgroupRoot = "/sys/fs/cgroup"

func probeFeatures() features {
	var st unix.Statfs_t
	f := features{}
	if unix.Statfs(cgroupRoot, &st) == nil {
		f.cgroup2 = st.Type == unix.CGROUP2_SUPER_MAGIC
	}
	if f.cgroup2 {
		controllers, _ := os.ReadFile(filepath.Join(cgroupRoot, "cgroup.controllers"))
		f.hugetlb = strings.Contains(string(controllers), "hugetlb")
		matches, _ := filepath.Glob(filepath.Join(cgroupRoot, "*", "memory.swap.max"))
		f.swap = len(matches) > 0
	} else {
		f.hugetlb = present(filepath.Join(cgroupRoot, "hugetlb"))
		f.swap = present(filepath.Join(cgroupRoot, "memory/memory.memsw.limit_in_bytes"))
	}
	if info, err := mount.Lookup(cgroupRoot); err == nil && f.cgroup2 {
		for _, o := range strings.Split(info.VFSOptions, ",") {
			if o == "nsdelegate" || o == "memory_recursiveprot" {
				f.cgroupOptions = append(f.cgroupOptions, o)
			}
		}
	}
	enabled, _ := os.ReadFile("/sys/module/apparmor/parameters/enabled")
	f.apparmor = strings.HasPrefix(string(enabled), "Y")
	attr := unix.MountAttr{}
	// An invalid descriptor is EBADF where the call exists, ENOSYS elsewhere.
	f.recursiveReadOnly = unix.MountSetattr(-1, "", unix.AT_EMPTY_PATH, &attr) != unix.ENOSYS
	f.idmappedMounts = f.recursiveReadOnly
	return f
}

func present(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// resources translates CRI's limits; what the kernel has no controller for is
// left out.
func (f features) resources(r *runtimeapi.LinuxContainerResources) *specs.LinuxResources {
	out := &specs.LinuxResources{CPU: &specs.LinuxCPU{}, Memory: &specs.LinuxMemory{}}
	if r == nil {
		return out
	}
	if r.CpuShares != 0 {
		shares := uint64(r.CpuShares)
		out.CPU.Shares = &shares
	}
	if r.CpuQuota != 0 {
		out.CPU.Quota = &r.CpuQuota
	}
	if r.CpuPeriod != 0 {
		period := uint64(r.CpuPeriod)
		out.CPU.Period = &period
	}
	out.CPU.Cpus, out.CPU.Mems = r.CpusetCpus, r.CpusetMems
	if r.MemoryLimitInBytes != 0 {
		out.Memory.Limit = &r.MemoryLimitInBytes
		if f.swap {
			// As much swap as memory: none on top, unless asked for.
			out.Memory.Swap = &r.MemoryLimitInBytes
		}
	}
	if r.MemorySwapLimitInBytes != 0 && f.swap {
		out.Memory.Swap = &r.MemorySwapLimitInBytes
	}
	if f.hugetlb {
		for _, h := range r.HugepageLimits {
			out.HugepageLimits = append(out.HugepageLimits, specs.LinuxHugepageLimit{Pagesize: h.PageSize, Limit: h.Limit})
		}
	}
	if f.cgroup2 && len(r.Unified) > 0 {
		out.Unified = r.Unified
	}
	return out
}

// mergeResources lays the given values over the old ones; 0 means unchanged.
func mergeResources(old, update *runtimeapi.LinuxContainerResources) *runtimeapi.LinuxContainerResources {
	out := &runtimeapi.LinuxContainerResources{}
	if old != nil {
		out = proto.Clone(old).(*runtimeapi.LinuxContainerResources)
	}
	for _, f := range []struct {
		to   *int64
		from int64
	}{
		{&out.CpuPeriod, update.CpuPeriod}, {&out.CpuQuota, update.CpuQuota}, {&out.CpuShares, update.CpuShares},
		{&out.MemoryLimitInBytes, update.MemoryLimitInBytes}, {&out.OomScoreAdj, update.OomScoreAdj},
		{&out.MemorySwapLimitInBytes, update.MemorySwapLimitInBytes},
	} {
		if f.from != 0 {
			*f.to = f.from
		}
	}
	if update.CpusetCpus != "" {
		out.CpusetCpus = update.CpusetCpus
	}
	if update.CpusetMems != "" {
		out.CpusetMems = update.CpusetMems
	}
	if len(update.HugepageLimits) > 0 {
		out.HugepageLimits = update.HugepageLimits
	}
	if len(update.Unified) > 0 && out.Unified == nil {
		out.Unified = map[string]string{}
	}
	for k, v := range update.Unified {
		out.Unified[k] = v
	}
	return out
}
