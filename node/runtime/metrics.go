package runtime

import (
	"context"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// metric is one family of ListPodSandboxMetrics.
type metric struct {
	name, help string
	kind       runtimeapi.MetricType
	value      func(usage) uint64
}

// containerMetrics are the families of cAdvisor that dashboards rely on, as far
// as cgroups tell them.
func containerMetrics() []metric {
	return []metric{
		{"container_cpu_usage_seconds_total", "Cumulative cpu time consumed, in seconds.", runtimeapi.MetricType_COUNTER, func(u usage) uint64 { return u.cpuNanos / uint64(time.Second) }},
		{"container_memory_usage_bytes", "Current memory usage, in bytes.", runtimeapi.MetricType_GAUGE, func(u usage) uint64 { return u.memory }},
		{"container_memory_working_set_bytes", "Current working set, in bytes.", runtimeapi.MetricType_GAUGE, func(u usage) uint64 { return u.workingSet }},
		{"container_memory_rss", "Size of anonymous memory, in bytes.", runtimeapi.MetricType_GAUGE, func(u usage) uint64 { return u.rss }},
		{"container_processes", "Number of processes.", runtimeapi.MetricType_GAUGE, func(u usage) uint64 { return u.pids }},
		{"container_spec_memory_limit_bytes", "Memory limit, in bytes; 0 is none.", runtimeapi.MetricType_GAUGE, func(u usage) uint64 { return u.limit }},
	}
}

func metricLabels() []string { return []string{"id", "name", "image"} }

// ListMetricDescriptors implements internalapi.ContainerStatsManager.
func (r *Runtime) ListMetricDescriptors(context.Context) ([]*runtimeapi.MetricDescriptor, error) {
	var out []*runtimeapi.MetricDescriptor
	for _, m := range containerMetrics() {
		out = append(out, &runtimeapi.MetricDescriptor{Name: m.name, Help: m.help, LabelKeys: metricLabels()})
	}
	return out, nil
}

// ListPodSandboxMetrics implements internalapi.ContainerStatsManager.
func (r *Runtime) ListPodSandboxMetrics(ctx context.Context) ([]*runtimeapi.PodSandboxMetrics, error) {
	list, err := r.ListPodSandbox(ctx, &runtimeapi.PodSandboxFilter{
		State: &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY},
	})
	if err != nil {
		return nil, err
	}
	var out []*runtimeapi.PodSandboxMetrics
	for _, item := range list {
		pod := &runtimeapi.PodSandboxMetrics{PodSandboxId: item.Id}
		for _, c := range r.containersOf(item.Id) {
			if p, _ := c.snapshot(); p == phaseRunning {
				pod.ContainerMetrics = append(pod.ContainerMetrics, r.metricsOf(c))
			}
		}
		out = append(out, pod)
	}
	return out, nil
}

func (r *Runtime) metricsOf(c *container) *runtimeapi.ContainerMetrics {
	_, st := c.snapshot()
	u := r.feats.readUsage(func(controller string) string { return st.CgroupPaths[controller] })
	now := time.Now().UnixNano()
	out := &runtimeapi.ContainerMetrics{ContainerId: c.id}
	for _, m := range containerMetrics() {
		out.Metrics = append(out.Metrics, &runtimeapi.Metric{
			Name: m.name, Timestamp: now, MetricType: m.kind, Value: some(m.value(u)),
			LabelValues: []string{c.rec.Cgroup, c.id, c.rec.ImageName},
		})
	}
	return out
}
