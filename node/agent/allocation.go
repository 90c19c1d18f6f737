package agent

import (
	"context"

	v1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/klog/v2"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	v1qos "k8s.io/kubernetes/pkg/apis/core/v1/helper/qos"
	"k8s.io/kubernetes/pkg/kubelet/allocation"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
	"k8s.io/kubernetes/pkg/kubelet/events"
	"k8s.io/kubernetes/pkg/kubelet/lifecycle"
	upstreamstatus "k8s.io/kubernetes/pkg/kubelet/status"
	kubetypes "k8s.io/kubernetes/pkg/kubelet/types"
	"k8s.io/kubernetes/pkg/scheduler/framework"
)

type imageInfo = kubecontainer.Image

// resizeConditions holds the resize conditions of pods. Upstream's status
// manager does that; it is never started, statuses are ours.
type resizeConditions struct{ upstreamstatus.Manager }

func newResizeConditions() *resizeConditions {
	return &resizeConditions{upstreamstatus.NewManager(nil, nil, nil, nil)}
}

// allSources says that the pods of the API have been read.
type allSources struct{ a *Agent }

func (allSources) AddSource(string) {}

func (s allSources) AllReady() bool {
	s.a.mu.Lock()
	defer s.a.mu.Unlock()
	return s.a.started
}

// buildAllocation makes what admits pods and their resizes.
func (a *Agent) buildAllocation() {
	a.allocation = allocation.NewManager(a.opts.RootDir, a.resizes, func(pod *v1.Pod) { a.poke(pod.UID) },
		a.activePods, a.podByUID, allSources{a}, a.recorder)
	a.allocation.SetContainerRuntime(a.runtime)
	a.allocation.AddPodAdmitHandlers(lifecycle.PodAdmitHandlers{
		pressureHandler{a},
		lifecycle.NewPodFeaturesAdmitHandler(),
		lifecycle.NewPredicateAdmitHandler(
			func(context.Context, bool) (*v1.Node, error) { return a.node.get().DeepCopy(), nil },
			lifecycle.NewAdmissionFailureHandlerStub(),
			func(*framework.NodeInfo, *lifecycle.PodAdmitAttributes) error { return nil }),
		allocation.NewPodResizesAdmitHandler(a.containerManager, a.runtime, a.allocation, klog.Background()),
	})
}

// allocated returns a private copy of a pod with the resources that the node
// has given it.
func (a *Agent) allocated(pod *v1.Pod) *v1.Pod {
	out, changed := a.allocation.UpdatePodFromAllocation(pod)
	if !changed {
		out = pod.DeepCopy()
	}
	return out
}

// specChanged reports whether a newer object asks for other resources.
func (a *Agent) specChanged(w *worker, pod *v1.Pod) bool {
	old, _ := w.current()
	if old.Generation == pod.Generation {
		return false
	}
	for c, kind := range podutil.ContainerIter(&pod.Spec, podutil.InitContainers|podutil.Containers) {
		was := kubecontainer.GetContainerSpec(old, c.Name)
		if was != nil && allocation.IsResizableContainer(c, kind) && !apiequality.Semantic.DeepEqual(was.Resources, c.Resources) {
			return true
		}
	}
	return !apiequality.Semantic.DeepEqual(old.Spec.Resources, pod.Spec.Resources)
}

// retryResizes looks at resizes that had to wait, when a pod has gone.
func (a *Agent) retryResizes() {
	if a.allocation.HasPendingResizes() {
		a.allocation.RetryPendingResizes("pods_removed")
	}
}

// resizeBefore tells whether a resize is under way before a sync.
func (a *Agent) resizeBefore(pod *v1.Pod, rs *kubecontainer.PodStatus) {
	if a.runtime.IsPodResizeInProgress(pod, rs) {
		a.resizes.SetPodResizeInProgressCondition(pod.UID, "", "", pod.Generation)
		return
	}
	if generation, cleared := a.resizes.ClearPodResizeInProgressCondition(pod.UID); cleared {
		a.recorder.Event(pod, v1.EventTypeNormal, events.ResizeCompleted, events.PodResizeCompletedMsg(klog.Background(), pod, generation))
	}
}

// resizeAfter notes a resize that failed.
func (a *Agent) resizeAfter(pod *v1.Pod, result kubecontainer.PodSyncResult) {
	for _, r := range result.SyncResults {
		if r.Action != kubecontainer.ResizePodInPlace || r.Error == nil {
			continue
		}
		if generation, changed := a.resizes.SetPodResizeInProgressCondition(pod.UID, v1.PodReasonError, r.Message, pod.Generation); changed {
			a.recorder.Event(pod, v1.EventTypeWarning, events.ResizeError, events.PodResizeErrorMsg(klog.Background(), pod, generation, r.Message))
		}
	}
}

// pressureHandler keeps pods off a node that is short of something.
type pressureHandler struct{ a *Agent }

func (h pressureHandler) Admit(attrs *lifecycle.PodAdmitAttributes) lifecycle.PodAdmitResult {
	n, pod := h.a.node, attrs.Pod
	memory, disk, pids := n.hasPressure(v1.NodeMemoryPressure), n.hasPressure(v1.NodeDiskPressure), n.hasPressure(v1.NodePIDPressure)
	switch {
	case attrs.Operation != lifecycle.AddOperation, !memory && !disk && !pids, kubetypes.IsCriticalPod(pod):
		return lifecycle.PodAdmitResult{Admit: true}
	case memory && !disk && !pids && (v1qos.GetPodQOS(pod) != v1.PodQOSBestEffort || tolerates(pod, v1.TaintNodeMemoryPressure)):
		return lifecycle.PodAdmitResult{Admit: true}
	}
	var conditions []v1.NodeConditionType
	for t, on := range map[v1.NodeConditionType]bool{v1.NodeMemoryPressure: memory, v1.NodeDiskPressure: disk, v1.NodePIDPressure: pids} {
		if on {
			conditions = append(conditions, t)
		}
	}
	return lifecycle.PodAdmitResult{Reason: reasonEvicted, Message: "The node had condition: " + formatConditions(conditions) + ". "}
}

func tolerates(pod *v1.Pod, taint string) bool {
	for _, t := range pod.Spec.Tolerations {
		if t.ToleratesTaint(klog.Background(), &v1.Taint{Key: taint, Effect: v1.TaintEffectNoSchedule}, false) {
			return true
		}
	}
	return false
}

func qosOf(pod *v1.Pod) v1.PodQOSClass { return v1qos.GetPodQOS(pod) }

func (a *Agent) forgetResizes(uid types.UID) {
	a.resizes.ClearPodResizePendingCondition(uid)
	a.resizes.ClearPodResizeInProgressCondition(uid)
}
