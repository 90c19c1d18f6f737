package runtime

import (
	"bufio"
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// usage is what the cgroup files say; a pointer is nil where the kernel does
// not say it.
type usage struct {
	cpuNanos                uint64
	memory, workingSet, rss uint64
	limit                   uint64 // 0: none
	faults, majorFaults     uint64
	pids                    uint64
	swap                    *uint64
}

// noLimit is at least what v1 shows for "no limit".
const noLimit = 1 << 62

// readUsage reads the accounts of a cgroup, which is the same path in every
// hierarchy.
func (f features) readUsage(paths func(controller string) string) usage {
	if f.cgroup2 {
		return readUsageV2(paths(""))
	}
	var u usage
	u.cpuNanos = readUint(filepath.Join(paths("cpuacct"), "cpuacct.usage"))
	memory := paths("memory")
	u.memory = readUint(filepath.Join(memory, "memory.usage_in_bytes"))
	stat := readTable(filepath.Join(memory, "memory.stat"))
	u.workingSet = u.memory - min(u.memory, stat["total_inactive_file"])
	u.rss, u.faults, u.majorFaults = stat["total_rss"], stat["total_pgfault"], stat["total_pgmajfault"]
	if limit := readUint(filepath.Join(memory, "memory.limit_in_bytes")); limit < noLimit {
		u.limit = limit
	}
	if swap, ok := stat["total_swap"]; ok {
		u.swap = &swap
	}
	u.pids = readUint(filepath.Join(paths("pids"), "pids.current"))
	return u
}

func readUsageV2(dir string) usage {
	var u usage
	u.cpuNanos = readTable(filepath.Join(dir, "cpu.stat"))["usage_usec"] * 1000
	u.memory = readUint(filepath.Join(dir, "memory.current"))
	stat := readTable(filepath.Join(dir, "memory.stat"))
	u.workingSet = u.memory - min(u.memory, stat["inactive_file"])
	u.rss, u.faults, u.majorFaults = stat["anon"], stat["pgfault"], stat["pgmajfault"]
	u.limit = readUint(filepath.Join(dir, "memory.max")) // "max" reads as 0
	if present(filepath.Join(dir, "memory.swap.current")) {
		swap := readUint(filepath.Join(dir, "memory.swap.current"))
		u.swap = &swap
	}
	u.pids = readUint(filepath.Join(dir, "pids.current"))
	return u
}

func readUint(path string) uint64 {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	v, _ := strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
	return v
}

// readTable reads a file of lines "key value".
func readTable(path string) map[string]uint64 {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer func() { _ = f.Close() }()
	out := map[string]uint64{}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		key, value, ok := strings.Cut(lines.Text(), " ")
		if v, err := strconv.ParseUint(value, 10, 64); ok && err == nil {
			out[key] = v
		}
	}
	return out
}

func some(v uint64) *runtimeapi.UInt64Value { return &runtimeapi.UInt64Value{Value: v} }

func (u usage) cpu(now int64) *runtimeapi.CpuUsage {
	return &runtimeapi.CpuUsage{Timestamp: now, UsageCoreNanoSeconds: some(u.cpuNanos)}
}

func (u usage) mem(now int64) *runtimeapi.MemoryUsage {
	m := &runtimeapi.MemoryUsage{
		Timestamp: now, WorkingSetBytes: some(u.workingSet), UsageBytes: some(u.memory), RssBytes: some(u.rss),
		PageFaults: some(u.faults), MajorPageFaults: some(u.majorFaults),
	}
	if u.limit > 0 {
		m.AvailableBytes = some(u.limit - min(u.limit, u.workingSet))
	}
	return m
}

// ContainerStats implements internalapi.ContainerStatsManager. The writable
// layer is the image store's to measure.
func (r *Runtime) ContainerStats(_ context.Context, id string) (*runtimeapi.ContainerStats, error) {
	c, err := r.findContainer(id)
	if err != nil {
		return nil, err
	}
	return r.containerStats(c), nil
}

func (r *Runtime) containerStats(c *container) *runtimeapi.ContainerStats {
	st := &runtimeapi.ContainerStats{Attributes: &runtimeapi.ContainerAttributes{
		Id: c.id, Metadata: c.config.GetMetadata(), Labels: c.config.GetLabels(), Annotations: c.config.GetAnnotations(),
	}}
	p, last := c.snapshot()
	if p != phaseRunning {
		return st
	}
	now := time.Now().UnixNano()
	u := r.feats.readUsage(func(controller string) string { return last.CgroupPaths[controller] })
	st.Cpu, st.Memory = u.cpu(now), u.mem(now)
	if u.swap != nil {
		st.Swap = &runtimeapi.SwapUsage{Timestamp: now, SwapUsageBytes: some(*u.swap)}
	}
	return st
}

// ListContainerStats implements internalapi.ContainerStatsManager; of running
// containers only.
func (r *Runtime) ListContainerStats(ctx context.Context, f *runtimeapi.ContainerStatsFilter) ([]*runtimeapi.ContainerStats, error) {
	filter := &runtimeapi.ContainerFilter{
		Id: f.GetId(), PodSandboxId: f.GetPodSandboxId(), LabelSelector: f.GetLabelSelector(),
		State: &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING},
	}
	list, err := r.ListContainers(ctx, filter)
	if err != nil {
		return nil, err
	}
	var out []*runtimeapi.ContainerStats
	for _, item := range list {
		if c, err := r.findContainer(item.Id); err == nil {
			out = append(out, r.containerStats(c))
		}
	}
	return out, nil
}

// PodSandboxStats implements internalapi.ContainerStatsManager.
func (r *Runtime) PodSandboxStats(_ context.Context, id string) (*runtimeapi.PodSandboxStats, error) {
	s, err := r.findSandbox(id)
	if err != nil {
		return nil, err
	}
	return r.sandboxStats(s), nil
}

func (r *Runtime) sandboxStats(s *sandbox) *runtimeapi.PodSandboxStats {
	now := time.Now().UnixNano()
	u := r.feats.readUsage(func(controller string) string {
		return filepath.Join(cgroupRoot, controller, s.rec.CgroupParent)
	})
	linux := &runtimeapi.LinuxPodSandboxStats{
		Cpu: u.cpu(now), Memory: u.mem(now), Process: &runtimeapi.ProcessUsage{Timestamp: now, ProcessCount: some(u.pids)},
	}
	if !s.rec.HostNetwork && s.record().Ready {
		linux.Network = s.networkUsage(now)
	}
	for _, c := range r.containersOf(s.id) {
		if p, _ := c.snapshot(); p == phaseRunning {
			linux.Containers = append(linux.Containers, r.containerStats(c))
		}
	}
	return &runtimeapi.PodSandboxStats{
		Attributes: &runtimeapi.PodSandboxAttributes{
			Id: s.id, Metadata: s.config.GetMetadata(), Labels: s.config.GetLabels(), Annotations: s.config.GetAnnotations(),
		},
		Linux: linux,
	}
}

// networkUsage reads the counters of the pod's interfaces from inside of its
// network namespace.
func (s *sandbox) networkUsage(now int64) *runtimeapi.NetworkUsage {
	out := &runtimeapi.NetworkUsage{Timestamp: now}
	var data []byte
	err := inNamespaces(s.nsDir(), []string{"net"}, func() (err error) {
		data, err = os.ReadFile("/proc/thread-self/net/dev")
		return err
	})
	if err != nil {
		return out
	}
	for line := range strings.Lines(string(data)) {
		name, rest, ok := strings.Cut(line, ":")
		fields := strings.Fields(rest)
		name = strings.TrimSpace(name)
		if !ok || len(fields) < 16 || name == "lo" {
			continue
		}
		number := func(i int) *runtimeapi.UInt64Value {
			v, _ := strconv.ParseUint(fields[i], 10, 64)
			return some(v)
		}
		usage := &runtimeapi.NetworkInterfaceUsage{
			Name: name, RxBytes: number(0), RxErrors: number(2), TxBytes: number(8), TxErrors: number(10),
		}
		if name == "eth0" || out.DefaultInterface == nil {
			out.DefaultInterface = usage
		}
		out.Interfaces = append(out.Interfaces, usage)
	}
	return out
}

// ListPodSandboxStats implements internalapi.ContainerStatsManager; of ready
// sandboxes only.
func (r *Runtime) ListPodSandboxStats(ctx context.Context, f *runtimeapi.PodSandboxStatsFilter) ([]*runtimeapi.PodSandboxStats, error) {
	list, err := r.ListPodSandbox(ctx, &runtimeapi.PodSandboxFilter{
		Id: f.GetId(), LabelSelector: f.GetLabelSelector(),
		State: &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY},
	})
	if err != nil {
		return nil, err
	}
	var out []*runtimeapi.PodSandboxStats
	for _, item := range list {
		if s, err := r.findSandbox(item.Id); err == nil {
			out = append(out, r.sandboxStats(s))
		}
	}
	return out, nil
}
