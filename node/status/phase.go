package status

import (
	v1 "k8s.io/api/core/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	kubetypes "k8s.io/kubernetes/pkg/kubelet/types"
)

// reasonRestartingAll marks containers that a RestartAllContainers rule stopped.
const reasonRestartingAll = "RestartingAllContainers"

// exitOf returns how the container last ended, if it is not running now, and
// whether it may start again.
func exitOf(pod *v1.Pod, c *v1.Container, t *v1.ContainerStateTerminated) (failed, restartable bool) {
	restartable = podutil.ContainerShouldRestart(*c, pod.Spec, t.ExitCode) || t.Reason == reasonRestartingAll
	return t.ExitCode != 0, restartable
}

// initTally counts the ordinary init containers of a pod.
type initTally struct {
	pending int // not finished
	fatal   int // failed for good
}

func tallyInit(pod *v1.Pod, statuses []v1.ContainerStatus) initTally {
	var t initTally
	for i := range pod.Spec.InitContainers {
		c := &pod.Spec.InitContainers[i]
		if podutil.IsRestartableInitContainer(c) {
			continue
		}
		s, found := podutil.GetContainerStatus(statuses, c.Name)
		if !found {
			t.pending++
			continue
		}
		ended := s.State.Terminated
		if ended == nil && s.State.Waiting != nil {
			ended = s.LastTerminationState.Terminated
		}
		if ended == nil {
			t.pending++
			continue
		}
		if failed, restartable := exitOf(pod, c, ended); failed && !restartable {
			t.fatal++
		}
	}
	return t
}

// mainTally counts the app containers and sidecars of a pod.
type mainTally struct {
	unknown, running, waiting int
	stopped                   int // app containers not running that ran once
	stoppedForGood            int // of these, those that will not start again
	succeeded                 int // app containers with exit code 0
	pendingSidecars           int // sidecars that have not started once
}

func (t *mainTally) addSidecar(s v1.ContainerStatus, found bool) {
	switch {
	case !found:
		t.unknown++
	case s.State.Running != nil:
		if s.Started == nil || !*s.Started {
			t.pendingSidecars++
		}
		t.running++
	case s.State.Terminated != nil:
		// A stopped sidecar has no say in the phase.
	case s.State.Waiting != nil:
		if s.LastTerminationState.Terminated == nil {
			t.pendingSidecars++
			t.waiting++
		}
	default:
		t.pendingSidecars++
		t.unknown++
	}
}

func (t *mainTally) addApp(pod *v1.Pod, c *v1.Container, s v1.ContainerStatus, found bool) {
	switch {
	case !found:
		t.unknown++
	case s.State.Running != nil:
		t.running++
	case s.State.Terminated != nil:
		failed, restartable := exitOf(pod, c, s.State.Terminated)
		t.stopped++
		if !restartable {
			t.stoppedForGood++
		}
		if !failed {
			t.succeeded++
		}
	case s.State.Waiting != nil && s.LastTerminationState.Terminated != nil:
		t.stopped++
		if _, restartable := exitOf(pod, c, s.LastTerminationState.Terminated); !restartable {
			t.stoppedForGood++
		}
	case s.State.Waiting != nil:
		t.waiting++
	default:
		t.unknown++
	}
}

func tallyMain(pod *v1.Pod, statuses []v1.ContainerStatus) mainTally {
	var t mainTally
	for i := range pod.Spec.InitContainers {
		if c := &pod.Spec.InitContainers[i]; podutil.IsRestartableInitContainer(c) {
			s, found := podutil.GetContainerStatus(statuses, c.Name)
			t.addSidecar(s, found)
		}
	}
	for i := range pod.Spec.Containers {
		c := &pod.Spec.Containers[i]
		s, found := podutil.GetContainerStatus(statuses, c.Name)
		t.addApp(pod, c, s, found)
	}
	return t
}

// phaseOf derives the phase of a pod from its container statuses (init and
// app). terminal says that nothing will be started again, initialized that app
// containers have been started in the present sandbox.
// Source: https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/#pod-phase
func phaseOf(pod *v1.Pod, statuses []v1.ContainerStatus, terminal, initialized bool) v1.PodPhase {
	inits, main := tallyInit(pod, statuses), tallyMain(pod, statuses)
	switch {
	case inits.fatal > 0:
		return v1.PodFailed
	case inits.pending > 0, main.pendingSidecars > 0 && !initialized, main.waiting > 0:
		return v1.PodPending
	case main.running > 0 && main.unknown == 0:
		return v1.PodRunning
	case main.running == 0 && main.stopped > 0 && main.unknown == 0:
		return stoppedPhase(main, terminal && !kubetypes.IsStaticPod(pod))
	}
	return v1.PodPending
}

func stoppedPhase(t mainTally, terminal bool) v1.PodPhase {
	switch {
	case !terminal && t.stopped != t.stoppedForGood:
		return v1.PodRunning // some of them are about to start again
	case t.stopped == t.succeeded:
		return v1.PodSucceeded
	}
	return v1.PodFailed
}
