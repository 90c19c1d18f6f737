package status

import (
	"fmt"
	"sort"
	"time"

	v1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
	upstream "k8s.io/kubernetes/pkg/kubelet/status"
	kubetypes "k8s.io/kubernetes/pkg/kubelet/types"
	utilpod "k8s.io/kubernetes/pkg/util/pod"
)

// settle gives a computed status the times that depend on the one before it,
// and brings it into the precision of the API.
func settle(pod *v1.Pod, previous, next *v1.PodStatus, now time.Time) {
	for i := range next.Conditions {
		c := &next.Conditions[i]
		if !kubetypes.PodConditionByKubelet(c.Type) && !kubetypes.PodConditionSharedByKubelet(c.Type) {
			continue
		}
		if _, old := podutil.GetPodCondition(previous, c.Type); old != nil && old.Status == c.Status {
			c.LastTransitionTime = old.LastTransitionTime
		} else {
			c.LastTransitionTime = metav1.NewTime(now)
		}
	}
	switch {
	case !previous.StartTime.IsZero():
		next.StartTime = previous.StartTime.DeepCopy()
	case next.StartTime.IsZero():
		t := metav1.NewTime(now)
		next.StartTime = &t
	}
	next.ObservedGeneration = max(next.ObservedGeneration, previous.ObservedGeneration)
	normalize(pod, next)
}

// normalize drops what the API cannot keep: fractions of seconds, overlong
// termination messages and the order of container statuses.
func normalize(pod *v1.Pod, s *v1.PodStatus) {
	limit := kubecontainer.MaxPodTerminationMessageLogLength
	if n := len(pod.Spec.Containers) + len(pod.Spec.InitContainers) + len(pod.Spec.EphemeralContainers); n > 0 {
		limit /= n
	}
	state := func(c *v1.ContainerState) {
		if c.Running != nil {
			c.Running.StartedAt = c.Running.StartedAt.Rfc3339Copy()
		}
		if t := c.Terminated; t != nil {
			t.StartedAt, t.FinishedAt = t.StartedAt.Rfc3339Copy(), t.FinishedAt.Rfc3339Copy()
			if len(t.Message) > limit {
				t.Message = t.Message[:limit]
			}
		}
	}
	for _, list := range [][]v1.ContainerStatus{s.ContainerStatuses, s.InitContainerStatuses, s.EphemeralContainerStatuses} {
		for i := range list {
			state(&list[i].State)
			state(&list[i].LastTerminationState)
		}
	}
	sort.Sort(kubetypes.SortedContainerStatuses(s.ContainerStatuses))
	kubetypes.SortInitContainerStatuses(pod, s.InitContainerStatuses)
	sort.Sort(kubetypes.SortedContainerStatuses(s.EphemeralContainerStatuses))
	if s.StartTime != nil {
		t := s.StartTime.Rfc3339Copy()
		s.StartTime = &t
	}
	for i := range s.Conditions {
		c := &s.Conditions[i]
		c.LastProbeTime, c.LastTransitionTime = c.LastProbeTime.Rfc3339Copy(), c.LastTransitionTime.Rfc3339Copy()
	}
}

// same reports whether two normalized statuses agree in everything that the
// node owns.
func same(a, b *v1.PodStatus) bool {
	x, y := owned(a), owned(b)
	if len(x) != len(y) {
		return false
	}
	for t, c := range x {
		d, ok := y[t]
		if !ok || c.Status != d.Status || c.Reason != d.Reason || c.Message != d.Message || c.ObservedGeneration != d.ObservedGeneration {
			return false
		}
	}
	copied := *a
	copied.Conditions = b.Conditions
	foreignFields(&copied, b)
	return apiequality.Semantic.DeepEqual(&copied, b)
}

// foreignFields copies the fields of a status that the node does not own.
func foreignFields(to, from *v1.PodStatus) {
	to.ResourceClaimStatuses = from.ResourceClaimStatuses
	to.ExtendedResourceClaimStatus = from.ExtendedResourceClaimStatus
	to.NodeAllocatableResourceClaimStatuses = from.NodeAllocatableResourceClaimStatuses
	to.NominatedNodeName = from.NominatedNodeName
}

func owned(s *v1.PodStatus) map[v1.PodConditionType]v1.PodCondition {
	m := map[v1.PodConditionType]v1.PodCondition{}
	for _, c := range s.Conditions {
		if kubetypes.PodConditionByKubelet(c.Type) || kubetypes.PodConditionSharedByKubelet(c.Type) {
			m[c.Type] = c
		}
	}
	return m
}

// merge lays the node's status over the one in the API: conditions of others
// stay, and a terminal phase waits until no container can be running.
func merge(pod *v1.Pod, api, next v1.PodStatus, mayRun bool, now time.Time) v1.PodStatus {
	ending := !podutil.IsPodPhaseTerminal(api.Phase) && podutil.IsPodPhaseTerminal(next.Phase)
	var conds []v1.PodCondition
	for _, c := range api.Conditions {
		if !kubetypes.PodConditionByKubelet(c.Type) {
			conds = append(conds, c)
		}
	}
	for _, c := range next.Conditions {
		switch {
		case kubetypes.PodConditionByKubelet(c.Type):
			conds = append(conds, c)
		case kubetypes.PodConditionSharedByKubelet(c.Type) && ending && !mayRun:
			if _, old := podutil.GetPodCondition(&api, c.Type); old == nil || old.Status != c.Status {
				c.LastTransitionTime = metav1.NewTime(now).Rfc3339Copy()
			}
			conds = utilpod.ReplaceOrAppendPodCondition(conds, &c)
		}
	}
	next.Conditions = conds
	foreignFields(&next, &api)
	if ending && mayRun {
		next.Phase, next.Reason, next.Message = api.Phase, api.Reason, api.Message
	}
	if podutil.IsPodPhaseTerminal(next.Phase) && (podutil.IsPodReadyConditionTrue(next) || podutil.IsContainersReadyConditionTrue(next)) {
		ready := upstream.GenerateContainersReadyCondition(pod, &api, next.ContainerStatuses, next.Phase)
		podutil.UpdatePodCondition(&next, &ready)
		podReady := upstream.GeneratePodReadyCondition(pod, &api, next.Conditions, next.ContainerStatuses, next.Phase)
		podutil.UpdatePodCondition(&next, &podReady)
	}
	return next
}

// Finish returns the last status of a pod whose containers are all gone: what
// is still unknown counts as failed, and the phase is terminal. Static pods
// keep their phase.
func Finish(pod *v1.Pod, s v1.PodStatus) v1.PodStatus {
	s = *s.DeepCopy()
	lost := v1.ContainerState{Terminated: &v1.ContainerStateTerminated{
		Reason: kubecontainer.ContainerReasonStatusUnknown, Message: msgLost, ExitCode: exitCodeLost}}
	if initialized(pod, &s) {
		for i := range s.ContainerStatuses {
			if s.ContainerStatuses[i].State.Terminated == nil {
				s.ContainerStatuses[i].State = *lost.DeepCopy()
			}
		}
	}
	last := 0
	for i := range s.InitContainerStatuses {
		if c := &s.InitContainerStatuses[i]; c.State.Waiting == nil || c.LastTerminationState.Terminated != nil {
			last = i
		}
	}
	for i := range s.InitContainerStatuses {
		if c := &s.InitContainerStatuses[i]; i <= last && c.State.Terminated == nil {
			c.State = *lost.DeepCopy()
		}
	}
	if !podutil.IsPodPhaseTerminal(s.Phase) && !kubetypes.IsStaticPod(pod) {
		s.Phase = v1.PodFailed
	}
	return s
}

// initialized reports whether app containers of the pod may have run.
func initialized(pod *v1.Pod, s *v1.PodStatus) bool {
	if len(pod.Spec.InitContainers) == 0 {
		return true
	}
	for _, c := range s.ContainerStatuses {
		if c.LastTerminationState.Terminated != nil || c.State.Waiting == nil {
			return true
		}
	}
	n := len(pod.Spec.InitContainers)
	spec := &pod.Spec.InitContainers[n-1]
	c, found := podutil.GetContainerStatus(s.InitContainerStatuses, spec.Name)
	if !found {
		return false
	}
	if podutil.IsRestartableInitContainer(spec) {
		return c.State.Running != nil && c.Started != nil && *c.Started
	}
	succeeded := func(t *v1.ContainerStateTerminated) bool { return t != nil && t.ExitCode == 0 }
	return succeeded(c.State.Terminated) || succeeded(c.LastTerminationState.Terminated)
}

// checkTransition refuses a status in which a container that ended for good
// runs again: a sign of stale data.
func checkTransition(pod *v1.Pod, previous, next *v1.PodStatus) error {
	if pod.Spec.RestartPolicy == v1.RestartPolicyAlways || podutil.AllContainersCouldRestart(&pod.Spec) {
		return nil
	}
	check := func(specs []v1.Container, old, now []v1.ContainerStatus) error {
		for i := range specs {
			c := &specs[i]
			if podutil.IsRestartableInitContainer(c) {
				continue
			}
			was, _ := podutil.GetContainerStatus(old, c.Name)
			is, found := podutil.GetContainerStatus(now, c.Name)
			if was.State.Terminated == nil || !found || is.State.Terminated != nil ||
				podutil.ContainerShouldRestart(*c, pod.Spec, was.State.Terminated.ExitCode) {
				continue
			}
			return fmt.Errorf("container %q of pod %s/%s ended for good and cannot run again", c.Name, pod.Namespace, pod.Name)
		}
		return nil
	}
	if err := check(pod.Spec.Containers, previous.ContainerStatuses, next.ContainerStatuses); err != nil {
		return err
	}
	return check(pod.Spec.InitContainers, previous.InitContainerStatuses, next.InitContainerStatuses)
}
