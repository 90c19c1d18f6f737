package status

import (
	"slices"
	"sort"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/klog/v2"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	"k8s.io/kubernetes/pkg/kubelet/cm"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
	"k8s.io/kubernetes/pkg/kubelet/kuberuntime"
	kubetypes "k8s.io/kubernetes/pkg/kubelet/types"
)

const (
	reasonContainerCreating = "ContainerCreating"
	reasonPodInitializing   = "PodInitializing"

	msgLost       = "The container could not be located when the pod was terminated"
	msgLostBefore = "The container could not be located when the pod was deleted.  The container used to be Running"
	msgReset      = "The container is removed because RestartAllContainers in place"
	msgInitGone   = "Unable to get init container status from container runtime and pod has been initialized, treat it as exited normally"

	exitCodeLost = 137
)

// containerKind selects one of the three lists of a pod's containers.
type containerKind int

const (
	kindInit containerKind = iota
	kindApp
	kindEphemeral
)

// list computes the statuses of one kind of containers: what the runtime knows,
// over what was reported before, over a default "waiting".
type list struct {
	in         *Input
	kind       containerKind
	specs      []v1.Container
	old        map[string]v1.ContainerStatus
	restarting bool // a RestartAllContainers rule is at work
	out        map[string]*v1.ContainerStatus
}

func containerStatuses(in *Input, kind containerKind, specs []v1.Container, previous []v1.ContainerStatus, restarting bool) []v1.ContainerStatus {
	l := &list{in: in, kind: kind, specs: specs, restarting: restarting,
		old: make(map[string]v1.ContainerStatus, len(previous)),
		out: make(map[string]*v1.ContainerStatus, len(specs))}
	for _, s := range previous {
		l.old[s.Name] = s
	}
	for i := range specs {
		l.out[specs[i].Name] = l.initial(&specs[i])
	}
	for i := range specs {
		l.inferLost(specs[i].Name)
	}
	l.applyRuntime()
	for i := range specs {
		l.applyStartFailure(&specs[i])
	}
	return l.sorted()
}

func (l *list) waitingReason() string {
	if len(l.in.Pod.Spec.InitContainers) > 0 {
		return reasonPodInitializing
	}
	return reasonContainerCreating
}

// initial is the status of a container that the runtime says nothing about.
func (l *list) initial(c *v1.Container) *v1.ContainerStatus {
	s := &v1.ContainerStatus{
		Name: c.Name, Image: c.Image,
		State:        v1.ContainerState{Waiting: &v1.ContainerStateWaiting{Reason: l.waitingReason()}},
		VolumeMounts: mountStatuses(c, l.in.RecursiveReadOnly),
	}
	if old, found := l.old[c.Name]; found {
		if old.State.Terminated != nil {
			return old.DeepCopy()
		}
		s.RestartCount = old.RestartCount
		s.LastTerminationState = *old.LastTerminationState.DeepCopy()
	}
	return s
}

func mountStatuses(c *v1.Container, supported bool) []v1.VolumeMountStatus {
	var out []v1.VolumeMountStatus
	for _, m := range c.VolumeMounts {
		s := v1.VolumeMountStatus{Name: m.Name, MountPath: m.MountPath, ReadOnly: m.ReadOnly}
		if m.ReadOnly {
			mode := v1.RecursiveReadOnlyDisabled
			if want := m.RecursiveReadOnly; want != nil && supported &&
				(*want == v1.RecursiveReadOnlyEnabled || *want == v1.RecursiveReadOnlyIfPossible) {
				mode = v1.RecursiveReadOnlyEnabled
			}
			s.RecursiveReadOnly = &mode
		}
		out = append(out, s)
	}
	return out
}

// inferLost fills in how a container ended that was reported as running and
// that the runtime no longer knows.
func (l *list) inferLost(name string) {
	old, reported := l.old[name]
	if !reported || l.in.Runtime.FindContainerStatusByName(name) != nil {
		return
	}
	s := l.out[name]
	if l.restarting && old.State.Waiting == nil {
		s.State = v1.ContainerState{Waiting: &v1.ContainerStateWaiting{Reason: reasonRestartingAll, Message: msgReset}}
		s.LastTerminationState.Terminated = &v1.ContainerStateTerminated{Reason: reasonRestartingAll, Message: msgReset, ExitCode: exitCodeLost}
		s.RestartCount = old.RestartCount + 1
		return
	}
	isDefault := s.State.Waiting != nil && s.State.Waiting.Reason == l.waitingReason()
	if old.State.Running == nil || !isDefault || s.LastTerminationState.Terminated != nil {
		return
	}
	s.LastTerminationState.Terminated = &v1.ContainerStateTerminated{
		Reason: kubecontainer.ContainerReasonStatusUnknown, Message: msgLostBefore, ExitCode: exitCodeLost,
	}
	if l.in.Pod.DeletionTimestamp == nil {
		s.RestartCount++
	}
}

// applyRuntime puts the newest container of each name in as state and the one
// before it as last state.
func (l *list) applyRuntime() {
	newestFirst := slices.Clone(l.in.Runtime.ContainerStatuses)
	sort.Sort(sort.Reverse(kubecontainer.SortContainerStatusesByCreationTime(newestFirst)))
	seen := map[string]int{}
	for _, cs := range newestFirst {
		if l.out[cs.Name] == nil || seen[cs.Name] >= 2 {
			continue
		}
		s := l.fromRuntime(cs)
		if seen[cs.Name] == 0 {
			l.out[cs.Name] = s
		} else {
			l.out[cs.Name].LastTerminationState = s.State
		}
		seen[cs.Name]++
	}
}

func (l *list) fromRuntime(cs *kubecontainer.Status) *v1.ContainerStatus {
	s := &v1.ContainerStatus{
		Name: cs.Name, RestartCount: int32(cs.RestartCount), Image: cs.Image,
		ImageID: cs.ImageRef, ContainerID: cs.ID.String(),
	}
	var old *v1.ContainerStatus
	if o, found := l.old[cs.Name]; found {
		old = &o
		s.VolumeMounts = o.VolumeMounts
		inheritHistory(s, old)
	} else if c := l.spec(cs.Name); c != nil {
		s.VolumeMounts = mountStatuses(c, l.in.RecursiveReadOnly)
	}
	l.setState(s, cs, old)
	if cs.State == kubecontainer.ContainerStateRunning && old != nil && old.Started != nil {
		started := *old.Started
		s.Started = &started
	}
	if c := kubecontainer.GetContainerSpec(l.in.Pod, cs.Name); c != nil {
		s.Resources = resourcesOf(c, s, cs, old)
		s.AllocatedResources = c.Resources.Requests.DeepCopy()
	}
	if cs.User != nil && cs.User.Linux != nil {
		s.User = &v1.ContainerUser{Linux: &v1.LinuxContainerUser{
			UID: cs.User.Linux.UID, GID: cs.User.Linux.GID, SupplementalGroups: cs.User.Linux.SupplementalGroups}}
	}
	return s
}

// inheritHistory keeps restart count and last state over a removal of old
// containers from the runtime.
func inheritHistory(s, old *v1.ContainerStatus) {
	s.RestartCount = max(s.RestartCount, old.RestartCount)
	if old.ContainerID != s.ContainerID && old.State.Terminated != nil {
		s.LastTerminationState.Terminated = old.State.Terminated.DeepCopy()
	} else if old.LastTerminationState.Terminated != nil {
		s.LastTerminationState.Terminated = old.LastTerminationState.Terminated.DeepCopy()
	}
}

func (l *list) setState(s *v1.ContainerStatus, cs *kubecontainer.Status, old *v1.ContainerStatus) {
	switch {
	case cs.State == kubecontainer.ContainerStateRunning:
		s.State.Running = &v1.ContainerStateRunning{StartedAt: metav1.NewTime(cs.StartedAt)}
		if old != nil && old.State.Terminated != nil && old.RestartCount >= int32(cs.RestartCount) {
			s.RestartCount = old.RestartCount + 1
		}
	case cs.State == kubecontainer.ContainerStateExited:
		s.State.Terminated = &v1.ContainerStateTerminated{
			ExitCode: int32(cs.ExitCode), Reason: cs.Reason, Message: cs.Message,
			StartedAt: metav1.NewTime(cs.StartedAt), FinishedAt: metav1.NewTime(cs.FinishedAt),
			ContainerID: s.ContainerID,
		}
	case cs.State == kubecontainer.ContainerStateUnknown && old != nil && old.State.Running != nil:
		reason := kubecontainer.ContainerReasonStatusUnknown
		if l.restarting {
			reason = reasonRestartingAll
		}
		s.State.Terminated = &v1.ContainerStateTerminated{Reason: reason, Message: msgLost, ExitCode: exitCodeLost}
		s.RestartCount = old.RestartCount + 1
	default:
		s.State.Waiting = &v1.ContainerStateWaiting{}
	}
}

// resourcesOf reports the resources that are in force: the allocated ones,
// replaced by what the runtime says of a running container.
func resourcesOf(c *v1.Container, s *v1.ContainerStatus, cs *kubecontainer.Status, old *v1.ContainerStatus) *v1.ResourceRequirements {
	res := c.Resources.DeepCopy()
	if cs.State != kubecontainer.ContainerStateRunning {
		return res
	}
	actual := cs.Resources
	if actual == nil {
		actual = &kubecontainer.ContainerResources{}
	}
	var before v1.ResourceRequirements
	if old != nil && old.State.Running != nil && old.ContainerID == s.ContainerID && old.Resources != nil {
		before = *old.Resources
	}
	keep := func(to, from v1.ResourceList, name v1.ResourceName) {
		if q, ok := from[name]; ok {
			to[name] = q.DeepCopy()
		}
	}
	if res.Limits != nil {
		switch q := actual.CPULimit; {
		case q == nil:
			keep(res.Limits, before.Limits, v1.ResourceCPU)
		case q.MilliValue() > cm.MinMilliCPULimit || res.Limits.Cpu().MilliValue() > cm.MinMilliCPULimit:
			res.Limits[v1.ResourceCPU] = q.DeepCopy()
		}
		if q := actual.MemoryLimit; q != nil {
			res.Limits[v1.ResourceMemory] = q.DeepCopy()
		} else {
			keep(res.Limits, before.Limits, v1.ResourceMemory)
		}
	}
	if res.Requests != nil {
		switch q := actual.CPURequest; {
		case q == nil:
			keep(res.Requests, before.Requests, v1.ResourceCPU)
		case q.MilliValue() > cm.MinShares || res.Requests.Cpu().MilliValue() > cm.MinShares:
			res.Requests[v1.ResourceCPU] = q.DeepCopy()
		}
		if q := actual.MemoryRequest; q != nil {
			res.Requests[v1.ResourceMemory] = q.DeepCopy()
		} else {
			keep(res.Requests, before.Requests, v1.ResourceMemory)
		}
	}
	return res
}

// applyStartFailure shows why a container that should run does not: the error
// of the last attempt to start it becomes the waiting reason.
func (l *list) applyStartFailure(c *v1.Container) {
	if l.kind == kindInit && l.initDone(c) {
		return
	}
	if !kubecontainer.ShouldContainerBeRestarted(klog.Background(), c, l.in.Pod, l.in.Runtime) {
		return
	}
	reason, message, failed := l.in.StartFailure(c.Name)
	if !failed {
		return
	}
	s := l.out[c.Name]
	if s.State.Terminated != nil {
		s.LastTerminationState = s.State
	}
	s.State = v1.ContainerState{Waiting: &v1.ContainerStateWaiting{Reason: reason, Message: message}}
}

// initDone reports whether the init container finished well. One that the
// runtime forgot must have, when app containers exist already.
func (l *list) initDone(c *v1.Container) bool {
	rs := l.in.Runtime.FindContainerStatusByName(c.Name)
	if rs != nil {
		return rs.State == kubecontainer.ContainerStateExited && rs.ExitCode == 0
	}
	s := l.out[c.Name]
	if podutil.IsRestartableInitContainer(c) || s.State.Waiting == nil || !kuberuntime.HasAnyRegularContainerCreated(l.in.Pod, l.in.Runtime) {
		return false
	}
	s.State = v1.ContainerState{Terminated: &v1.ContainerStateTerminated{Reason: "Completed", Message: msgInitGone}}
	return true
}

func (l *list) spec(name string) *v1.Container {
	for i := range l.specs {
		if l.specs[i].Name == name {
			return &l.specs[i]
		}
	}
	return nil
}

func (l *list) sorted() []v1.ContainerStatus {
	if l.kind == kindInit {
		return kubetypes.SortStatusesOfInitContainers(l.in.Pod, l.out)
	}
	var out []v1.ContainerStatus
	for _, s := range l.out {
		out = append(out, *s)
	}
	sort.Sort(kubetypes.SortedContainerStatuses(out))
	return out
}
