// Package agent is the node's part of the cluster: what upstream's kubelet
// does. It registers the Node, keeps its lease and status, watches the pods
// bound to it and runs them over CRI (an in-process interface), sets up their
// volumes, probes them, reports their status and serves the node's HTTPS API.
//
// Nothing in it polls. A pod is worked on by one goroutine (see worker) that
// sleeps until something happened to that pod: its object changed, the runtime
// pushed a container event, a probe changed its mind, a referenced ConfigMap
// or Secret changed, or a timer of its own (back-off, active deadline) is due.
//
// What Kubernetes means by a running pod comes from upstream's pure packages
// (kuberuntime, lifecycle, images, status conditions); the loop, the status
// writer, the volume life cycle and the node status are ours.
//
// Goroutines hold at most two locks, always in the order Agent.mu, worker.mu.
package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	cadvisorapi "github.com/google/cadvisor/info/v1"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	coreinformers "k8s.io/client-go/informers/core/v1"
	"k8s.io/client-go/kubernetes/scheme"
	typedcore "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/util/flowcontrol"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/kubelet/allocation"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
	"k8s.io/kubernetes/pkg/kubelet/images"
	"k8s.io/kubernetes/pkg/kubelet/kuberuntime"
	"k8s.io/kubernetes/pkg/kubelet/network/dns"
	"k8s.io/kubernetes/pkg/kubelet/runtimeclass"
	"k8s.io/kubernetes/pkg/kubelet/userns"

	"knarr/node/cgroup"
	"knarr/node/objects"
	"knarr/node/podspec"
	"knarr/node/probe"
	"knarr/node/status"
	"knarr/node/volume"
)

// component is who the agent's events come from.
const component = "kubelet"

// Agent runs the pods of one node. Create it with New, start it with Run.
// All methods may be called concurrently.
type Agent struct {
	opts Options
	stop context.CancelFunc // ends what New's parts run
	ctx  context.Context    // of New's parts; ends after Run

	recorder    record.EventRecorderLogger
	broadcaster record.EventBroadcaster // nil when the recorder was given

	serviceInformer coreinformers.ServiceInformer
	podInformer     cache.SharedIndexInformer
	nodeInformer    cache.SharedIndexInformer

	objects          *objects.Store
	tokens           *objects.Tokens
	volumes          *volume.Manager
	cgroups          *cgroup.Manager
	containerManager *cgroup.ContainerManager
	probes           *probe.Manager
	statuses         *status.Writer
	spec             *podspec.Generator
	dns              *dns.Configurer
	runtimeClasses   *runtimeclass.Manager
	resizes          *resizeConditions
	allocation       allocation.Manager
	crashBackoff     *flowcontrol.Backoff
	node             *nodeState
	static           *static
	leftovers        chan struct{} // holds one
	limited          chan struct{} // holds one: a pod with limited storage came

	// Set by Run before any worker starts.
	runtime  kuberuntime.KubeGenericRuntime
	handlers map[string]kubecontainer.RuntimeHandler
	features *kubecontainer.RuntimeFeatures
	users    *userns.UsernsManager
	machine  *cadvisorapi.MachineInfo
	// imageHooks are told which images are left after unused ones were removed.
	imageHooks []images.PostImageGCHook

	mu      sync.Mutex
	workers map[types.UID]*worker
	started bool // initial pods are admitted
	address string
	wg      sync.WaitGroup
}

// New checks opts and builds an Agent. It starts nothing that needs the API or
// the runtime, but it creates the state directories and asks opts.Informers for
// the informers it needs, so that the owner can start the factory before or
// after Run. An Agent that is not run must be closed with Close.
func New(opts Options) (*Agent, error) {
	if err := opts.validate(); err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	a := &Agent{opts: opts, ctx: ctx, stop: stop, workers: map[types.UID]*worker{},
		crashBackoff: flowcontrol.NewBackOff(backoffFirst, backoffMax), resizes: newResizeConditions(), leftovers: make(chan struct{}, 1), limited: make(chan struct{}, 1)}
	a.startRecorder()
	a.serviceInformer = opts.Informers.Core().V1().Services()
	a.serviceInformer.Informer() // registers it with the factory
	a.buildSources()
	if err := a.buildParts(); err != nil {
		a.Close()
		return nil, err
	}
	return a, nil
}

// Close ends an Agent that was never run, or whose Run has returned.
func (a *Agent) Close() {
	a.stop()
	if a.tokens != nil {
		a.tokens.Close()
	}
	if a.broadcaster != nil {
		a.broadcaster.Shutdown()
	}
}

func (a *Agent) startRecorder() {
	if a.recorder = a.opts.Recorder; a.recorder != nil {
		return
	}
	a.broadcaster = record.NewBroadcaster(record.WithContext(a.ctx))
	a.broadcaster.StartRecordingToSink(&typedcore.EventSinkImpl{Interface: a.opts.Client.CoreV1().Events("")})
	a.recorder = a.broadcaster.NewRecorder(scheme.Scheme, v1.EventSource{Component: component, Host: a.opts.NodeName})
}

// buildParts makes everything that does not need the container runtime.
func (a *Agent) buildParts() (err error) {
	o := &a.opts
	a.node = newNodeState(a)
	a.static = newStatic(a)
	a.objects = objects.New(a.ctx, o.Client, a.invalidate)
	a.tokens = objects.NewTokens(a.ctx, o.Client, a.invalidate)
	if a.volumes, err = volume.New(volume.Config{
		RootDir: o.RootDir, NodeName: o.NodeName, Client: o.Client, Objects: a.objects, Tokens: a.tokens, Recorder: a.recorder,
		NodeLabels: a.node.labels, Allocatable: a.allocatable,
	}); err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	if a.cgroups, err = cgroup.New(o.CgroupRoot); err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	a.containerManager = cgroup.NewContainerManager(a.cgroups, o.NodeName)
	a.probes = probe.New(a.ctx, a.recorder, a.poke)
	a.statuses = status.NewWriter(o.Client, a.mayRun)
	a.spec = &podspec.Generator{
		ClusterDomain: o.ClusterDomain, HostIPs: o.NodeIPs, PodDir: a.volumes.PodDir, Volumes: a.volumes.Mounts,
		Subpather: a.volumes.Subpather(), HostUtil: a.volumes.HostUtil(), ConfigMap: a.objects.ConfigMap, Secret: a.objects.Secret,
		Services: a.services, Allocatable: a.allocatable, RecursiveReadOnly: a.recursiveReadOnly,
	}
	a.dns = dns.NewConfigurer(a.recorder, a.node.ref(), o.NodeIPs, o.ClusterDNS, o.ClusterDomain, o.ResolvConf)
	a.runtimeClasses = runtimeclass.NewManager(o.Client)
	return nil
}

// Run registers the node and runs its pods until ctx ends. Containers are left
// running when it returns. It returns nil after a stop by ctx and an error when
// the runtime cannot be reached or the listener cannot be opened. Call it once.
func (a *Agent) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer func() {
		cancel()
		a.wg.Wait()
		a.statuses.Wait()
		a.Close()
		a.probes.Wait()
		a.objects.Wait()
	}()
	if err := a.buildRuntime(ctx); err != nil {
		return err
	}
	a.buildAllocation()
	serve, err := a.listen()
	if err != nil {
		return err
	}
	a.statuses.Start(ctx)
	events := make(chan error, 1)
	a.wg.Go(func() { events <- a.followRuntime(ctx) })
	a.wg.Go(func() { serve(ctx) })
	a.runtimeClasses.Start(ctx.Done())
	a.wg.Go(func() { a.nodeInformer.RunWithContext(ctx) })
	a.wg.Go(func() { a.keepNode(ctx) })
	a.wg.Go(func() { a.collectGarbage(ctx) })
	if a.opts.Pods == nil {
		a.wg.Go(func() { a.podInformer.RunWithContext(ctx) })
	}
	a.wg.Go(func() { a.runPods(ctx) })
	select {
	case <-ctx.Done():
		return nil
	case err := <-events:
		if ctx.Err() != nil || errors.Is(err, context.Canceled) {
			return nil
		}
		return fmt.Errorf("agent: container events: %w", err)
	}
}

// Address is where the HTTPS API listens, once Run has opened it.
func (a *Agent) Address() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.address
}

// NetworkChanged tells the agent that Options.NetworkReady may answer
// differently now: waiting pods are tried again and the node status is updated.
func (a *Agent) NetworkChanged() {
	a.node.poke()
	for _, w := range a.allWorkers() {
		w.mu.Lock()
		waiting := w.networkErr
		w.mu.Unlock()
		if waiting {
			w.poke()
		}
	}
}

// Pods returns the pods of the node that are not finished. The objects must
// not be modified.
func (a *Agent) Pods() []*v1.Pod {
	var out []*v1.Pod
	for _, w := range a.allWorkers() {
		if pod, at := w.current(); at < phaseFinished {
			out = append(out, pod)
		}
	}
	return out
}

func (a *Agent) worker(uid types.UID) *worker {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.workers[uid]
}

func (a *Agent) allWorkers() []*worker {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := make([]*worker, 0, len(a.workers))
	for _, w := range a.workers {
		out = append(out, w)
	}
	return out
}

func (a *Agent) poke(uid types.UID) {
	if w := a.worker(uid); w != nil {
		w.poke()
	}
}

func (a *Agent) invalidate(uid types.UID) {
	if w := a.worker(uid); w != nil {
		w.invalidate()
	}
}

// mayRun reports whether containers of a pod could be running.
func (a *Agent) mayRun(uid types.UID) bool {
	w := a.worker(uid)
	if w == nil {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.phase < phaseStopped && !w.rejected
}

// drop forgets a pod of which nothing is left.
func (a *Agent) drop(w *worker) {
	a.mu.Lock()
	if a.workers[w.uid] == w {
		delete(a.workers, w.uid)
	}
	a.mu.Unlock()
	a.statuses.Forget(w.uid)
	a.tokens.Forget(w.uid)
	a.forgetResizes(w.uid)
	a.leave()
	klog.FromContext(a.ctx).V(4).Info("Pod is gone from the node", "podUID", w.uid)
}

func joinComma(s []string) string { return strings.Join(s, ", ") }

func mapsEqual(a, b map[string]string) bool {
	if len(a) != len(b) {
		return false
	}
	for k, v := range a {
		if w, ok := b[k]; !ok || w != v {
			return false
		}
	}
	return true
}
