package control

import (
	"context"
	"fmt"
	"reflect"
	"slices"
	"sync"
	"time"
	_ "unsafe" // for go:linkname

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"
	controllerutil "k8s.io/kubernetes/pkg/controller/util/node"

	"k8s.io/kubernetes/pkg/controller/nodelifecycle"
	evictions "k8s.io/kubernetes/pkg/controller/nodelifecycle/scheduler"
)

// Upstream's node lifecycle controller looks at its queues of nodes to taint ten times a second, also when there is no such node: more than
// half of the wake-ups of an idle server. These are the parts that its Run runs; ours runs them, too, and the one only when there is
// something to taint. They have no names outside of their package; TestNodeLifecycleParts fails when upstream changes them or its Run.

//go:linkname nodePass k8s.io/kubernetes/pkg/controller/nodelifecycle.(*Controller).doNodeProcessingPassWorker
func nodePass(*nodelifecycle.Controller, context.Context)

//go:linkname podPass k8s.io/kubernetes/pkg/controller/nodelifecycle.(*Controller).doPodProcessingWorker
func podPass(*nodelifecycle.Controller, context.Context)

//go:linkname taintPass k8s.io/kubernetes/pkg/controller/nodelifecycle.(*Controller).doNoExecuteTaintingPass
func taintPass(*nodelifecycle.Controller, context.Context)

//go:linkname healthPass k8s.io/kubernetes/pkg/controller/nodelifecycle.(*Controller).monitorNodeHealth
func healthPass(*nodelifecycle.Controller, context.Context) error

const (
	// nodeWorkers and podWorkers take nodes and pods from the controller's queues, as many as upstream's.
	nodeWorkers, podWorkers = 8, 4
	// workerPause is the time after which a worker that panicked begins again.
	workerPause = time.Second
	// taintPasses is how many passes follow a sign of a node without its taint. They last for longer than the time between two looks at the
	// nodes' health, each of which is such a sign again.
	taintPasses = 100
)

// nodeLifecycle is upstream's controller with a Run of ours.
type nodeLifecycle struct {
	*nodelifecycle.Controller
	events record.EventBroadcaster
	kube   kubernetes.Interface
	nodes  corelisters.NodeLister
	synced []cache.InformerSynced
	period time.Duration // between two looks at the nodes' health
	// untainted says that there may be a node that lacks its taint. Capacity 1.
	untainted chan struct{}
}

func newNodeLifecycle(ctx context.Context, s *scope) (func(context.Context), error) {
	kube, err := s.client()
	if err != nil {
		return nil, err
	}
	leases, pods, nodes := s.informers.Coordination().V1().Leases(), s.informers.Core().V1().Pods(), s.informers.Core().V1().Nodes()
	sets, o := s.informers.Apps().V1().DaemonSets(), &s.component.NodeLifecycleController
	l := &nodeLifecycle{kube: kube, nodes: nodes.Lister(), period: s.component.KubeCloudShared.NodeMonitorPeriod.Duration, untainted: make(chan struct{}, 1)}
	l.Controller, err = nodelifecycle.NewNodeLifecycleController(ctx, leases, pods, nodes, sets, kube, l.period, o.NodeStartupGracePeriod.Duration,
		o.NodeMonitorGracePeriod.Duration, o.NodeEvictionRate, o.SecondaryNodeEvictionRate, o.LargeClusterSizeThreshold, o.UnhealthyZoneThreshold)
	if err != nil {
		return nil, err
	}
	if l.events, err = broadcasterOf(l.Controller); err != nil {
		return nil, err
	}
	on, err := nodes.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: l.look, UpdateFunc: func(_, obj any) { l.look(obj) }})
	if err != nil {
		return nil, err
	}
	l.synced = []cache.InformerSynced{on.HasSynced, leases.Informer().HasSynced, pods.Informer().HasSynced, nodes.Informer().HasSynced, sets.Informer().HasSynced}
	return l.run, nil
}

// broadcasterOf is the controller's broadcaster of events, which its own Run would start.
func broadcasterOf(c *nodelifecycle.Controller) (record.EventBroadcaster, error) {
	field := reflect.ValueOf(c).Elem().FieldByName("broadcaster")
	if !field.IsValid() {
		return nil, fmt.Errorf("%T has no broadcaster", c)
	}
	b, ok := reflect.NewAt(field.Type(), field.Addr().UnsafePointer()).Elem().Interface().(record.EventBroadcaster)
	if !ok {
		return nil, fmt.Errorf("%T has a broadcaster of another type: %s", c, field.Type())
	}
	return b, nil
}

// look notes a node that lacks its taint.
func (l *nodeLifecycle) look(obj any) {
	if n, ok := obj.(*corev1.Node); ok && lacksTaint(n) {
		select {
		case l.untainted <- struct{}{}:
		default:
		}
	}
}

// lacksTaint says that a node is not ready and neither of the taints is there that keep pods away from such a node. Only then has upstream's
// pass anything to do: where one of them is there, the look at the nodes' health puts the other in its place.
func lacksTaint(n *corev1.Node) bool {
	if _, ready := controllerutil.GetNodeCondition(&n.Status, corev1.NodeReady); ready != nil && ready.Status == corev1.ConditionTrue {
		return false
	}
	return !slices.ContainsFunc(n.Spec.Taints, func(t corev1.Taint) bool {
		return t.Effect == corev1.TaintEffectNoExecute && (t.Key == corev1.TaintNodeNotReady || t.Key == corev1.TaintNodeUnreachable)
	})
}

// run is what upstream's Run does, with taint in place of a pass every tenth of a second.
func (l *nodeLifecycle) run(ctx context.Context) {
	// With a context that has ended, upstream's Run shuts its queues and its broadcaster down, and does nothing else.
	ended, end := context.WithCancel(ctx)
	end()
	l.events.StartStructuredLogging(3)
	l.events.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: l.kube.CoreV1().Events("")})
	var parts sync.WaitGroup
	defer parts.Wait()
	defer l.Controller.Run(ended)
	if !cache.WaitForNamedCacheSyncWithContext(ctx, l.synced...) {
		return
	}
	worker := func(pass func(*nodelifecycle.Controller, context.Context)) {
		wait.UntilWithContext(ctx, func(ctx context.Context) { pass(l.Controller, ctx) }, workerPause)
	}
	for range nodeWorkers {
		parts.Go(func() { worker(nodePass) })
	}
	for range podWorkers {
		parts.Go(func() { worker(podPass) })
	}
	parts.Go(func() { wait.UntilWithContext(ctx, l.taint, 0) })
	parts.Go(func() { wait.UntilWithContext(ctx, l.health, l.period) })
	<-ctx.Done()
}

// health looks at the nodes' health once.
func (l *nodeLifecycle) health(ctx context.Context) {
	if err := healthPass(l.Controller, ctx); err != nil {
		klog.FromContext(ctx).Error(err, "Cannot look at the health of the nodes")
	}
	nodes, _ := l.nodes.List(labels.Everything()) // from memory: it does not fail
	for _, n := range nodes {
		l.look(n)
	}
}

// taint waits for nodes that lack their taint and runs upstream's passes then, at upstream's pace.
func (l *nodeLifecycle) taint(ctx context.Context) {
	select {
	case <-ctx.Done():
		return
	case <-l.untainted:
	}
	pace := time.NewTicker(evictions.NodeEvictionPeriod)
	defer pace.Stop()
	for range taintPasses {
		taintPass(l.Controller, ctx)
		select {
		case <-ctx.Done():
			return
		case <-pace.C:
		}
	}
}
