package status

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/klog/v2"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	kubetypes "k8s.io/kubernetes/pkg/kubelet/types"
)

const (
	// maxSending bounds the status writes in flight; more pods wait in turn.
	maxSending = 16
	// retryFirst and retryMax bound the pause after a failed write.
	retryFirst = 200 * time.Millisecond
	retryMax   = 10 * time.Second
)

// Writer holds the status of every pod of the node and writes what changed to
// the API: at once, each pod in its own goroutine that exists only while there
// is something to send, only the newest status, and never the same twice. When
// a deleted pod has finished, it also removes the object. Safe for concurrent use.
type Writer struct {
	client kubernetes.Interface
	mayRun func(uid types.UID) bool
	slots  chan struct{}

	mu   sync.Mutex
	ctx  context.Context // nil until Start
	pods map[types.UID]*entry
	wg   sync.WaitGroup
}

type entry struct {
	pod      *v1.Pod      // newest object of the API, also from our own writes
	status   v1.PodStatus // what the API shall show
	version  uint64       // of status
	sent     uint64       // version that the API shows
	finished bool         // nothing of the pod is left on the node
	sending  bool         // a goroutine is at it
	static   bool         // a static pod: pod is its mirror, nil while there is none
}

// NewWriter returns a Writer. mayRun tells whether containers of a pod could
// still be running: a terminal phase is held back as long.
func NewWriter(client kubernetes.Interface, mayRun func(uid types.UID) bool) *Writer {
	return &Writer{client: client, mayRun: mayRun, slots: make(chan struct{}, maxSending), pods: map[types.UID]*entry{}}
}

// Start lets the writer send until ctx ends.
func (w *Writer) Start(ctx context.Context) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ctx = ctx
	for uid, e := range w.pods {
		w.kickLocked(uid, e)
	}
}

// Wait returns when no write is in flight; call it after the context of Start ended.
func (w *Writer) Wait() { w.wg.Wait() }

// Get returns the newest status of a pod.
func (w *Writer) Get(uid types.UID) (v1.PodStatus, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	e := w.pods[uid]
	if e == nil || e.version == 0 {
		return v1.PodStatus{}, false
	}
	return *e.status.DeepCopy(), true
}

// GetPodStatus is Get, under the name upstream's packages ask for.
func (w *Writer) GetPodStatus(uid types.UID) (v1.PodStatus, bool) { return w.Get(uid) }

// Set makes status the newest one of pod and sends it when it differs from the
// one before. finished says that nothing of the pod is left on the node. It
// returns the status as kept, with its times filled in.
func (w *Writer) Set(pod *v1.Pod, status v1.PodStatus, finished bool) v1.PodStatus {
	w.mu.Lock()
	defer w.mu.Unlock()
	e := w.pods[pod.UID]
	if e == nil {
		e = &entry{}
		w.pods[pod.UID] = e
	}
	e.observe(pod)
	previous := &pod.Status
	if e.version > 0 {
		previous = &e.status
	}
	if err := checkTransition(pod, previous, &status); err != nil {
		klog.Background().Error(err, "Pod status not taken over")
		return *previous.DeepCopy()
	}
	next := *status.DeepCopy()
	settle(pod, previous, &next, time.Now())
	finished = finished || e.finished
	if e.version > 0 && same(&e.status, &next) && finished == e.finished && pod.DeletionTimestamp == nil {
		return next
	}
	e.status, e.finished = next, finished
	e.version++
	w.kickLocked(pod.UID, e)
	return *next.DeepCopy()
}

// Observe takes in the newest object of a pod from the watch: a status that
// someone else changed is written again, a finished pod that got deleted is removed.
func (w *Writer) Observe(pod *v1.Pod) {
	w.mu.Lock()
	defer w.mu.Unlock()
	e := w.pods[pod.UID]
	if e == nil || !e.observe(pod) || e.version == 0 {
		return
	}
	again := e.finished && pod.DeletionTimestamp != nil // also while a write is under way: it may have missed it
	if !again && !e.sending {
		shown := pod.Status.DeepCopy()
		normalize(pod, shown)
		held := e.status
		again = !same(shown, &held)
	}
	if again {
		e.version++
		w.kickLocked(pod.UID, e)
	}
}

// Forget drops a pod that is gone from the API.
func (w *Writer) Forget(uid types.UID) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.pods, uid)
}

// Kick sends the status again if it was held back: call it when mayRun changed.
func (w *Writer) Kick(uid types.UID) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if e := w.pods[uid]; e != nil && e.version > 0 {
		e.version++
		w.kickLocked(uid, e)
	}
}

// observe keeps pod if it is newer than the object known so far.
func (e *entry) observe(pod *v1.Pod) bool {
	if kubetypes.IsStaticPod(pod) && !kubetypes.IsMirrorPod(pod) {
		e.static = true
		return false
	}
	if e.pod != nil && e.pod.UID == pod.UID && resourceVersion(pod) < resourceVersion(e.pod) {
		return false
	}
	e.pod = pod
	return true
}

// SetMirror tells which object of the API shows the status of a static pod.
func (w *Writer) SetMirror(uid types.UID, mirror *v1.Pod) {
	w.mu.Lock()
	defer w.mu.Unlock()
	e := w.pods[uid]
	if e == nil {
		e = &entry{static: true}
		w.pods[uid] = e
	}
	if !e.observe(mirror) || e.version == 0 || e.sending {
		return
	}
	shown := mirror.Status.DeepCopy()
	normalize(mirror, shown)
	held := e.status
	if !same(shown, &held) {
		e.version++
		w.kickLocked(uid, e)
	}
}

func resourceVersion(pod *v1.Pod) uint64 {
	n, err := strconv.ParseUint(pod.ResourceVersion, 10, 64)
	if err != nil {
		return 0 // fakes and static pods have none
	}
	return n
}

func (w *Writer) kickLocked(uid types.UID, e *entry) {
	if w.ctx == nil || e.sending || e.version <= e.sent || e.pod == nil {
		return
	}
	e.sending = true
	ctx := w.ctx
	w.wg.Go(func() { w.sendAll(ctx, uid) })
}

// sendAll writes the status of a pod until the API shows the newest one.
func (w *Writer) sendAll(ctx context.Context, uid types.UID) {
	pause := retryFirst
	for {
		select {
		case w.slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		err := w.sendOnce(ctx, uid)
		<-w.slots
		w.mu.Lock()
		e := w.pods[uid]
		if e == nil || e.pod == nil || (err == nil && e.sent >= e.version) {
			if e != nil {
				e.sending = false
			}
			w.mu.Unlock()
			return
		}
		w.mu.Unlock()
		if err == nil {
			pause = retryFirst
			continue
		}
		if ctx.Err() != nil {
			return
		}
		klog.FromContext(ctx).Error(err, "Pod status not written, will try again", "podUID", uid, "pause", pause)
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return
		}
		pause = min(2*pause, retryMax)
	}
}

// sendOnce writes the newest status of a pod once, and removes the object of a
// finished one. A pod that is gone from the API is forgotten.
func (w *Writer) sendOnce(ctx context.Context, uid types.UID) error {
	w.mu.Lock()
	e := w.pods[uid]
	if e == nil || e.pod == nil {
		w.mu.Unlock()
		return nil
	}
	pod, version, finished := e.pod, e.version, e.finished
	next := *e.status.DeepCopy()
	w.mu.Unlock()

	merged := merge(pod, pod.Status, next, !finished && w.mayRun(uid), time.Now())
	updated, err := w.patch(ctx, pod, merged)
	switch {
	case apierrors.IsNotFound(err) || apierrors.IsConflict(err):
		// Deleted, or deleted and made anew under the same name.
		w.lost(uid, version)
		return nil
	case err != nil:
		return err
	}
	w.mu.Lock()
	if e := w.pods[uid]; e != nil {
		e.observe(updated)
		updated = e.pod
		e.sent = max(e.sent, version)
	}
	w.mu.Unlock()
	return w.removeFinished(ctx, updated, finished)
}

// lost notes that the object is gone from the API: with it goes the status,
// unless it was a mirror, of which there will be another one.
func (w *Writer) lost(uid types.UID, version uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	e := w.pods[uid]
	switch {
	case e == nil:
	case e.static:
		e.pod, e.sent = nil, max(e.sent, version)
	default:
		delete(w.pods, uid)
	}
}

func (w *Writer) patch(ctx context.Context, pod *v1.Pod, next v1.PodStatus) (*v1.Pod, error) {
	before, err := json.Marshal(v1.Pod{Status: pod.Status})
	if err != nil {
		return nil, fmt.Errorf("status of pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	after, err := json.Marshal(v1.Pod{ObjectMeta: metav1.ObjectMeta{UID: pod.UID}, Status: next})
	if err != nil {
		return nil, fmt.Errorf("status of pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	patch, err := strategicpatch.CreateTwoWayMergePatch(before, after, v1.Pod{})
	if err != nil {
		return nil, fmt.Errorf("status patch of pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	if string(patch) == fmt.Sprintf(`{"metadata":{"uid":%q}}`, pod.UID) {
		return pod, nil
	}
	return w.client.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
}

// removeFinished deletes the object of a pod that was asked to go and of which
// nothing is left.
func (w *Writer) removeFinished(ctx context.Context, pod *v1.Pod, finished bool) error {
	if !finished || pod.DeletionTimestamp == nil || kubetypes.IsMirrorPod(pod) || !podutil.IsPodPhaseTerminal(pod.Status.Phase) {
		return nil
	}
	err := w.client.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{
		GracePeriodSeconds: new(int64),
		Preconditions:      metav1.NewUIDPreconditions(string(pod.UID)),
	})
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		return err
	}
	w.Forget(pod.UID)
	return nil
}
