package control

import (
	"context"
	"fmt"
	"sync"
	"time"

	"k8s.io/apiserver/pkg/quota/v1/generic"
	"k8s.io/client-go/metadata"
	"k8s.io/klog/v2"
	pkgcontroller "k8s.io/kubernetes/pkg/controller"
	"k8s.io/kubernetes/pkg/controller/garbagecollector"
	"k8s.io/kubernetes/pkg/controller/resourcequota"
	serviceaccountcontroller "k8s.io/kubernetes/pkg/controller/serviceaccount"
	quotainstall "k8s.io/kubernetes/pkg/quota/v1/install"
	"k8s.io/kubernetes/pkg/serviceaccount"
)

// syncGrace is both the time that informers of new resources get to sync before a sync of monitors is said to have failed, and the least time
// between two syncs.
const syncGrace = time.Second

// together runs functions until all have returned.
func together(fs ...func(context.Context)) func(context.Context) {
	return func(ctx context.Context) {
		var wg sync.WaitGroup
		for _, f := range fs {
			wg.Go(func() { f(ctx) })
		}
		wg.Wait()
	}
}

// newTokenController is upstream's, which its table of constructors cannot build.
func newTokenController(ctx context.Context, s *scope) (func(context.Context), error) {
	kube, err := s.client()
	if err != nil {
		return nil, err
	}
	generator, err := serviceaccount.JWTTokenGenerator(serviceaccount.LegacyIssuer, s.options.ServiceAccountKey)
	if err != nil {
		return nil, fmt.Errorf("token generator: %w", err)
	}
	c, err := serviceaccountcontroller.NewTokensController(klog.FromContext(ctx), s.informers.Core().V1().ServiceAccounts(),
		s.informers.Core().V1().Secrets(), kube, serviceaccountcontroller.TokensControllerOptions{TokenGenerator: generator, RootCA: s.options.RootCA})
	if err != nil {
		return nil, err
	}
	workers := int(s.component.SAController.ConcurrentSATokenSyncs)
	return func(ctx context.Context) { c.Run(ctx, workers) }, nil
}

// newQuotaController is upstream's with a discovery that waits for changes.
func newQuotaController(ctx context.Context, s *scope) (func(context.Context), error) {
	kube, err := s.client()
	if err != nil {
		return nil, err
	}
	q, err := quotainstall.NewQuotaConfigurationForControllers(generic.ListerFuncForResourceFunc(s.informers.ForResource), s.informers)
	if err != nil {
		return nil, err
	}
	c, err := resourcequota.NewController(ctx, &resourcequota.ControllerOptions{
		QuotaClient:               kube.CoreV1(),
		ResourceQuotaInformer:     s.informers.Core().V1().ResourceQuotas(),
		ResyncPeriod:              pkgcontroller.StaticResyncPeriodFunc(s.component.ResourceQuotaController.ResourceQuotaSyncPeriod.Duration),
		InformerFactory:           s.objectsOrMetadata(),
		ReplenishmentResyncPeriod: noResync,
		DiscoveryFunc:             s.discovery.ServerPreferredNamespacedResources,
		IgnoredResourcesFunc:      q.IgnoredResources,
		InformersStarted:          s.running,
		Registry:                  generic.NewRegistry(q.Evaluators()),
		UpdateFilter:              quotainstall.DefaultUpdateFilter(),
	})
	if err != nil {
		return nil, err
	}
	workers := int(s.component.ResourceQuotaController.ConcurrentResourceQuotaSyncs)
	return together(
		func(ctx context.Context) { c.Run(ctx, workers) },
		func(ctx context.Context) {
			d := gated{s.discovery, &gate{ctx: ctx, changes: s.changes}}
			c.Sync(ctx, d.ServerPreferredNamespacedResources, syncGrace)
		}), nil
}

// newGarbageCollector is upstream's with a discovery that waits for changes.
func newGarbageCollector(ctx context.Context, s *scope) (func(context.Context), error) {
	kube, err := s.client()
	if err != nil {
		return nil, err
	}
	meta, err := metadata.NewForConfig(s.config())
	if err != nil {
		return nil, err
	}
	c, err := garbagecollector.NewGarbageCollector(ctx, kube, meta, s.mapper, garbagecollector.DefaultIgnoredResources(), s.objectsOrMetadata(), s.running)
	if err != nil {
		return nil, err
	}
	workers := int(s.component.GarbageCollectorController.ConcurrentGCSyncs)
	return together(
		func(ctx context.Context) { c.Run(ctx, workers, syncGrace) },
		func(ctx context.Context) {
			c.Sync(ctx, gated{s.discovery, &gate{ctx: ctx, changes: s.changes}}, syncGrace)
		}), nil
}
