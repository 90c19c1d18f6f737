package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
	"k8s.io/kubernetes/pkg/kubelet/events"
	kubetypes "k8s.io/kubernetes/pkg/kubelet/types"
)

// buildSources makes the informers of this node's pods and of its Node.
func (a *Agent) buildSources() {
	core := a.opts.Client.CoreV1()
	if a.podInformer = a.opts.Pods; a.podInformer == nil {
		selector := fields.OneTermEqualSelector("spec.nodeName", a.opts.NodeName).String()
		a.podInformer = a.informer(&cache.ListWatch{
			ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				o.FieldSelector = selector
				return core.Pods("").List(ctx, o)
			},
			WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
				o.FieldSelector = selector
				return core.Pods("").Watch(ctx, o)
			},
		}, &v1.Pod{})
	}
	own := fields.OneTermEqualSelector("metadata.name", a.opts.NodeName).String()
	a.nodeInformer = a.informer(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector = own
			return core.Nodes().List(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = own
			return core.Nodes().Watch(ctx, o)
		},
	}, &v1.Node{})
}

func (a *Agent) informer(lw *cache.ListWatch, kind runtime.Object) cache.SharedIndexInformer {
	return cache.NewSharedIndexInformer(cache.ToListWatcherWithWatchListSemantics(lw, a.opts.Client), kind, 0, cache.Indexers{})
}

// runPods follows the pods of the node. The pods of the first list are admitted
// in the order of their creation, what the API no longer knows is cleaned up,
// then every change is handled as it comes.
func (a *Agent) runPods(ctx context.Context) {
	h := cache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { a.observe(ctx, obj.(*v1.Pod)) },
		UpdateFunc: func(_, obj any) { a.observe(ctx, obj.(*v1.Pod)) },
		DeleteFunc: func(obj any) {
			if t, ok := obj.(cache.DeletedFinalStateUnknown); ok {
				obj = t.Obj
			}
			if pod, ok := obj.(*v1.Pod); ok {
				a.forget(pod)
			}
		},
	}
	reg, err := a.podInformer.AddEventHandler(h)
	if err != nil {
		klog.FromContext(ctx).Error(err, "Pods cannot be watched")
		return
	}
	defer func() { _ = a.podInformer.RemoveEventHandler(reg) }()
	if !cache.WaitForCacheSync(ctx.Done(), a.podInformer.HasSynced, a.nodeInformer.HasSynced) {
		return
	}
	read := make(chan struct{})
	a.wg.Go(func() { a.static.run(ctx, func() { close(read) }) })
	<-read
	a.admitFirst(ctx)
	a.cleanUp(ctx)
	<-ctx.Done()
}

// observe takes in a pod of the API.
func (a *Agent) observe(ctx context.Context, pod *v1.Pod) {
	if pod.Spec.NodeName != a.opts.NodeName {
		return // a server that ignores field selectors sends others, too
	}
	if kubetypes.IsMirrorPod(pod) {
		a.static.seen(pod, false)
		return
	}
	pod = fromAPI(pod)
	a.mu.Lock()
	w, started := a.workers[pod.UID], a.started
	a.mu.Unlock()
	switch {
	case w != nil:
		resized := a.specChanged(w, pod)
		w.update(pod)
		a.statuses.Observe(pod)
		if resized {
			a.allocation.PushPendingResize(pod.UID)
			a.allocation.RetryPendingResizes("pod_updated")
		}
	case started:
		a.admit(ctx, pod)
	}
}

// fromAPI makes sure that a pod of the API does not pass for a static one,
// whatever its annotations say.
func fromAPI(pod *v1.Pod) *v1.Pod {
	if !kubetypes.IsStaticPod(pod) {
		return pod
	}
	pod = pod.DeepCopy()
	pod.Annotations[kubetypes.ConfigSourceAnnotationKey] = kubetypes.ApiserverSource
	return pod
}

// forget takes in that a pod is gone from the API.
func (a *Agent) forget(pod *v1.Pod) {
	if kubetypes.IsMirrorPod(pod) {
		a.static.seen(pod, true)
		return
	}
	if w := a.worker(pod.UID); w != nil {
		a.statuses.Forget(pod.UID)
		w.remove(pod)
	}
}

// admitFirst starts the pods that were there before the agent.
func (a *Agent) admitFirst(ctx context.Context) {
	var pods []*v1.Pod
	for _, obj := range a.podInformer.GetStore().List() {
		if pod := obj.(*v1.Pod); pod.Spec.NodeName == a.opts.NodeName && !kubetypes.IsMirrorPod(pod) {
			pods = append(pods, fromAPI(pod))
		}
	}
	slices.SortFunc(pods, func(x, y *v1.Pod) int { return x.CreationTimestamp.Compare(y.CreationTimestamp.Time) })
	a.resizes.BackfillPodResizeConditions(pods)
	for _, pod := range pods {
		a.admit(ctx, pod)
	}
	a.mu.Lock()
	a.started = true
	a.mu.Unlock()
	// What came in meanwhile was left to us.
	for _, obj := range a.podInformer.GetStore().List() {
		if pod := obj.(*v1.Pod); a.worker(pod.UID) == nil {
			a.observe(ctx, pod)
		}
	}
}

// admit checks whether the node can take a pod and starts its worker.
func (a *Agent) admit(ctx context.Context, pod *v1.Pod) {
	w := newWorker(a, pod)
	a.mu.Lock()
	if a.workers[pod.UID] != nil {
		a.mu.Unlock()
		return
	}
	others := a.activeLocked()
	a.workers[pod.UID] = w
	a.mu.Unlock()
	if !podutil.IsPodPhaseTerminal(pod.Status.Phase) && pod.DeletionTimestamp == nil {
		if ok, reason, message := a.allocation.AddPod(others, w.pod); !ok {
			w.reject(reason, message)
		}
	}
	if limitsStorage(pod) {
		select {
		case a.limited <- struct{}{}:
		default:
		}
	}
	a.objects.Register(pod) // their watches start while the sandbox is made
	a.wg.Go(func() { w.run(ctx) })
}

// activeLocked returns the pods that take resources of the node.
func (a *Agent) activeLocked() []*v1.Pod {
	var out []*v1.Pod
	for _, w := range a.workers {
		w.mu.Lock()
		if w.phase < phaseStopped && !w.rejected {
			out = append(out, w.pod)
		}
		w.mu.Unlock()
	}
	return out
}

// networkError says that the pod network is not there yet.
type networkError struct{ err error }

func (e *networkError) Error() string { return fmt.Sprintf("network is not ready: %v", e.err) }
func (e *networkError) Unwrap() error { return e.err }

// prepare makes what a pod needs before its sandbox: network, cgroup,
// directories, volumes. stale says that volumes that are up show old objects.
func (a *Agent) prepare(ctx context.Context, w *worker, pod *v1.Pod, stale bool) error {
	if err := a.networkReady(w, pod); err != nil {
		return err
	}
	a.objects.Register(pod)
	created := !a.cgroups.Exists(pod)
	if err := a.cgroups.EnsureExists(klog.FromContext(ctx), pod); err != nil {
		a.recorder.Eventf(pod, v1.EventTypeWarning, events.FailedToCreatePodContainer, "unable to ensure pod container exists: %v", err)
		return fmt.Errorf("failed to ensure that the pod: %v cgroups exist and are correctly applied: %w", pod.UID, err)
	}
	if created {
		if err := a.runtime.UpdateActuatedPodLevelResources(pod); err != nil {
			return fmt.Errorf("failed to update the state of pod-level resources for the pod %v : %w", pod.UID, err)
		}
	}
	if err := a.makePodDirs(pod.UID); err != nil {
		a.recorder.Eventf(pod, v1.EventTypeWarning, events.FailedToMakePodDataDirectories, "error making pod data directories: %v", err)
		return err
	}
	err := a.volumes.SetUp(ctx, pod)
	if err == nil && stale {
		err = a.volumes.Refresh(ctx, pod)
	}
	if err == nil || ctx.Err() != nil {
		return ctx.Err()
	}
	for _, e := range split(err) {
		a.recorder.Event(pod, v1.EventTypeWarning, events.FailedMountVolume, e.Error())
	}
	return err
}

// split takes joined errors apart.
func split(err error) []error {
	var joined interface{ Unwrap() []error }
	if errors.As(err, &joined) {
		return joined.Unwrap()
	}
	return []error{err}
}

func (a *Agent) networkReady(w *worker, pod *v1.Pod) error {
	if kubecontainer.IsHostNetworkPod(pod) {
		return nil
	}
	err := a.networkProblem()
	w.mu.Lock()
	first := err != nil && !w.networkErr
	w.networkErr = err != nil
	w.mu.Unlock()
	if err == nil {
		return nil
	}
	err = &networkError{err}
	if first {
		a.recorder.Event(pod, v1.EventTypeWarning, events.NetworkNotReady, err.Error())
	}
	return err
}

// podOf returns the newest object of a pod by name.
func (a *Agent) podOf(namespace, name string) (*v1.Pod, bool) {
	for _, w := range a.allWorkers() {
		if pod, _ := w.current(); pod.Namespace == namespace && pod.Name == name {
			return pod, true
		}
	}
	return nil, false
}

func (a *Agent) podByUID(uid types.UID) (*v1.Pod, bool) {
	w := a.worker(uid)
	if w == nil {
		return nil, false
	}
	pod, _ := w.current()
	return pod, true
}
