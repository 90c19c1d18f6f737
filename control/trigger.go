package control

import (
	"context"
	"slices"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"
	bootstrapapi "k8s.io/cluster-bootstrap/token/api"
)

// secretTypeBootstrapToken is the type of secrets by which kubeadm joins nodes.
const secretTypeBootstrapToken = bootstrapapi.SecretTypeBootstrapToken

// A trigger says that a controller has something to do: an object of a resource exists (that matches).
type trigger struct {
	resource schema.GroupVersionResource
	match    func(obj any) bool // nil: any
}

// on is a trigger for each of some resources of one version.
func on(groupVersion string, resources ...string) []trigger {
	gv, err := schema.ParseGroupVersion(groupVersion)
	if err != nil {
		panic("control: " + err.Error()) // a typing mistake in the table
	}
	out := make([]trigger, len(resources))
	for i, r := range resources {
		out[i] = trigger{resource: gv.WithResource(r)}
	}
	return out
}

// podWith triggers on a pod that matches.
func podWith(match func(*corev1.Pod) bool) trigger {
	return trigger{corev1.SchemeGroupVersion.WithResource("pods"), func(obj any) bool {
		p, ok := obj.(*corev1.Pod)
		return ok && match(p)
	}}
}

// secretOf triggers on a secret of a type.
func secretOf(typ corev1.SecretType) trigger {
	return trigger{corev1.SchemeGroupVersion.WithResource("secrets"), func(obj any) bool {
		s, ok := obj.(*corev1.Secret)
		return ok && s.Type == typ
	}}
}

func disruptionTarget(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool { return c.Type == corev1.DisruptionTarget })
}

func ephemeralVolume(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.Spec.Volumes, func(v corev1.Volume) bool { return v.Ephemeral != nil })
}

// attachableVolume says that a pod names a volume that has to be attached to its node without a PersistentVolume in between.
func attachableVolume(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.Spec.Volumes, func(v corev1.Volume) bool {
		return v.ISCSI != nil || v.FC != nil || v.FlexVolume != nil || v.AWSElasticBlockStore != nil || v.GCEPersistentDisk != nil ||
			v.AzureDisk != nil || v.Cinder != nil || v.VsphereVolume != nil || v.PortworxVolume != nil
	})
}

// armed is a set of triggers that is being waited for.
type armed struct {
	fired chan struct{}
	once  sync.Once
	undo  []func()
}

// arm begins to watch. The informers have to be started by the caller.
func arm(f informers.SharedInformerFactory, triggers []trigger) (*armed, error) {
	a := &armed{fired: make(chan struct{})}
	for _, t := range triggers {
		generic, err := f.ForResource(t.resource)
		if err != nil {
			a.disarm()
			return nil, err
		}
		informer := generic.Informer()
		look := func(obj any) {
			if t.match == nil || t.match(obj) {
				a.once.Do(func() { close(a.fired) })
			}
		}
		handle, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: look, UpdateFunc: func(_, obj any) { look(obj) }})
		if err != nil {
			a.disarm()
			return nil, err
		}
		a.undo = append(a.undo, func() { _ = informer.RemoveEventHandler(handle) })
	}
	return a, nil
}

// wait returns true when one of the triggers has fired, false when ctx has ended before. It disarms them.
func (a *armed) wait(ctx context.Context) bool {
	defer a.disarm()
	select {
	case <-a.fired:
		return true
	case <-ctx.Done():
		return false
	}
}

func (a *armed) disarm() {
	for _, f := range a.undo {
		f()
	}
	a.undo = nil
}
