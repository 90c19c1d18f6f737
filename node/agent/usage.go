package agent

import (
	"context"
	"io/fs"
	"path/filepath"

	v1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	statsapi "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
)

// podUsage reads what the containers of a pod use now.
func (a *Agent) podUsage(ctx context.Context, pod *v1.Pod) (*statsapi.PodStats, error) {
	list, err := a.opts.Runtime.ListContainerStats(ctx, &runtimeapi.ContainerStatsFilter{
		LabelSelector: map[string]string{labelPodUID: string(pod.UID)}})
	if err != nil {
		return nil, err
	}
	out := &statsapi.PodStats{PodRef: statsapi.PodReference{Name: pod.Name, Namespace: pod.Namespace, UID: string(pod.UID)}}
	var working uint64
	for _, c := range list {
		cs := statsapi.ContainerStats{Name: c.GetAttributes().GetMetadata().GetName()}
		if v := c.GetMemory().GetWorkingSetBytes(); v != nil {
			n := v.Value
			working += n
			cs.Memory = &statsapi.MemoryStats{WorkingSetBytes: &n, UsageBytes: &n}
		}
		out.Containers = append(out.Containers, cs)
	}
	out.Memory = &statsapi.MemoryStats{WorkingSetBytes: &working, UsageBytes: &working}
	return out, nil
}

// diskUsage is how much a pod has written: to disk volumes of its own and logs.
func (a *Agent) diskUsage(pod *v1.Pod) int64 {
	total := treeSize(filepath.Join(a.volumes.PodDir(pod.UID), "volumes", "kubernetes.io~empty-dir"))
	return total + treeSize(filepath.Join(a.opts.PodLogsDir, pod.Namespace+"_"+pod.Name+"_"+string(pod.UID)))
}

func treeSize(dir string) int64 {
	var n int64
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil // it went away while we looked
		}
		if info, err := d.Info(); err == nil && info.Mode().IsRegular() {
			n += info.Size()
		}
		return nil
	})
	return n
}
