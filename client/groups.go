package client

import (
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/informers/admissionregistration"
	"k8s.io/client-go/informers/apiserverinternal"
	"k8s.io/client-go/informers/apps"
	"k8s.io/client-go/informers/autoscaling"
	"k8s.io/client-go/informers/batch"
	"k8s.io/client-go/informers/certificates"
	"k8s.io/client-go/informers/coordination"
	"k8s.io/client-go/informers/core"
	"k8s.io/client-go/informers/discovery"
	"k8s.io/client-go/informers/events"
	"k8s.io/client-go/informers/extensions"
	"k8s.io/client-go/informers/flowcontrol"
	"k8s.io/client-go/informers/internalinterfaces"
	"k8s.io/client-go/informers/networking"
	"k8s.io/client-go/informers/node"
	"k8s.io/client-go/informers/policy"
	"k8s.io/client-go/informers/rbac"
	"k8s.io/client-go/informers/resource"
	"k8s.io/client-go/informers/scheduling"
	"k8s.io/client-go/informers/storage"
	"k8s.io/client-go/informers/storagemigration"
	"k8s.io/client-go/tools/cache"
)

// groups gives a factory the accessors of all API groups; informers come from its owner's InformerFor.
type groups struct {
	owner     internalinterfaces.SharedInformerFactory
	namespace string
	tweak     internalinterfaces.TweakListOptionsFunc
}

// Admissionregistration implements informers.SharedInformerFactory.
func (g *groups) Admissionregistration() admissionregistration.Interface {
	return admissionregistration.New(g.owner, g.namespace, g.tweak)
}

// Internal implements informers.SharedInformerFactory.
func (g *groups) Internal() apiserverinternal.Interface {
	return apiserverinternal.New(g.owner, g.namespace, g.tweak)
}

// Apps implements informers.SharedInformerFactory.
func (g *groups) Apps() apps.Interface { return apps.New(g.owner, g.namespace, g.tweak) }

// Autoscaling implements informers.SharedInformerFactory.
func (g *groups) Autoscaling() autoscaling.Interface {
	return autoscaling.New(g.owner, g.namespace, g.tweak)
}

// Batch implements informers.SharedInformerFactory.
func (g *groups) Batch() batch.Interface { return batch.New(g.owner, g.namespace, g.tweak) }

// Certificates implements informers.SharedInformerFactory.
func (g *groups) Certificates() certificates.Interface {
	return certificates.New(g.owner, g.namespace, g.tweak)
}

// Coordination implements informers.SharedInformerFactory.
func (g *groups) Coordination() coordination.Interface {
	return coordination.New(g.owner, g.namespace, g.tweak)
}

// Core implements informers.SharedInformerFactory.
func (g *groups) Core() core.Interface { return core.New(g.owner, g.namespace, g.tweak) }

// Discovery implements informers.SharedInformerFactory.
func (g *groups) Discovery() discovery.Interface { return discovery.New(g.owner, g.namespace, g.tweak) }

// Events implements informers.SharedInformerFactory.
func (g *groups) Events() events.Interface { return events.New(g.owner, g.namespace, g.tweak) }

// Extensions implements informers.SharedInformerFactory.
func (g *groups) Extensions() extensions.Interface {
	return extensions.New(g.owner, g.namespace, g.tweak)
}

// Flowcontrol implements informers.SharedInformerFactory.
func (g *groups) Flowcontrol() flowcontrol.Interface {
	return flowcontrol.New(g.owner, g.namespace, g.tweak)
}

// Networking implements informers.SharedInformerFactory.
func (g *groups) Networking() networking.Interface {
	return networking.New(g.owner, g.namespace, g.tweak)
}

// Node implements informers.SharedInformerFactory.
func (g *groups) Node() node.Interface { return node.New(g.owner, g.namespace, g.tweak) }

// Policy implements informers.SharedInformerFactory.
func (g *groups) Policy() policy.Interface { return policy.New(g.owner, g.namespace, g.tweak) }

// Rbac implements informers.SharedInformerFactory.
func (g *groups) Rbac() rbac.Interface { return rbac.New(g.owner, g.namespace, g.tweak) }

// Resource implements informers.SharedInformerFactory.
func (g *groups) Resource() resource.Interface { return resource.New(g.owner, g.namespace, g.tweak) }

// Scheduling implements informers.SharedInformerFactory.
func (g *groups) Scheduling() scheduling.Interface {
	return scheduling.New(g.owner, g.namespace, g.tweak)
}

// Storage implements informers.SharedInformerFactory.
func (g *groups) Storage() storage.Interface { return storage.New(g.owner, g.namespace, g.tweak) }

// Storagemigration implements informers.SharedInformerFactory.
func (g *groups) Storagemigration() storagemigration.Interface {
	return storagemigration.New(g.owner, g.namespace, g.tweak)
}

// observed is a factory that tells which types are asked for.
type observed struct {
	informers.SharedInformerFactory
	groups
	types typesByResource
	seen  func(obj runtime.Object)
}

// Observe returns a factory that shares f's informers and calls seen with an object of each type for which an informer is asked through it,
// each time. f must not be restricted to a namespace or a selector.
func Observe(f informers.SharedInformerFactory, seen func(obj runtime.Object)) informers.SharedInformerFactory {
	o := &observed{SharedInformerFactory: f, seen: seen}
	o.groups = groups{owner: o}
	return o
}

// InformerFor implements informers.SharedInformerFactory.
func (o *observed) InformerFor(obj runtime.Object, constructor internalinterfaces.NewInformerFunc) cache.SharedIndexInformer {
	o.seen(obj)
	return o.SharedInformerFactory.InformerFor(obj, constructor)
}

// ForResource implements informers.SharedInformerFactory.
func (o *observed) ForResource(gvr schema.GroupVersionResource) (informers.GenericInformer, error) {
	if obj := o.types.object(gvr); obj != nil {
		o.seen(obj)
	}
	return o.SharedInformerFactory.ForResource(gvr)
}

// Admissionregistration resolves the two embedded factories.
func (o *observed) Admissionregistration() admissionregistration.Interface {
	return o.groups.Admissionregistration()
}

// Internal resolves the two embedded factories.
func (o *observed) Internal() apiserverinternal.Interface { return o.groups.Internal() }

// Apps resolves the two embedded factories.
func (o *observed) Apps() apps.Interface { return o.groups.Apps() }

// Autoscaling resolves the two embedded factories.
func (o *observed) Autoscaling() autoscaling.Interface { return o.groups.Autoscaling() }

// Batch resolves the two embedded factories.
func (o *observed) Batch() batch.Interface { return o.groups.Batch() }

// Certificates resolves the two embedded factories.
func (o *observed) Certificates() certificates.Interface { return o.groups.Certificates() }

// Coordination resolves the two embedded factories.
func (o *observed) Coordination() coordination.Interface { return o.groups.Coordination() }

// Core resolves the two embedded factories.
func (o *observed) Core() core.Interface { return o.groups.Core() }

// Discovery resolves the two embedded factories.
func (o *observed) Discovery() discovery.Interface { return o.groups.Discovery() }

// Events resolves the two embedded factories.
func (o *observed) Events() events.Interface { return o.groups.Events() }

// Extensions resolves the two embedded factories.
func (o *observed) Extensions() extensions.Interface { return o.groups.Extensions() }

// Flowcontrol resolves the two embedded factories.
func (o *observed) Flowcontrol() flowcontrol.Interface { return o.groups.Flowcontrol() }

// Networking resolves the two embedded factories.
func (o *observed) Networking() networking.Interface { return o.groups.Networking() }

// Node resolves the two embedded factories.
func (o *observed) Node() node.Interface { return o.groups.Node() }

// Policy resolves the two embedded factories.
func (o *observed) Policy() policy.Interface { return o.groups.Policy() }

// Rbac resolves the two embedded factories.
func (o *observed) Rbac() rbac.Interface { return o.groups.Rbac() }

// Resource resolves the two embedded factories.
func (o *observed) Resource() resource.Interface { return o.groups.Resource() }

// Scheduling resolves the two embedded factories.
func (o *observed) Scheduling() scheduling.Interface { return o.groups.Scheduling() }

// Storage resolves the two embedded factories.
func (o *observed) Storage() storage.Interface { return o.groups.Storage() }

// Storagemigration resolves the two embedded factories.
func (o *observed) Storagemigration() storagemigration.Interface { return o.groups.Storagemigration() }
