package agent

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/klog/v2"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
	"k8s.io/kubernetes/pkg/kubelet/events"

	"knarr/node/status"
)

const (
	// retrySync is the pause after a failed sync without a back-off time of its
	// own; up to half of it is added at random. As upstream's.
	retrySync = 10 * time.Second
	// retryNetwork is the pause while the pod network is not there.
	retryNetwork = time.Second
	// retryStop is the pause after a pod could not be stopped or torn down.
	retryStop = time.Second
	// minGrace is the shortest time given to containers of a removed pod, in seconds.
	minGrace = 1
)

// phase is how far a pod is on its way out of the node.
type phase int

const (
	phaseSync     phase = iota // shall run
	phaseStopping              // containers are being stopped
	phaseStopped               // no container runs, resources are being taken down
	phaseFinished              // nothing is left but dead containers and logs
)

// worker looks after one pod, from the first time it is seen until it is gone
// from the API and from the node. All work on the pod is done in its one
// goroutine (run); the other methods leave word and wake it.
type worker struct {
	a    *Agent
	uid  types.UID
	wake chan struct{} // holds one

	mu       sync.Mutex
	pod      *v1.Pod // private copy of the newest object
	gone     bool    // the object no longer exists
	phase    phase
	rejected bool             // not admitted
	stale    bool             // volumes show old objects
	override *status.Override // the node ends the pod
	cause    *v1.PodCondition // why, as a condition
	grace    *int64           // of the override, in seconds
	cancel   context.CancelFunc
	given    int64 // grace that the present stop was given, in seconds

	failures   map[string]failure // why containers do not start; worker goroutine and status
	reportMu   sync.Mutex         // held from reading the runtime to keeping the status
	lastIPs    []string
	networkErr bool
}

// failure is why the last start of a container failed.
type failure struct{ reason, message string }

func newWorker(a *Agent, pod *v1.Pod) *worker {
	return &worker{a: a, uid: pod.UID, pod: pod.DeepCopy(), wake: make(chan struct{}, 1), failures: map[string]failure{}}
}

// poke makes the worker look at its pod again.
func (w *worker) poke() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// update takes in a newer object of the pod.
func (w *worker) update(pod *v1.Pod) {
	w.mu.Lock()
	showsFields := fieldsChanged(w.pod, pod)
	w.pod = pod.DeepCopy()
	w.stale = w.stale || showsFields
	w.interruptLocked()
	w.mu.Unlock()
	w.poke()
}

// fieldsChanged reports whether labels or annotations differ, which downward
// API volumes show.
func fieldsChanged(a, b *v1.Pod) bool {
	return !mapsEqual(a.Labels, b.Labels) || !mapsEqual(a.Annotations, b.Annotations)
}

// remove tells that the object of the pod is gone.
func (w *worker) remove(last *v1.Pod) {
	w.mu.Lock()
	w.gone = true
	if last != nil {
		w.pod = last.DeepCopy()
	}
	w.interruptLocked()
	w.mu.Unlock()
	w.poke()
}

// evict ends the pod for a reason of the node, with a grace period in seconds
// (nil: the pod's own). cause, if not nil, becomes a condition of the pod.
func (w *worker) evict(o status.Override, grace *int64, cause *v1.PodCondition) {
	w.mu.Lock()
	if w.override == nil {
		w.override, w.grace, w.cause = &o, grace, cause
	}
	w.interruptLocked()
	w.mu.Unlock()
	w.poke()
}

// invalidate makes the worker write the volumes of the pod again.
func (w *worker) invalidate() {
	w.mu.Lock()
	w.stale = true
	w.mu.Unlock()
	w.poke()
}

// interruptLocked cancels work that the newest wish makes pointless: a sync of
// a pod that shall go, and a stop with more grace than the pod has now.
func (w *worker) interruptLocked() {
	if w.cancel == nil {
		return
	}
	switch {
	case w.phase == phaseSync && w.shallStopLocked():
		w.cancel()
	case w.phase == phaseStopping:
		if g := w.graceLocked(); g != nil && *g < w.given {
			w.cancel()
		}
	}
}

func (w *worker) shallStopLocked() bool {
	return w.gone || w.rejected || w.override != nil || w.pod.DeletionTimestamp != nil || podutil.IsPodPhaseTerminal(w.pod.Status.Phase)
}

// graceLocked returns the grace period to stop with, in seconds.
func (w *worker) graceLocked() *int64 {
	var g int64
	switch {
	case w.gone && w.pod.DeletionGracePeriodSeconds != nil:
		g = max(*w.pod.DeletionGracePeriodSeconds, minGrace)
	case w.pod.DeletionTimestamp != nil && w.pod.DeletionGracePeriodSeconds != nil:
		g = max(*w.pod.DeletionGracePeriodSeconds, minGrace)
		if w.grace != nil {
			g = min(g, max(*w.grace, minGrace))
		}
	case w.grace != nil:
		g = max(*w.grace, minGrace)
	case w.pod.Spec.TerminationGracePeriodSeconds != nil:
		g = max(*w.pod.Spec.TerminationGracePeriodSeconds, minGrace)
	default:
		return nil
	}
	return &g
}

// current returns the newest object of the pod and how far it is. The object
// must not be modified.
func (w *worker) current() (*v1.Pod, phase) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.pod, w.phase
}

func (w *worker) setPhase(p phase) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.phase = max(w.phase, p)
}

// run works on the pod until it is gone or ctx ends.
func (w *worker) run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-w.wake:
		}
		again, done := w.step(ctx)
		if done || ctx.Err() != nil {
			return
		}
		timer.Stop()
		if again > 0 {
			timer.Reset(again)
		}
	}
}

// step does what is to be done now. again, if positive, is when to step again
// without being woken. done says that the worker is no longer needed.
func (w *worker) step(ctx context.Context) (again time.Duration, done bool) {
	for ctx.Err() == nil {
		w.mu.Lock()
		at := w.phase
		if at == phaseSync && w.shallStopLocked() {
			w.phase, at = phaseStopping, phaseStopping
		}
		gone := w.gone
		w.mu.Unlock()
		var err error
		switch at {
		case phaseSync:
			var next time.Duration
			var ended bool
			if next, ended = w.sync(ctx); !ended {
				return next, false
			}
			w.setPhase(phaseStopping)
		case phaseStopping:
			err = w.stop(ctx)
		case phaseStopped:
			err = w.tearDown()
		case phaseFinished:
			if !gone {
				return 0, false
			}
			if err = w.a.removeFromRuntime(ctx, w.uid); err == nil {
				w.a.drop(w)
				return 0, true
			}
		}
		if err != nil {
			if ctx.Err() == nil {
				klog.FromContext(ctx).Error(err, "Pod not ended yet, will try again", "podUID", w.uid)
			}
			return retryStop, false
		}
	}
	return 0, false
}

// begin makes a context that interruptLocked can cancel.
func (w *worker) begin(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	w.mu.Lock()
	w.cancel = cancel
	w.interruptLocked()
	w.mu.Unlock()
	return ctx, func() {
		w.mu.Lock()
		w.cancel = nil
		w.mu.Unlock()
		cancel()
	}
}

// sync brings the pod closer to what its spec says. ended reports that the pod
// reached a terminal phase.
func (w *worker) sync(ctx context.Context) (again time.Duration, ended bool) {
	ctx, end := w.begin(ctx)
	defer end()
	w.mu.Lock()
	pod, stale := w.pod, w.stale // together: volumes are made to show this very object
	w.stale = false
	w.mu.Unlock()
	refreshed := !stale
	defer func() {
		if !refreshed {
			w.mu.Lock()
			w.stale = true
			w.mu.Unlock()
		}
	}()
	pod = w.a.allocated(pod)
	rs, st, err := w.report(ctx, pod)
	if err != nil {
		return w.failed(ctx, pod, err), false
	}
	if podutil.IsPodPhaseTerminal(st.Phase) {
		return 0, true
	}
	deadline, over := w.deadline(pod, &st)
	if over {
		return 0, false // evict has woken us
	}
	w.a.probes.Sync(pod, &st, false)
	if err := w.a.prepare(ctx, w, pod, stale); err != nil {
		return earliest(w.failed(ctx, pod, err), deadline), false
	}
	refreshed = true
	result := w.syncRuntime(ctx, pod, rs, &st)
	w.remember(result)
	w.a.resizeAfter(pod, result)
	if len(rs.SandboxStatuses) > 1 {
		w.a.leave() // an older sandbox
	}
	if len(result.SyncResults) == 0 && result.SyncError == nil {
		w.a.removeDead(ctx, rs)
		return deadline, false
	}
	if _, st, err = w.report(ctx, pod); err == nil {
		w.a.probes.Sync(pod, &st, false)
	}
	if err := result.Error(); err != nil {
		return earliest(w.failed(ctx, pod, err), deadline), false
	}
	for _, r := range result.SyncResults {
		if r.Action == kubecontainer.RemoveContainer || r.Action == kubecontainer.ResizePodInPlace {
			w.poke() // start what was reset; report what was resized
		}
	}
	return deadline, false
}

// syncRuntime has upstream's runtime manager compare and act. A slow image pull
// does not keep the "ready to start containers" condition back.
func (w *worker) syncRuntime(ctx context.Context, pod *v1.Pod, rs *kubecontainer.PodStatus, st *v1.PodStatus) kubecontainer.PodSyncResult {
	rs.IPs = nil
	for _, ip := range st.PodIPs {
		rs.IPs = append(rs.IPs, ip.IP)
	}
	restartAll := false
	if _, c := podutil.GetPodCondition(st, v1.AllContainersRestarting); c != nil && c.Status == v1.ConditionTrue {
		restartAll = true
	}
	return w.a.runtime.SyncPod(ctx, pod, rs, w.a.pullSecrets(pod), w.a.crashBackoff, restartAll)
}

// remember keeps why containers did not start.
func (w *worker) remember(result kubecontainer.PodSyncResult) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range result.SyncResults {
		name, ok := r.Target.(string)
		if r.Action != kubecontainer.StartContainer || !ok {
			continue
		}
		if r.Error != nil {
			w.failures[name] = failure{r.Error.Error(), r.Message}
		} else {
			delete(w.failures, name)
		}
	}
}

func (w *worker) startFailure(container string) (reason, message string, failed bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f, ok := w.failures[container]
	return f.reason, f.message, ok
}

// failed returns when a failed sync is tried again.
func (w *worker) failed(ctx context.Context, pod *v1.Pod, err error) time.Duration {
	if ctx.Err() != nil {
		return 0
	}
	if at, ok := kubecontainer.MinBackoffExpiration(err); ok {
		return max(time.Until(at), time.Millisecond)
	}
	var noNetwork *networkError
	if errors.As(err, &noNetwork) {
		return retryNetwork
	}
	klog.FromContext(ctx).V(2).Info("Pod sync failed, will try again", "pod", klog.KObj(pod), "err", err)
	return retrySync + rand.N(retrySync/2)
}

// earliest returns the shorter of two pauses, of which zero means none.
func earliest(a, b time.Duration) time.Duration {
	if a == 0 || (b > 0 && b < a) {
		return b
	}
	return a
}

// deadline returns how long the pod may still be active, or ends it.
func (w *worker) deadline(pod *v1.Pod, st *v1.PodStatus) (left time.Duration, over bool) {
	if pod.Spec.ActiveDeadlineSeconds == nil || st.StartTime.IsZero() {
		return 0, false
	}
	left = time.Until(st.StartTime.Add(time.Duration(*pod.Spec.ActiveDeadlineSeconds) * time.Second))
	if left > 0 {
		return left, false
	}
	w.a.recorder.Event(pod, v1.EventTypeNormal, reasonDeadline, messageDeadline)
	w.evict(status.Override{Reason: reasonDeadline, Message: messageDeadline}, nil, nil)
	return 0, true
}

const (
	reasonDeadline  = "DeadlineExceeded"
	messageDeadline = "Pod was active on the node longer than the specified deadline"
)

// report reads what the runtime knows and makes it the pod's status.
func (w *worker) report(ctx context.Context, pod *v1.Pod) (*kubecontainer.PodStatus, v1.PodStatus, error) {
	w.reportMu.Lock()
	defer w.reportMu.Unlock()
	rs, err := w.a.runtimeStatus(ctx, pod)
	if err != nil {
		return nil, v1.PodStatus{}, err
	}
	w.a.resizeBefore(pod, rs)
	if len(rs.IPs) > 0 {
		w.lastIPs = rs.IPs
	}
	return rs, w.keep(pod, rs, false), nil
}

// keep computes the status and hands it to the writer.
func (w *worker) keep(pod *v1.Pod, rs *kubecontainer.PodStatus, terminal bool) v1.PodStatus {
	previous, known := w.a.statuses.Get(pod.UID)
	if !known {
		previous = *pod.Status.DeepCopy()
	}
	w.mu.Lock()
	override, cause := w.override, w.cause
	w.mu.Unlock()
	if cause != nil {
		podutil.UpdatePodCondition(&previous, cause)
	}
	st := status.Compute(status.Input{
		Pod: pod, Runtime: rs, Previous: previous, Terminal: terminal, StartFailure: w.startFailure,
		Override: override, Resize: w.a.resizes.GetPodResizeConditions(pod.UID), HostIPs: w.a.opts.NodeIPs,
		RecursiveReadOnly: w.a.recursiveReadOnly(pod),
		Probes:            func(pod *v1.Pod, s *v1.PodStatus) { w.a.probes.Apply(pod, s, &previous) },
	})
	return w.a.statuses.Set(pod, st, false)
}

// stop ends all containers of the pod.
func (w *worker) stop(ctx context.Context) error {
	w.mu.Lock()
	grace := w.graceLocked()
	if grace != nil {
		w.given = *grace
	}
	pod, rejected := w.pod, w.rejected
	w.mu.Unlock()
	if rejected {
		w.setPhase(phaseStopped)
		return nil
	}
	kctx, end := w.begin(ctx)
	defer end()
	pod = w.a.allocated(pod)
	rs, st, err := w.report(kctx, pod)
	if err != nil {
		return err
	}
	w.a.probes.Sync(pod, &st, true)
	running := kubecontainer.ConvertPodStatusToRunningPod(w.a.runtime.Type(), rs)
	if err := w.a.runtime.KillPod(kctx, pod, running, grace); err != nil {
		if kctx.Err() != nil && ctx.Err() == nil {
			return nil // less grace now: again, at once
		}
		w.a.recorder.Eventf(pod, v1.EventTypeWarning, events.FailedToKillPod, "error killing pod: %v", err)
		return fmt.Errorf("error killing pod: %w", err)
	}
	w.a.probes.Remove(pod)
	return w.stopped(ctx, pod)
}

// stopped reports how the containers of the pod ended.
func (w *worker) stopped(ctx context.Context, pod *v1.Pod) error {
	w.reportMu.Lock()
	defer w.reportMu.Unlock()
	rs, err := w.a.runtimeStatus(ctx, pod)
	if err != nil {
		return err
	}
	for _, c := range rs.ContainerStatuses {
		if c.State == kubecontainer.ContainerStateRunning {
			return fmt.Errorf("container %s still runs after it was stopped", c.ID.String())
		}
	}
	if len(rs.IPs) == 0 {
		rs.IPs = w.lastIPs // a stopped sandbox has none, the status keeps them
	}
	w.setPhase(phaseStopped)
	w.keep(pod, rs, true)
	w.a.statuses.Kick(w.uid)
	return nil
}

// tearDown removes volumes and cgroups of the stopped pod and reports its end.
func (w *worker) tearDown() error {
	pod, _ := w.current()
	if err := w.a.volumes.TearDown(w.uid); err != nil {
		return err
	}
	w.a.objects.Unregister(w.uid)
	if err := w.a.cgroups.DestroyPod(w.uid); err != nil {
		return err
	}
	w.a.releaseUser(w.uid)
	w.a.allocation.RemovePod(w.uid)
	w.setPhase(phaseFinished)
	st, known := w.a.statuses.Get(w.uid)
	if !known {
		st = *pod.Status.DeepCopy()
	}
	w.mu.Lock()
	gone := w.gone
	w.mu.Unlock()
	if !gone {
		w.a.statuses.Set(pod, status.Finish(pod, st), true)
	}
	w.a.retryResizes()
	return nil
}

// reject ends a pod that the node does not take.
func (w *worker) reject(reason, message string) {
	pod, _ := w.current()
	w.a.recorder.Event(pod, v1.EventTypeWarning, reason, message)
	w.mu.Lock()
	w.rejected = true
	w.mu.Unlock()
	st := *pod.Status.DeepCopy()
	st.Phase, st.Reason, st.Message = v1.PodFailed, reason, "Pod was rejected: "+message
	st.QOSClass = qosOf(pod)
	st.ObservedGeneration = podutil.CalculatePodStatusObservedGeneration(pod)
	w.a.statuses.Set(pod, st, false)
}
