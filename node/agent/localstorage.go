package agent

import (
	"context"
	"fmt"
	"path/filepath"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	resourcehelper "k8s.io/component-helpers/resource"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	"knarr/node/status"
)

// limitsStorage reports whether the pod bounds what it may write to the node's
// disk; only such pods are looked at.
func limitsStorage(pod *v1.Pod) bool {
	for i := range pod.Spec.Volumes {
		if e := pod.Spec.Volumes[i].EmptyDir; e != nil && e.SizeLimit != nil && e.SizeLimit.Sign() > 0 && e.Medium != v1.StorageMediumMemory {
			return true
		}
	}
	_, ok := resourcehelper.PodLimits(pod, resourcehelper.PodResourcesOptions{})[v1.ResourceEphemeralStorage]
	return ok
}

// enforceStorage evicts pods that wrote more than they may, and reports
// whether there are pods to keep an eye on.
func (p *pressure) enforceStorage(ctx context.Context) bool {
	watching := false
	for _, pod := range p.a.activePods() {
		if pod.DeletionTimestamp != nil || !limitsStorage(pod) {
			continue
		}
		watching = true
		message, err := p.storageExcess(ctx, pod)
		if err != nil && ctx.Err() == nil {
			klog.FromContext(ctx).Error(err, "Disk use of pod not known", "pod", klog.KObj(pod))
		}
		if message == "" {
			continue
		}
		p.a.recorder.Event(pod, v1.EventTypeWarning, reasonEvicted, message)
		if w := p.a.worker(pod.UID); w != nil {
			now := int64(0)
			w.evict(status.Override{Reason: reasonEvicted, Message: message}, &now, &v1.PodCondition{
				Type: v1.DisruptionTarget, Status: v1.ConditionTrue, Reason: v1.PodReasonTerminationByKubelet, Message: message})
		}
	}
	return watching
}

// storageExcess says, if so, how the pod wrote more than it may.
func (p *pressure) storageExcess(ctx context.Context, pod *v1.Pod) (string, error) {
	volumes := filepath.Join(p.a.volumes.PodDir(pod.UID), "volumes", "kubernetes.io~empty-dir")
	total := int64(0)
	for i := range pod.Spec.Volumes {
		v := &pod.Spec.Volumes[i]
		if v.EmptyDir == nil || v.EmptyDir.Medium == v1.StorageMediumMemory {
			continue
		}
		used := treeSize(filepath.Join(volumes, v.Name))
		total += used
		if limit := v.EmptyDir.SizeLimit; limit != nil && limit.Sign() > 0 && used > limit.Value() {
			return fmt.Sprintf("Usage of EmptyDir volume %q exceeds the limit %q. ", v.Name, limit.String()), nil
		}
	}
	limits := resourcehelper.PodLimits(pod, resourcehelper.PodResourcesOptions{})
	limit, limited := limits[v1.ResourceEphemeralStorage]
	if !limited {
		return "", nil
	}
	written, err := p.written(ctx, pod)
	if err != nil {
		return "", err
	}
	for i := range pod.Spec.Containers {
		c := &pod.Spec.Containers[i]
		total += written[c.Name]
		if q, ok := c.Resources.Limits[v1.ResourceEphemeralStorage]; ok && written[c.Name] > q.Value() {
			return fmt.Sprintf("Container %s exceeded its local ephemeral storage limit %q. ", c.Name, q.String()), nil
		}
	}
	if resource.NewQuantity(total, resource.BinarySI).Cmp(limit) > 0 {
		return fmt.Sprintf("Pod ephemeral local storage usage exceeds the total limit of containers %s. ", limit.String()), nil
	}
	return "", nil
}

// written is what the containers of a pod wrote to their root file system and
// log, by name, in bytes.
func (p *pressure) written(ctx context.Context, pod *v1.Pod) (map[string]int64, error) {
	list, err := p.a.opts.Runtime.ListContainerStats(ctx, &runtimeapi.ContainerStatsFilter{LabelSelector: map[string]string{labelPodUID: string(pod.UID)}})
	if err != nil {
		return nil, err
	}
	logs := filepath.Join(p.a.opts.PodLogsDir, pod.Namespace+"_"+pod.Name+"_"+string(pod.UID))
	out := map[string]int64{}
	for _, c := range list {
		name := c.GetAttributes().GetMetadata().GetName()
		out[name] = int64(c.GetWritableLayer().GetUsedBytes().GetValue()) + treeSize(filepath.Join(logs, name))
	}
	return out, nil
}
