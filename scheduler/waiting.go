package scheduler

import (
	"context"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"
)

// waiting is the pods that wait for a node of ours.
type waiting struct {
	names map[string]bool // of our profiles

	mu   sync.Mutex
	pods map[cache.ObjectName]struct{} // guarded by mu
	// turned says that there are some, or none any more. Capacity 1.
	turned chan struct{}
}

// watchPods begins to follow the pods; the caller starts the informers.
func watchPods(f informers.SharedInformerFactory, names map[string]bool) (*waiting, error) {
	w := &waiting{names: names, pods: map[cache.ObjectName]struct{}{}, turned: make(chan struct{}, 1)}
	_, err := f.Core().V1().Pods().Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: w.look, UpdateFunc: func(_, obj any) { w.look(obj) }, DeleteFunc: w.gone})
	return w, err
}

// look notes a pod as it is now.
func (w *waiting) look(obj any) {
	p, ok := obj.(*corev1.Pod)
	if !ok {
		return
	}
	ended := p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
	w.note(cache.MetaObjectToName(p), p.Spec.NodeName == "" && w.names[p.Spec.SchedulerName] && !ended)
}

func (w *waiting) gone(obj any) {
	if name, err := cache.DeletionHandlingObjectToName(obj); err == nil {
		w.note(name, false)
	}
}

func (w *waiting) note(name cache.ObjectName, waits bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	before := len(w.pods)
	if waits {
		w.pods[name] = struct{}{}
	} else {
		delete(w.pods, name)
	}
	if (before == 0) != (len(w.pods) == 0) {
		select {
		case w.turned <- struct{}{}:
		default:
		}
	}
}

func (w *waiting) some() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.pods) > 0
}

// awaitSome returns once a pod waits, false when ctx has ended before.
func (w *waiting) awaitSome(ctx context.Context) bool {
	for !w.some() {
		select {
		case <-ctx.Done():
			return false
		case <-w.turned:
		}
	}
	return ctx.Err() == nil
}

// awaitNone returns once no pod has waited for a time, or done is closed, or ctx has ended.
func (w *waiting) awaitNone(ctx context.Context, d time.Duration, done <-chan struct{}) {
	for {
		var over <-chan time.Time
		if !w.some() {
			over = time.After(d)
		}
		select {
		case <-ctx.Done():
			return
		case <-done:
			return
		case <-w.turned:
		case <-over:
			return
		}
	}
}
