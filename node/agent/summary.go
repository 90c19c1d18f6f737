package agent

import (
	"context"
	"os"
	"strconv"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	statsapi "k8s.io/kubelet/pkg/apis/stats/v1alpha1"

	"golang.org/x/sys/unix"
)

// clockTick is the unit of /proc/stat in nanoseconds (USER_HZ is 100 on Linux).
const clockTick = uint64(time.Second) / 100

// Summary reads what node and pods use, now.
func (h apiHost) Summary(ctx context.Context, light bool) (*statsapi.Summary, error) {
	a, now := h.a, metav1.NewTime(time.Now())
	containers, err := a.opts.Runtime.ListContainerStats(ctx, &runtimeapi.ContainerStatsFilter{})
	if err != nil {
		return nil, err
	}
	started, err := a.startTimes(ctx)
	if err != nil {
		return nil, err
	}
	byPod := map[string][]statsapi.ContainerStats{}
	for _, c := range containers {
		uid := c.GetAttributes().GetLabels()[labelPodUID]
		cs := containerStats(c, light)
		cs.StartTime = metav1.NewTime(started[c.GetAttributes().GetId()])
		byPod[uid] = append(byPod[uid], cs)
	}
	out := &statsapi.Summary{Node: a.nodeStats(now, light), Pods: []statsapi.PodStats{}}
	for _, pod := range a.Pods() {
		list := byPod[string(pod.UID)]
		if len(list) == 0 {
			continue
		}
		ps := statsapi.PodStats{PodRef: statsapi.PodReference{Name: pod.Name, Namespace: pod.Namespace, UID: string(pod.UID)},
			StartTime: pod.CreationTimestamp, Containers: list}
		if st, ok := a.statuses.Get(pod.UID); ok && st.StartTime != nil {
			ps.StartTime = *st.StartTime
		}
		ps.CPU, ps.Memory = sum(list, now)
		if !light {
			used := uint64(a.diskUsage(pod))
			ps.EphemeralStorage = &statsapi.FsStats{Time: now, UsedBytes: &used}
		}
		out.Pods = append(out.Pods, ps)
	}
	return out, nil
}

// startTimes returns when containers were made, by id.
func (a *Agent) startTimes(ctx context.Context) (map[string]time.Time, error) {
	list, err := a.opts.Runtime.ListContainers(ctx, nil)
	if err != nil {
		return nil, err
	}
	out := make(map[string]time.Time, len(list))
	for _, c := range list {
		out[c.Id] = time.Unix(0, c.CreatedAt)
	}
	return out, nil
}

func value(v *runtimeapi.UInt64Value) *uint64 {
	if v == nil {
		return nil
	}
	n := v.Value
	return &n
}

func containerStats(c *runtimeapi.ContainerStats, light bool) statsapi.ContainerStats {
	cs := statsapi.ContainerStats{Name: c.GetAttributes().GetMetadata().GetName()}
	if cpu := c.GetCpu(); cpu != nil {
		cs.CPU = &statsapi.CPUStats{Time: metav1.NewTime(time.Unix(0, cpu.Timestamp)),
			UsageNanoCores: value(cpu.UsageNanoCores), UsageCoreNanoSeconds: value(cpu.UsageCoreNanoSeconds)}
	}
	if m := c.GetMemory(); m != nil {
		cs.Memory = &statsapi.MemoryStats{Time: metav1.NewTime(time.Unix(0, m.Timestamp)), AvailableBytes: value(m.AvailableBytes),
			UsageBytes: value(m.UsageBytes), WorkingSetBytes: value(m.WorkingSetBytes), RSSBytes: value(m.RssBytes),
			PageFaults: value(m.PageFaults), MajorPageFaults: value(m.MajorPageFaults)}
	}
	if w := c.GetWritableLayer(); w != nil && !light {
		cs.Rootfs = &statsapi.FsStats{Time: metav1.NewTime(time.Unix(0, w.Timestamp)), UsedBytes: value(w.UsedBytes), InodesUsed: value(w.InodesUsed)}
	}
	return cs
}

// sum adds up the containers of a pod.
func sum(list []statsapi.ContainerStats, now metav1.Time) (*statsapi.CPUStats, *statsapi.MemoryStats) {
	var nano, cores, usage, working, rss uint64
	add := func(to *uint64, v *uint64) {
		if v != nil {
			*to += *v
		}
	}
	for _, c := range list {
		if c.CPU != nil {
			add(&nano, c.CPU.UsageCoreNanoSeconds)
			add(&cores, c.CPU.UsageNanoCores)
		}
		if c.Memory != nil {
			add(&usage, c.Memory.UsageBytes)
			add(&working, c.Memory.WorkingSetBytes)
			add(&rss, c.Memory.RSSBytes)
		}
	}
	return &statsapi.CPUStats{Time: now, UsageCoreNanoSeconds: &nano, UsageNanoCores: &cores},
		&statsapi.MemoryStats{Time: now, UsageBytes: &usage, WorkingSetBytes: &working, RSSBytes: &rss}
}

// nodeStats reads what the whole machine uses.
func (a *Agent) nodeStats(now metav1.Time, light bool) statsapi.NodeStats {
	n := statsapi.NodeStats{NodeName: a.opts.NodeName, StartTime: bootTime()}
	busy := busyNanos()
	n.CPU = &statsapi.CPUStats{Time: now, UsageCoreNanoSeconds: &busy}
	info := meminfo()
	available, used := info["MemAvailable"], info["MemTotal"]-info["MemFree"]
	working := info["MemTotal"] - available
	n.Memory = &statsapi.MemoryStats{Time: now, AvailableBytes: &available, UsageBytes: &used, WorkingSetBytes: &working}
	if light {
		return n
	}
	if d, err := statDisk(a.opts.RootDir); err == nil {
		taken := d.total - d.available
		inodesUsed := d.inodes - d.inodesFree
		fs := &statsapi.FsStats{Time: now, AvailableBytes: &d.available, CapacityBytes: &d.total, UsedBytes: &taken,
			Inodes: &d.inodes, InodesFree: &d.inodesFree, InodesUsed: &inodesUsed}
		n.Fs, n.Runtime = fs, &statsapi.RuntimeStats{ImageFs: fs}
	}
	return n
}

// busyNanos is the CPU time that was not idle since boot, in nanoseconds.
func busyNanos() uint64 {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	line, _, _ := strings.Cut(string(b), "\n")
	var busy uint64
	for i, f := range strings.Fields(line) {
		// cpu user nice system idle iowait irq softirq steal guest guest_nice;
		// guest times are part of user and nice.
		if i == 0 || i == 4 || i == 5 || i > 8 {
			continue
		}
		n, _ := strconv.ParseUint(f, 10, 64)
		busy += n * clockTick
	}
	return busy
}

func bootTime() metav1.Time {
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil {
		return metav1.Time{}
	}
	return metav1.NewTime(time.Now().Add(-time.Duration(info.Uptime) * time.Second).Truncate(time.Second))
}
