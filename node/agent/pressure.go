package agent

import (
	"context"
	"fmt"
	"slices"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	resourcehelper "k8s.io/component-helpers/resource"
	"k8s.io/klog/v2"
	v1qos "k8s.io/kubernetes/pkg/apis/core/v1/helper/qos"
	kubetypes "k8s.io/kubernetes/pkg/kubelet/types"

	"knarr/node/status"
)

const (
	reasonEvicted = "Evicted"

	// The node is looked at often only while it is near one of its limits:
	// closer than nearFactor times what has to stay free.
	checkFar   = time.Minute
	checkNear  = 10 * time.Second
	nearFactor = 3
	// pressureHold is how long a condition stays after the shortage is over.
	pressureHold = 5 * time.Minute
	// inodesPercent of the inodes have to stay free.
	inodesPercent = 5
)

// pressure watches memory and disk and evicts pods when they run short, as
// upstream's hard thresholds say. Not for concurrent use.
type pressure struct {
	a      *Agent
	images *imageGC
	last   map[v1.NodeConditionType]time.Time
}

func newPressure(a *Agent, images *imageGC) *pressure {
	return &pressure{a: a, images: images, last: map[v1.NodeConditionType]time.Time{}}
}

// shortage is a resource of which less is left than has to be.
type shortage struct {
	condition v1.NodeConditionType
	resource  v1.ResourceName
	signal    string
	threshold resource.Quantity
	available resource.Quantity
	near      bool
	short     bool
}

// check looks at the node, acts, and returns when to look again.
func (p *pressure) check(ctx context.Context) time.Duration {
	wait, now := checkFar, time.Now()
	if p.enforceStorage(ctx) {
		wait = checkNear
	}
	for _, s := range p.measure() {
		if s.near {
			wait = checkNear
		}
		if !s.short {
			if last, ok := p.last[s.condition]; ok && now.Sub(last) >= pressureHold {
				delete(p.last, s.condition)
				p.a.node.setPressure(s.condition, false)
			} else if ok {
				wait = checkNear
			}
			continue
		}
		p.last[s.condition] = now
		p.a.node.setPressure(s.condition, true)
		if p.relieve(ctx, s) {
			continue
		}
		p.evictOne(ctx, s)
	}
	return wait
}

// measure compares what is left with what has to be.
func (p *pressure) measure() []shortage {
	var out []shortage
	add := func(c v1.NodeConditionType, r v1.ResourceName, signal string, available, threshold uint64) {
		out = append(out, shortage{condition: c, resource: r, signal: signal,
			available: *resource.NewQuantity(int64(available), resource.BinarySI),
			threshold: *resource.NewQuantity(int64(threshold), resource.BinarySI),
			near:      available < nearFactor*threshold, short: available < threshold})
	}
	if available, ok := meminfo()["MemAvailable"]; ok {
		add(v1.NodeMemoryPressure, v1.ResourceMemory, "memory.available", available, evictMemoryBytes)
	}
	if d, err := statDisk(p.a.opts.RootDir); err == nil && d.total > 0 {
		add(v1.NodeDiskPressure, v1.ResourceEphemeralStorage, "nodefs.available", d.available, d.total*evictDiskPercent/100)
		if d.inodes > 0 && d.inodesFree < d.inodes*inodesPercent/100 {
			add(v1.NodeDiskPressure, "inodes", "nodefs.inodesFree", d.inodesFree, d.inodes*inodesPercent/100)
		}
	}
	return out
}

// relieve frees disk space without harm to pods and reports whether it sufficed.
func (p *pressure) relieve(ctx context.Context, s shortage) bool {
	if s.condition != v1.NodeDiskPressure {
		return false
	}
	want := s.threshold.Value() - s.available.Value()
	freed, err := p.images.free(ctx, want)
	if err != nil {
		klog.FromContext(ctx).Error(err, "Unused images not removed under disk pressure")
	}
	return err == nil && freed >= want
}

// evictOne ends the pod that is first in line.
func (p *pressure) evictOne(ctx context.Context, s shortage) {
	var pods []*v1.Pod
	for _, pod := range p.a.activePods() {
		if pod.DeletionTimestamp == nil && !kubetypes.IsCriticalPod(pod) && !kubetypes.IsStaticPod(pod) {
			pods = append(pods, pod)
		}
	}
	used := map[*v1.Pod]int64{}
	for _, pod := range pods {
		used[pod] = p.usage(pod, s.resource)
	}
	rank(pods, used, s.resource)
	if len(pods) == 0 {
		return
	}
	victim := pods[0]
	message := fmt.Sprintf("The node was low on resource: %s. Threshold quantity: %s, available: %s. ", s.resource, s.threshold.String(), s.available.String())
	p.a.recorder.Event(victim, v1.EventTypeWarning, reasonEvicted, message)
	klog.FromContext(ctx).Info("Evicting pod", "pod", klog.KObj(victim), "signal", s.signal)
	if w := p.a.worker(victim.UID); w != nil {
		now := int64(0)
		w.evict(status.Override{Reason: reasonEvicted, Message: message}, &now, &v1.PodCondition{
			Type: v1.DisruptionTarget, Status: v1.ConditionTrue, Reason: v1.PodReasonTerminationByKubelet, Message: message})
	}
}

func (p *pressure) usage(pod *v1.Pod, r v1.ResourceName) int64 {
	if r == v1.ResourceMemory {
		n, err := p.a.cgroups.GetPodCgroupMemoryUsage(pod)
		if err != nil {
			return 0
		}
		return int64(n)
	}
	return p.a.diskUsage(pod)
}

// rank orders pods for eviction: who uses more than requested, then lower
// priority, then more use above the request.
func rank(pods []*v1.Pod, used map[*v1.Pod]int64, r v1.ResourceName) {
	over := func(pod *v1.Pod) int64 {
		req := resourcehelper.PodRequests(pod, resourcehelper.PodResourcesOptions{})[r]
		return used[pod] - req.Value()
	}
	priority := func(pod *v1.Pod) int32 {
		if pod.Spec.Priority == nil {
			return 0
		}
		return *pod.Spec.Priority
	}
	slices.SortStableFunc(pods, func(x, y *v1.Pod) int {
		ox, oy := over(x), over(y)
		switch {
		case (ox > 0) != (oy > 0):
			if ox > 0 {
				return -1
			}
			return 1
		case priority(x) != priority(y):
			return int(priority(x)) - int(priority(y))
		case ox > oy:
			return -1
		case ox < oy:
			return 1
		case v1qos.GetPodQOS(x) == v1.PodQOSBestEffort && v1qos.GetPodQOS(y) != v1.PodQOSBestEffort:
			return -1
		}
		return 0
	})
}
