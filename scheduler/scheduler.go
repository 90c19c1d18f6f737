// Package scheduler runs upstream's scheduler in the server process: the default profile on the latest configuration's defaults, reading nodes
// and pods from the store itself (package client) and writing bindings and events through the API.
package scheduler

import (
	"context"
	"errors"
	"fmt"
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
	"k8s.io/kubernetes/pkg/scheduler/apis/config/latest"
)

// UserName is the identity under which upstream's bootstrap policy lets a scheduler work. Config should act as it.
const UserName = "system:kube-scheduler"

// notTerminal selects the pods that take room on a node.
const notTerminal = "status.phase!=" + string(corev1.PodSucceeded) + ",status.phase!=" + string(corev1.PodFailed)

// Options are what the scheduler needs.
type Options struct {
	// Config reaches the API. Required.
	Config *rest.Config
	// Informers belong to the scheduler alone: it shows itself only pods that have not ended. Required.
	Informers informers.SharedInformerFactory
	// Dynamic gives informers of custom resources to plugins that wait for them; nil: none do.
	Dynamic dynamicinformer.DynamicSharedInformerFactory
	// Ready, if not nil, is called once the scheduler begins to schedule.
	Ready func()
}

// Run schedules until ctx ends; its informers have ended when it returns.
func Run(ctx context.Context, o Options) error {
	if o.Config == nil || o.Informers == nil {
		return errors.New("scheduler: Options.Config and Informers are required")
	}
	ctx, cancel := context.WithCancel(ctx)
	defer func() {
		cancel()
		o.Informers.Shutdown()
		if o.Dynamic != nil {
			o.Dynamic.Shutdown()
		}
	}()
	config := rest.CopyConfig(o.Config)
	config.UserAgent = "kube-scheduler/knarr"
	kube, err := kubernetes.NewForConfig(config)
	if err != nil {
		return fmt.Errorf("scheduler: client: %w", err)
	}
	broadcaster := events.NewEventBroadcasterAdapterWithContext(ctx, kube)
	defer broadcaster.Shutdown()
	broadcaster.StartRecordingToSink(ctx.Done())
	s, err := build(ctx, o, config, kube, broadcaster)
	if err != nil {
		return err
	}
	if err := awaitInformers(ctx, o, s); err != nil && ctx.Err() != nil {
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

// build makes upstream's scheduler with its default configuration.
//
//lint:ignore SA1019 upstream's own scheduler still takes its recorders from this adapter
func build(ctx context.Context, o Options, config *rest.Config, kube kubernetes.Interface, b events.EventBroadcasterAdapter) (*upstream.Scheduler, error) {
	c, err := latest.Default()
	if err != nil {
		return nil, fmt.Errorf("scheduler: default configuration: %w", err)
	}
	o.Informers.InformerFor(&corev1.Pod{}, podInformer)
	recorder := func(name string) events.EventRecorderLogger { return b.NewRecorder(name) }
	s, err := upstream.New(ctx, kube, o.Informers, o.Dynamic, recorder,
		upstream.WithComponentConfigVersion(c.APIVersion),
		upstream.WithKubeConfig(config),
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

// awaitInformers starts the informers and waits until the scheduler has seen all that exists.
func awaitInformers(ctx context.Context, o Options, s *upstream.Scheduler) error {
	o.Informers.StartWithContext(ctx)
	if o.Dynamic != nil {
		o.Dynamic.Start(ctx.Done())
	}
	begin := time.Now()
	if err := o.Informers.WaitForCacheSyncWithContext(ctx).AsError(); err != nil {
		return err
	}
	if o.Dynamic != nil {
		o.Dynamic.WaitForCacheSync(ctx.Done())
	}
	if err := s.WaitForHandlersSync(ctx); err != nil {
		return err
	}
	klog.FromContext(ctx).V(1).Info("The scheduler knows the cluster", "after", time.Since(begin))
	return nil
}
