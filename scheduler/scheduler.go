// Package scheduler runs upstream's scheduler in the server process while pods wait for a node: the default profile on the latest
// configuration's defaults, reading nodes and pods from the store itself (package client) and writing bindings and events through the API.
package scheduler

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/informers"
	coreinformers "k8s.io/client-go/informers/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/events"
	"k8s.io/klog/v2"
	upstream "k8s.io/kubernetes/pkg/scheduler"
	"k8s.io/kubernetes/pkg/scheduler/apis/config"
	"k8s.io/kubernetes/pkg/scheduler/apis/config/latest"
)

// UserName is the identity under which upstream's bootstrap policy lets a scheduler work. Config should act as it.
const UserName = "system:kube-scheduler"

// debugSignal has upstream's scheduler write down what it knows.
const debugSignal = syscall.SIGUSR2

// notTerminal selects the pods that take room on a node.
const notTerminal = "status.phase!=" + string(corev1.PodSucceeded) + ",status.phase!=" + string(corev1.PodFailed)

// idleTime is how long no pod has waited for a node when the scheduler ends. It is made anew with the next pod that waits, which takes some
// milliseconds; while it runs, its metrics and its queue tick four times a second.
const idleTime = time.Minute

// Options are what the scheduler needs.
type Options struct {
	// Config reaches the API. Required.
	Config *rest.Config
	// Informers makes informers of nodes, pods and so on. Each factory is used once, and shut down. Required.
	Informers func() informers.SharedInformerFactory
	// Dynamic likewise makes informers of custom resources for plugins that wait for them; nil: none do.
	Dynamic func() dynamicinformer.DynamicSharedInformerFactory
	// Ready, if not nil, is called each time that the scheduler begins to schedule.
	Ready func()
}

// Run schedules until ctx ends; its informers have ended when it returns. The scheduler itself exists while pods wait for a node, and for
// a minute after the last of them.
func Run(ctx context.Context, o Options) error { return run(ctx, o, idleTime) }

func run(ctx context.Context, o Options, idle time.Duration) error {
	if o.Config == nil || o.Informers == nil {
		return errors.New("scheduler: Options.Config and Informers are required")
	}
	c, err := latest.Default()
	if err != nil {
		return fmt.Errorf("scheduler: default configuration: %w", err)
	}
	names := map[string]bool{}
	for i := range c.Profiles {
		names[c.Profiles[i].SchedulerName] = true
	}
	f := o.Informers()
	pods, err := watchPods(f, names)
	if err != nil {
		return fmt.Errorf("scheduler: watch pods: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer func() { cancel(); f.Shutdown() }()
	f.StartWithContext(ctx)
	quiet := make(chan os.Signal, 1)
	defer signal.Stop(quiet)
	for pods.awaitSome(ctx) {
		if err := runWhile(ctx, o, c, func(ctx context.Context, done <-chan struct{}) { pods.awaitNone(ctx, idle, done) }); err != nil {
			return err
		}
		// Each scheduler asks for the signal of its debugger and never gives it back.
		signal.Reset(debugSignal)
		signal.Notify(quiet, debugSignal)
	}
	return nil
}

// runWhile runs a scheduler until needed returns.
func runWhile(ctx context.Context, o Options, c *config.KubeSchedulerConfiguration, needed func(context.Context, <-chan struct{})) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		err = runOne(ctx, o, c)
	}()
	needed(ctx, done)
	cancel()
	<-done
	return err
}

// runOne runs a scheduler until ctx ends.
func runOne(ctx context.Context, o Options, c *config.KubeSchedulerConfiguration) error {
	parts := factories{o.Informers(), nil}
	if o.Dynamic != nil {
		parts.dynamic = o.Dynamic()
	}
	ctx, cancel := context.WithCancel(ctx)
	defer func() { cancel(); parts.shutdown() }()
	to := rest.CopyConfig(o.Config)
	to.UserAgent = "kube-scheduler/knarr"
	kube, err := kubernetes.NewForConfig(to)
	if err != nil {
		return fmt.Errorf("scheduler: client: %w", err)
	}
	broadcaster := events.NewEventBroadcasterAdapterWithContext(ctx, kube)
	defer broadcaster.Shutdown()
	broadcaster.StartRecordingToSink(ctx.Done())
	s, err := build(ctx, parts, c, to, kube, broadcaster)
	if err != nil {
		return err
	}
	if err := parts.await(ctx, s); err != nil && ctx.Err() != nil {
		return nil
	} else if err != nil {
		return fmt.Errorf("scheduler: wait for its informers: %w", err)
	}
	if o.Ready != nil {
		o.Ready()
	}
	s.Run(ctx)
	return nil
}

// factories are the informers of one scheduler.
type factories struct {
	typed   informers.SharedInformerFactory
	dynamic dynamicinformer.DynamicSharedInformerFactory // or nil
}

func (f factories) shutdown() {
	f.typed.Shutdown()
	if f.dynamic != nil {
		f.dynamic.Shutdown()
	}
}

// build makes upstream's scheduler with its default configuration.
//
//lint:ignore SA1019 upstream's own scheduler still takes its recorders from this adapter
func build(ctx context.Context, f factories, c *config.KubeSchedulerConfiguration, to *rest.Config, kube kubernetes.Interface, b events.EventBroadcasterAdapter) (*upstream.Scheduler, error) {
	f.typed.InformerFor(&corev1.Pod{}, podInformer)
	recorder := func(name string) events.EventRecorderLogger { return b.NewRecorder(name) }
	s, err := upstream.New(ctx, kube, f.typed, f.dynamic, recorder,
		upstream.WithComponentConfigVersion(c.APIVersion),
		upstream.WithKubeConfig(to),
		upstream.WithProfiles(c.Profiles...),
		upstream.WithPercentageOfNodesToScore(c.PercentageOfNodesToScore),
		upstream.WithPodMaxBackoffSeconds(c.PodMaxBackoffSeconds),
		upstream.WithPodInitialBackoffSeconds(c.PodInitialBackoffSeconds),
		upstream.WithParallelism(c.Parallelism))
	if err != nil {
		return nil, fmt.Errorf("scheduler: %w", err)
	}
	return s, nil
}

// podInformer is the informer of the pods that matter to a scheduler.
func podInformer(kube kubernetes.Interface, resync time.Duration) cache.SharedIndexInformer {
	return coreinformers.NewFilteredPodInformer(kube, metav1.NamespaceAll, resync, cache.Indexers{cache.NamespaceIndex: cache.MetaNamespaceIndexFunc},
		func(o *metav1.ListOptions) { o.FieldSelector = notTerminal })
}

// await starts the informers and waits until the scheduler has seen all that exists.
func (f factories) await(ctx context.Context, s *upstream.Scheduler) error {
	f.typed.StartWithContext(ctx)
	if f.dynamic != nil {
		f.dynamic.Start(ctx.Done())
	}
	begin := time.Now()
	if err := f.typed.WaitForCacheSyncWithContext(ctx).AsError(); err != nil {
		return err
	}
	if f.dynamic != nil {
		f.dynamic.WaitForCacheSync(ctx.Done())
	}
	if err := s.WaitForHandlersSync(ctx); err != nil {
		return err
	}
	klog.FromContext(ctx).V(1).Info("The scheduler knows the cluster", "after", time.Since(begin))
	return nil
}
