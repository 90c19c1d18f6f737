// Package status turns what the runtime knows about a pod into the pod status
// of the API (Compute, a pure function) and sends it there (Writer).
//
// Reasons, messages and conditions are upstream's, word for word, because
// kubectl, controllers and people read them.
package status

import (
	"net"

	v1 "k8s.io/api/core/v1"
	resourcehelper "k8s.io/component-helpers/resource"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	v1qos "k8s.io/kubernetes/pkg/apis/core/v1/helper/qos"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
	upstream "k8s.io/kubernetes/pkg/kubelet/status"
	kubetypes "k8s.io/kubernetes/pkg/kubelet/types"
	utilpod "k8s.io/kubernetes/pkg/util/pod"
	utilnet "k8s.io/utils/net"
)

// Input is everything a pod status depends on. Nothing in it is modified.
type Input struct {
	// Pod is the pod as the API knows it, with the resources allocated on this node.
	Pod *v1.Pod
	// Runtime is what the runtime knows; its lists may be empty.
	Runtime *kubecontainer.PodStatus
	// Previous is the status computed last, or Pod.Status after a restart.
	Previous v1.PodStatus
	// Terminal says that no container will be started again.
	Terminal bool
	// StartFailure tells why the last start of a container failed.
	StartFailure func(container string) (reason, message string, failed bool)
	// Override, when not nil, ends the pod as Failed for this reason.
	Override *Override
	// Resize holds the resize conditions to report.
	Resize []*v1.PodCondition
	// HostIPs are the node's addresses, the primary one first.
	HostIPs []net.IP
	// Probes sets started and ready of the containers from probe results.
	Probes func(pod *v1.Pod, status *v1.PodStatus)
	// RecursiveReadOnly says that the runtime can mount so.
	RecursiveReadOnly bool
}

// Override is why a pod is ended by the node: eviction, active deadline.
type Override struct{ Reason, Message string }

// Compute returns the status of a pod. It has no side effects.
func Compute(in Input) v1.PodStatus {
	s := containersAndIPs(&in)
	all := append(append([]v1.ContainerStatus{}, s.ContainerStatuses...), s.InitContainerStatuses...)
	s.Phase = phaseOf(in.Pod, all, in.Terminal, kubecontainer.HasAnyActiveRegularContainerStarted(&in.Pod.Spec, in.Runtime))
	settlePhase(&in, &s)
	if in.Probes != nil {
		in.Probes(in.Pod, &s)
	}
	s.Conditions = conditions(&in, &s)
	hostAddresses(&in, &s)
	s.ObservedGeneration = podutil.CalculatePodStatusObservedGeneration(in.Pod)
	return s
}

func containersAndIPs(in *Input) v1.PodStatus {
	var s v1.PodStatus
	for _, ip := range SortPodIPs(in.HostIPs, in.Runtime.IPs) {
		s.PodIPs = append(s.PodIPs, v1.PodIP{IP: ip})
	}
	if len(s.PodIPs) > 0 {
		s.PodIP = s.PodIPs[0].IP
	}
	s.QOSClass = v1qos.GetPodQOS(in.Pod)
	restarting := kubecontainer.ShouldAllContainersRestart(in.Pod, in.Runtime, &in.Previous)
	s.ContainerStatuses = containerStatuses(in, kindApp, in.Pod.Spec.Containers, in.Previous.ContainerStatuses, restarting)
	s.InitContainerStatuses = containerStatuses(in, kindInit, in.Pod.Spec.InitContainers, in.Previous.InitContainerStatuses, restarting)
	var ephemeral []v1.Container
	for i := range in.Pod.Spec.EphemeralContainers {
		ephemeral = append(ephemeral, v1.Container(in.Pod.Spec.EphemeralContainers[i].EphemeralContainerCommon))
	}
	s.EphemeralContainerStatuses = containerStatuses(in, kindEphemeral, ephemeral, in.Previous.EphemeralContainerStatuses, restarting)
	podLevelResources(in.Pod, &s)
	return s
}

// podLevelResources reports the pod's resources as allocated: the pod cgroup
// is written from them before any container starts.
func podLevelResources(pod *v1.Pod, s *v1.PodStatus) {
	opts := resourcehelper.PodResourcesOptions{}
	s.AllocatedResources = resourcehelper.PodRequests(pod, opts)
	res := pod.Spec.Resources.DeepCopy()
	if res == nil {
		res = &v1.ResourceRequirements{}
	}
	res.Requests = resourcehelper.PodRequests(pod, opts)
	res.Limits = resourcehelper.PodLimits(pod, opts)
	s.Resources = res
}

// settlePhase keeps a pod from leaving a terminal phase and carries the reason
// along as long as the phase stays the same.
func settlePhase(in *Input, s *v1.PodStatus) {
	if !podutil.IsPodPhaseTerminal(s.Phase) {
		switch {
		case podutil.IsPodPhaseTerminal(in.Previous.Phase):
			s.Phase = in.Previous.Phase
		case podutil.IsPodPhaseTerminal(in.Pod.Status.Phase):
			s.Phase = in.Pod.Status.Phase
		}
	}
	if s.Phase == in.Previous.Phase {
		s.Reason, s.Message = in.Previous.Reason, in.Previous.Message
		if s.Reason == "" {
			s.Reason = in.Pod.Status.Reason
		}
		if s.Message == "" {
			s.Message = in.Pod.Status.Message
		}
	}
	if in.Override != nil {
		s.Phase, s.Reason, s.Message = v1.PodFailed, in.Override.Reason, in.Override.Message
	}
	if podutil.IsPodPhaseTerminal(in.Pod.Status.Phase) {
		s.Phase = in.Pod.Status.Phase
	}
}

func conditions(in *Input, s *v1.PodStatus) []v1.PodCondition {
	pod, prev := in.Pod, &in.Previous
	var conds []v1.PodCondition
	for _, c := range pod.Status.Conditions {
		if !kubetypes.PodConditionByKubelet(c.Type) {
			conds = append(conds, *c.DeepCopy())
		}
	}
	if !in.Terminal {
		for _, c := range in.Resize {
			conds = append(conds, *c)
		}
	}
	if _, c := podutil.GetPodConditionFromList(prev.Conditions, v1.DisruptionTarget); c != nil {
		conds = utilpod.ReplaceOrAppendPodCondition(conds, c)
	}
	all := append(append([]v1.ContainerStatus{}, s.InitContainerStatuses...), s.ContainerStatuses...)
	conds = append(conds,
		upstream.GeneratePodReadyToStartContainersCondition(pod, prev, in.Runtime),
		upstream.GeneratePodInitializedCondition(pod, prev, all, s.Phase))
	conds = append(conds, upstream.GeneratePodReadyCondition(pod, prev, conds, all, s.Phase))
	conds = append(conds,
		upstream.GenerateContainersReadyCondition(pod, prev, all, s.Phase),
		v1.PodCondition{
			Type: v1.PodScheduled, Status: v1.ConditionTrue,
			ObservedGeneration: podutil.CalculatePodConditionObservedGeneration(prev, pod.Generation, v1.PodScheduled),
		})
	if podutil.AllContainersCouldRestart(&pod.Spec) {
		conds = append(conds, upstream.GenerateAllContainersRestartingCondition(pod, in.Runtime, prev, s.Phase))
	}
	return conds
}

func hostAddresses(in *Input, s *v1.PodStatus) {
	if len(in.HostIPs) == 0 {
		return
	}
	s.HostIP = in.HostIPs[0].String()
	for _, ip := range in.HostIPs {
		s.HostIPs = append(s.HostIPs, v1.HostIP{IP: ip.String()})
	}
	if !kubecontainer.IsHostNetworkPod(in.Pod) {
		return
	}
	if s.PodIP == "" {
		s.PodIP = s.HostIP
		s.PodIPs = []v1.PodIP{{IP: s.HostIP}}
	}
	if len(in.HostIPs) == 2 && len(s.PodIPs) == 1 && utilnet.IPFamilyOfString(s.PodIP) != utilnet.IPFamilyOf(in.HostIPs[1]) {
		s.PodIPs = append(s.PodIPs, v1.PodIP{IP: in.HostIPs[1].String()})
	}
}

// SortPodIPs picks one address per family out of a sandbox's addresses, that of
// the node's primary family first.
func SortPodIPs(hostIPs []net.IP, podIPs []string) []string {
	v4First := len(hostIPs) == 0 || utilnet.IsIPv4(hostIPs[0])
	var out []string
	for _, wantV4 := range []bool{v4First, !v4First} {
		for _, s := range podIPs {
			if ip := utilnet.ParseIPSloppy(s); ip != nil && utilnet.IsIPv4(ip) == wantV4 {
				out = append(out, ip.String())
				break
			}
		}
	}
	return out
}
