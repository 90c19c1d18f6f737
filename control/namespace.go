package control

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/controller/namespace/deletion"

	"knarr/client"
)

// Bounds of the namespace controller.
const (
	// namespaceGrace is the time between a namespace's deletion and the first look at its content, for requests that were admitted before the
	// deletion to finish. Upstream waits 5 s, and as long again after each change of the namespace, because its API servers learn of the
	// deletion at different times; ours reads it from the store.
	namespaceGrace = 500 * time.Millisecond
	// A namespace with content that does not go is looked at again after namespaceRetry, doubled up to namespaceRetryMax. Normally the end
	// of its last pod wakes the controller earlier.
	namespaceRetry    = 100 * time.Millisecond
	namespaceRetryMax = 15 * time.Second
)

var errNoResources = errors.New("discovery is empty")

// namespaceController empties namespaces that are to go, by upstream's own deleter.
type namespaceController struct {
	queue      workqueue.TypedRateLimitingInterface[string]
	namespaces corelisters.NamespaceLister
	pods       cache.Indexer
	deleter    deletion.NamespacedResourcesDeleterInterface
	synced     []cache.InformerSynced
}

// newNamespaceController also differs from upstream's in that it does not end the process when discovery has nothing to say.
func newNamespaceController(ctx context.Context, s *scope) (func(context.Context), error) {
	kube, err := kubernetes.NewForConfig(s.config())
	if err != nil {
		return nil, err
	}
	meta, err := metadata.NewForConfig(s.config())
	if err != nil {
		return nil, err
	}
	discover := kube.Discovery().ServerPreferredNamespacedResources
	if found, err := discover(); len(found) == 0 {
		return nil, fmt.Errorf("the API serves no namespaced resources yet: %w", errors.Join(err, errNoResources))
	}
	spaces, pods := s.informers.Core().V1().Namespaces(), s.informers.Core().V1().Pods()
	c := &namespaceController{
		namespaces: spaces.Lister(), pods: pods.Informer().GetIndexer(),
		deleter: deletion.NewNamespacedResourcesDeleter(ctx, kube.CoreV1().Namespaces(), meta, kube.CoreV1(), discover, corev1.FinalizerKubernetes),
		queue: workqueue.NewTypedRateLimitingQueueWithConfig(
			workqueue.NewTypedItemExponentialFailureRateLimiter[string](namespaceRetry, namespaceRetryMax),
			workqueue.TypedRateLimitingQueueConfig[string]{Name: "namespace"}),
	}
	on, err := spaces.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: c.changed, UpdateFunc: func(_, obj any) { c.changed(obj) }})
	if err != nil {
		return nil, err
	}
	gone, err := pods.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{DeleteFunc: c.podGone})
	if err != nil {
		return nil, err
	}
	c.synced = []cache.InformerSynced{on.HasSynced, gone.HasSynced}
	workers := int(s.component.NamespaceController.ConcurrentNamespaceSyncs)
	return func(ctx context.Context) { c.run(ctx, workers) }, nil
}

// changed looks at a namespace.
func (c *namespaceController) changed(obj any) {
	if ns, ok := obj.(*corev1.Namespace); ok && ns.DeletionTimestamp != nil {
		// The deletion's time may have been cut to its second.
		left := namespaceGrace + time.Second - time.Since(ns.DeletionTimestamp.Time)
		c.queue.AddAfter(ns.Name, min(namespaceGrace, max(0, left)))
	}
}

// podGone looks at the namespace of a pod if that was the last one that a namespace waits for.
func (c *namespaceController) podGone(obj any) {
	key, err := cache.DeletionHandlingObjectToName(obj)
	if err != nil {
		return
	}
	ns, err := c.namespaces.Get(key.Namespace)
	if err == nil && ns.DeletionTimestamp != nil && !client.HasObjects(c.pods, key.Namespace) {
		c.changed(ns)
	}
}

func (c *namespaceController) run(ctx context.Context, workers int) {
	var wg sync.WaitGroup
	defer wg.Wait()
	defer c.queue.ShutDown()
	if !cache.WaitForNamedCacheSyncWithContext(ctx, c.synced...) {
		return
	}
	for range workers {
		wg.Go(func() {
			for c.next(ctx) {
			}
		})
	}
	<-ctx.Done()
}

// next empties one namespace; false when the controller ends.
func (c *namespaceController) next(ctx context.Context) bool {
	name, ended := c.queue.Get()
	if ended {
		return false
	}
	defer c.queue.Done(name)
	if _, err := c.namespaces.Get(name); err != nil {
		c.queue.Forget(name)
		return true
	}
	err := c.deleter.Delete(ctx, name)
	var remaining *deletion.ResourcesRemainingError
	switch {
	case err == nil:
		c.queue.Forget(name)
	case errors.As(err, &remaining):
		klog.FromContext(ctx).V(4).Info("Content remains in the namespace", "namespace", name, "estimateSeconds", remaining.Estimate)
		c.queue.AddRateLimited(name)
	default:
		klog.FromContext(ctx).Error(err, "Cannot empty the namespace; trying again", "namespace", name)
		c.queue.AddRateLimited(name)
	}
	return true
}
