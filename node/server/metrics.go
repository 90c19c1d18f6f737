package server

import (
	"bytes"
	"fmt"
	"net/http"
	"time"

	statsapi "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
)

// family is one metric of the resource metrics endpoint.
// Source: https://kubernetes.io/docs/reference/instrumentation/node-metrics/
type family struct {
	name, kind, help string
	samples          bytes.Buffer
}

func (f *family) add(labels string, value float64, at time.Time) {
	if labels != "" {
		labels = "{" + labels + "}"
	}
	fmt.Fprintf(&f.samples, "%s%s %v %d\n", f.name, labels, value, at.UnixMilli())
}

func (f *family) addCPU(labels string, c *statsapi.CPUStats) {
	if c != nil && c.UsageCoreNanoSeconds != nil {
		f.add(labels, float64(*c.UsageCoreNanoSeconds)/1e9, c.Time.Time)
	}
}

func (f *family) addMemory(labels string, m *statsapi.MemoryStats) {
	if m != nil && m.WorkingSetBytes != nil {
		f.add(labels, float64(*m.WorkingSetBytes), m.Time.Time)
	}
}

// resourceMetrics is what metrics-server reads.
func (s *Server) resourceMetrics(w http.ResponseWriter, r *http.Request) {
	failed := 0.0
	sum, err := s.opts.Host.Summary(r.Context(), true)
	if err != nil {
		failed, sum = 1, &statsapi.Summary{}
	}
	nodeCPU := &family{name: "node_cpu_usage_seconds_total", kind: "counter", help: "Cumulative cpu time consumed by the node in core-seconds"}
	nodeMemory := &family{name: "node_memory_working_set_bytes", kind: "gauge", help: "Current working set of the node in bytes"}
	cpu := &family{name: "container_cpu_usage_seconds_total", kind: "counter", help: "Cumulative cpu time consumed by the container in core-seconds"}
	memory := &family{name: "container_memory_working_set_bytes", kind: "gauge", help: "Current working set of the container in bytes"}
	start := &family{name: "container_start_time_seconds", kind: "gauge", help: "Start time of the container since unix epoch in seconds"}
	podCPU := &family{name: "pod_cpu_usage_seconds_total", kind: "counter", help: "Cumulative cpu time consumed by the pod in core-seconds"}
	podMemory := &family{name: "pod_memory_working_set_bytes", kind: "gauge", help: "Current working set of the pod in bytes"}
	nodeCPU.addCPU("", sum.Node.CPU)
	nodeMemory.addMemory("", sum.Node.Memory)
	for i := range sum.Pods {
		p := &sum.Pods[i]
		pl := fmt.Sprintf("namespace=%q,pod=%q", p.PodRef.Namespace, p.PodRef.Name)
		podCPU.addCPU(pl, p.CPU)
		podMemory.addMemory(pl, p.Memory)
		for j := range p.Containers {
			c := &p.Containers[j]
			cl := fmt.Sprintf("container=%q,%s", c.Name, pl)
			cpu.addCPU(cl, c.CPU)
			memory.addMemory(cl, c.Memory)
			if !c.StartTime.IsZero() {
				start.add(cl, float64(c.StartTime.UnixNano())/1e9, c.StartTime.Time)
			}
		}
	}
	var out bytes.Buffer
	for _, f := range []*family{cpu, memory, start, nodeCPU, nodeMemory, podCPU, podMemory} {
		if f.samples.Len() > 0 {
			fmt.Fprintf(&out, "# HELP %s [STABLE] %s\n# TYPE %s %s\n", f.name, f.help, f.name, f.kind)
			_, _ = f.samples.WriteTo(&out)
		}
	}
	fmt.Fprintf(&out, "# HELP resource_scrape_error [STABLE] 1 if there was an error while getting container metrics, 0 otherwise\n"+
		"# TYPE resource_scrape_error gauge\nresource_scrape_error %v\n", failed)
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	_, _ = out.WriteTo(w)
}
