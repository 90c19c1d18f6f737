package agent

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"time"

	cadvisorapi "github.com/google/cadvisor/info/v1"
	"go.opentelemetry.io/otel/trace/noop"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/flowcontrol"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"
	statsapi "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
	kubelettypes "k8s.io/kubelet/pkg/types"
	kubeletconfig "k8s.io/kubernetes/pkg/kubelet/apis/config"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
	"k8s.io/kubernetes/pkg/kubelet/kuberuntime"
	"k8s.io/kubernetes/pkg/kubelet/logs"

	"k8s.io/kubernetes/pkg/kubelet/userns"
)

const (
	// backoffFirst and backoffMax bound the pause before a container is started
	// again, and before an image is pulled again; backoffMax without a restart
	// resets it.
	backoffFirst = 10 * time.Second
	backoffMax   = 5 * time.Minute
	// maxPulls bounds the image pulls at a time.
	maxPulls = 4
	// deadToKeep is how many dead containers of one name are kept, for logs and
	// last state.
	deadToKeep = 1
	// hookTimeout bounds one HTTP request of a life-cycle hook.
	hookTimeout = 60 * time.Second
	// cpuPeriod is the length of a CPU quota period.
	cpuPeriod = 100 * time.Millisecond
)

// buildRuntime makes upstream's runtime manager on the CRI of this node.
func (a *Agent) buildRuntime(ctx context.Context) error {
	liveness, readiness, startup := a.probes.Results()
	parallel := int32(maxPulls)
	info := machineInfo(a.opts.NodeName)
	a.machine = info
	rt, hooks, err := kuberuntime.NewKubeGenericRuntimeManager(ctx, a.recorder, liveness, readiness, startup,
		a.opts.RootDir, a.opts.PodLogsDir, info, podStates{a}, int32(a.opts.MaxPods), hostOS{}, helper{a},
		&http.Client{Timeout: hookTimeout}, flowcontrol.NewBackOff(backoffFirst, backoffMax), false, &parallel, 0, 0,
		string(kubeletconfig.NeverVerifyPreloadedImages), nil, "", "", new(bool), true, metav1.Duration{Duration: cpuPeriod},
		a.opts.Runtime, a.opts.Images, a.containerManager, logs.NewStubContainerLogManager(), a.runtimeClasses, false, "NoSwap",
		a.allocatable, 0, kubeletconfig.NoneMemoryReservationPolicy, noTimes{}, noop.NewTracerProvider(), nil, nil, noTimes{})
	if err != nil {
		return fmt.Errorf("agent: container runtime: %w", err)
	}
	a.runtime, a.imageHooks = rt, hooks
	a.probes.SetRunner(rt)
	st, err := rt.Status(ctx)
	if err != nil {
		return fmt.Errorf("agent: container runtime status: %w", err)
	}
	a.handlers = map[string]kubecontainer.RuntimeHandler{}
	for _, h := range st.Handlers {
		a.handlers[h.Name] = h
	}
	a.features = st.Features
	a.users, err = userns.MakeUserNsManager(klog.FromContext(ctx), userRanges{a}, nil)
	if err != nil {
		return fmt.Errorf("agent: user namespaces: %w", err)
	}
	return nil
}

// runtimeStatus asks the runtime about a pod.
func (a *Agent) runtimeStatus(ctx context.Context, pod *v1.Pod) (*kubecontainer.PodStatus, error) {
	rp, err := a.runtime.GetPod(ctx, pod.UID)
	if errors.Is(err, kubecontainer.ErrPodNotFound) {
		rp, err = &kubecontainer.Pod{ID: pod.UID, Name: pod.Name, Namespace: pod.Namespace, Timestamp: time.Now()}, nil
	}
	if err != nil {
		return nil, err
	}
	return a.runtime.GetPodStatus(ctx, rp)
}

// removeDead removes all but the last dead container of each name.
func (a *Agent) removeDead(ctx context.Context, rs *kubecontainer.PodStatus) {
	newestFirst := slices.Clone(rs.ContainerStatuses)
	slices.SortFunc(newestFirst, func(x, y *kubecontainer.Status) int { return y.CreatedAt.Compare(x.CreatedAt) })
	dead, seen := map[string]int{}, map[string]bool{}
	for _, c := range newestFirst {
		newest := !seen[c.Name]
		seen[c.Name] = true
		if c.State != kubecontainer.ContainerStateExited || newest {
			continue
		}
		if dead[c.Name]++; dead[c.Name] <= deadToKeep {
			continue
		}
		a.probes.Forget(c.ID)
		if err := a.runtime.DeleteContainer(ctx, c.ID); err != nil && ctx.Err() == nil {
			klog.FromContext(ctx).Error(err, "Dead container not removed", "containerID", c.ID.String())
		}
	}
}

// removeFromRuntime removes containers, sandboxes and logs of a pod that ended.
func (a *Agent) removeFromRuntime(ctx context.Context, uid types.UID) error {
	filter := map[string]string{labelPodUID: string(uid)}
	containers, err := a.opts.Runtime.ListContainers(ctx, &runtimeapi.ContainerFilter{LabelSelector: filter})
	if err != nil {
		return err
	}
	for _, c := range containers {
		a.probes.Forget(kubecontainer.BuildContainerID(a.runtime.Type(), c.Id))
		if err := a.opts.Runtime.RemoveContainer(ctx, c.Id); err != nil {
			return err
		}
	}
	sandboxes, err := a.opts.Runtime.ListPodSandbox(ctx, &runtimeapi.PodSandboxFilter{LabelSelector: filter})
	if err != nil {
		return err
	}
	for _, s := range sandboxes {
		if err := a.opts.Runtime.StopPodSandbox(ctx, s.Id); err != nil {
			return err
		}
		if err := a.opts.Runtime.RemovePodSandbox(ctx, s.Id); err != nil {
			return err
		}
	}
	return a.removeLogs(uid)
}

// pullSecrets returns the secrets that the images of a pod are pulled with.
func (a *Agent) pullSecrets(pod *v1.Pod) []v1.Secret {
	var out []v1.Secret
	var failed []string
	for _, ref := range pod.Spec.ImagePullSecrets {
		if ref.Name == "" {
			continue
		}
		s, err := a.objects.Secret(pod.Namespace, ref.Name)
		if err != nil {
			failed = append(failed, ref.Name)
			continue
		}
		out = append(out, *s)
	}
	if len(failed) > 0 {
		a.recorder.Eventf(pod, v1.EventTypeWarning, "FailedToRetrieveImagePullSecret",
			"Unable to retrieve some image pull secrets (%s); attempting to pull the image may not succeed.", joinComma(failed))
	}
	return out
}

// services lists the services of the cluster once they are known.
func (a *Agent) services() ([]*v1.Service, error) {
	if !a.serviceInformer.Informer().HasSynced() {
		return nil, errors.New("services have not yet been read at least once, cannot construct envvars")
	}
	return a.serviceInformer.Lister().List(labels.Everything())
}

func (a *Agent) recursiveReadOnly(pod *v1.Pod) bool {
	h, err := a.runtimeClasses.LookupRuntimeHandler(pod.Spec.RuntimeClassName)
	return err == nil && a.handlers[h].SupportsRecursiveReadOnlyMounts
}

// podStates tells upstream's runtime manager what the workers know.
type podStates struct{ a *Agent }

// IsPodTerminationRequested reports whether the pod is on its way out.
func (p podStates) IsPodTerminationRequested(uid types.UID) bool {
	w := p.a.worker(uid)
	if w == nil {
		return true
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.phase > phaseSync || w.shallStopLocked()
}

// ShouldPodContentBeRemoved reports whether nothing of the pod is wanted any more.
func (p podStates) ShouldPodContentBeRemoved(uid types.UID) bool { return p.a.worker(uid) == nil }

// ShouldPodRuntimeBeRemoved reports whether the pod's containers have ended for good.
func (p podStates) ShouldPodRuntimeBeRemoved(uid types.UID) bool {
	w := p.a.worker(uid)
	if w == nil {
		return true
	}
	_, at := w.current()
	return at >= phaseStopped
}

// helper is what upstream's runtime manager asks the agent.
type helper struct{ a *Agent }

var _ kubecontainer.RuntimeHelper = helper{}

func (h helper) GenerateRunContainerOptions(ctx context.Context, pod *v1.Pod, c *v1.Container, _ string, podIPs []string, images kubecontainer.ImageVolumes) (*kubecontainer.RunContainerOptions, func(), error) {
	return h.a.spec.Container(ctx, pod, c, podIPs, images)
}

func (h helper) GetPodDNS(ctx context.Context, pod *v1.Pod) (*runtimeapi.DNSConfig, error) {
	return h.a.dns.GetPodDNS(ctx, pod)
}

func (h helper) GetPodCgroupParent(pod *v1.Pod) string {
	_, path := h.a.cgroups.GetPodContainerName(pod)
	return path
}

func (h helper) GetPodDir(uid types.UID) string { return h.a.volumes.PodDir(uid) }

func (h helper) GeneratePodHostNameAndDomain(_ klog.Logger, pod *v1.Pod) (string, string, error) {
	return h.a.spec.Hostname(pod)
}

func (h helper) GetExtraSupplementalGroupsForPod(pod *v1.Pod) []int64 {
	var out []int64
	for _, s := range h.a.volumes.ExtraGroups(pod.UID) {
		if gid, err := strconv.ParseInt(s, 10, 64); err == nil {
			out = append(out, gid)
		}
	}
	return out
}

func (h helper) GetOrCreateUserNamespaceMappings(logger klog.Logger, pod *v1.Pod, handler string) (*runtimeapi.UserNamespace, error) {
	return h.a.users.GetOrCreateUserNamespaceMappings(logger, pod, handler)
}

func (h helper) PrepareDynamicResources(ctx context.Context, pod *v1.Pod) error {
	return h.a.containerManager.PrepareDynamicResources(ctx, pod)
}

func (h helper) UnprepareDynamicResources(context.Context, *v1.Pod) error { return nil }

func (h helper) RequestPodReinspect(uid types.UID) { h.a.poke(uid) }

func (h helper) PodCPUAndMemoryStats(ctx context.Context, pod *v1.Pod, _ *kubecontainer.PodStatus) (*statsapi.PodStats, error) {
	return h.a.podUsage(ctx, pod)
}

// OnPodSandboxReady reports the pod's address and that containers can start,
// before images are pulled.
func (h helper) OnPodSandboxReady(ctx context.Context, pod *v1.Pod) error {
	w := h.a.worker(pod.UID)
	if w == nil {
		return nil
	}
	_, _, err := w.report(ctx, pod)
	return err
}

// noTimes ignores the times that upstream's latency metrics are made of.
type noTimes struct{}

func (noTimes) RecordImageStartedPulling(types.UID)              {}
func (noTimes) RecordImageFinishedPulling(types.UID)             {}
func (noTimes) RecordInitContainerStarted(types.UID, time.Time)  {}
func (noTimes) RecordInitContainerFinished(types.UID, time.Time) {}

// userRanges gives user namespaces their ranges of ids.
type userRanges struct{ a *Agent }

func (u userRanges) HandlerSupportsUserNamespaces(handler string) (bool, error) {
	h, ok := u.a.handlers[handler]
	if !ok {
		return false, fmt.Errorf("the handler %q is not known", handler)
	}
	return h.SupportsUserNamespaces, nil
}

func (u userRanges) GetPodDir(uid types.UID) string { return u.a.volumes.PodDir(uid) }

func (u userRanges) ListPodsFromDisk() ([]types.UID, error) { return u.a.volumes.OnDisk() }

func (u userRanges) GetKubeletMappings(_ klog.Logger, idsPerPod uint32) (uint32, uint32, error) {
	return idsPerPod, uint32((1 << 32) - uint64(idsPerPod)), nil
}

func (u userRanges) GetMaxPods() int { return u.a.opts.MaxPods }

func (a *Agent) releaseUser(uid types.UID) { a.users.Release(klog.Background(), uid) }

// machineInfo is what upstream's runtime manager wants to know of the machine.
func machineInfo(name string) *cadvisorapi.MachineInfo {
	m := readMachine()
	return &cadvisorapi.MachineInfo{MachineID: m.machineID, SystemUUID: m.systemUUID, BootID: m.bootID,
		NumCores: m.cpus, MemoryCapacity: m.memoryBytes, SwapCapacity: m.swapBytes}
}

// labelPodUID is the label of sandboxes and containers that names their pod.
const labelPodUID = kubelettypes.KubernetesPodUIDLabel

// hostOS is the file system as upstream's runtime manager uses it, without the
// links that it makes in /var/log/containers: they would outlive the cluster.
type hostOS struct{ kubecontainer.RealOS }

// Symlink makes nothing.
func (hostOS) Symlink(string, string) error { return nil }

// Glob, which is only asked for those links, finds none.
func (hostOS) Glob(string) ([]string, error) { return nil, nil }
