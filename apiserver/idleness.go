package apiserver

import (
	"sync/atomic"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/admission/plugin/namespace/lifecycle"
	mutatingpolicy "k8s.io/apiserver/pkg/admission/plugin/policy/mutating"
	validatingpolicy "k8s.io/apiserver/pkg/admission/plugin/policy/validating"
	"k8s.io/apiserver/pkg/admission/plugin/resourcequota"
	mutatingwebhook "k8s.io/apiserver/pkg/admission/plugin/webhook/mutating"
	validatingwebhook "k8s.io/apiserver/pkg/admission/plugin/webhook/validating"
	"k8s.io/kubernetes/plugin/pkg/admission/limitranger"

	"knarr/api"
	"knarr/store"
)

// idleness tells, from the tables themselves, when a plugin would find that it has nothing to do: no webhook, policy or quota is there. Running
// the plugin comes to the same, but it waits with a timer for informers that are long there, copies the object, or hands the request
// to workers of its own.
type idleness struct{ registry *api.Registry }

// of gives a plugin's test; nil where it always runs.
func (i idleness) of(plugin string) func(admission.Attributes) bool {
	const group = "admissionregistration.k8s.io"
	switch plugin {
	case lifecycle.PluginName:
		return i.livelyNamespace()
	case mutatingpolicy.PluginName:
		return i.policies(group, "mutatingadmissionpolicies")
	case validatingpolicy.PluginName:
		return i.policies(group, "validatingadmissionpolicies")
	case mutatingwebhook.PluginName:
		return i.none(group, "mutatingwebhookconfigurations")
	case validatingwebhook.PluginName:
		return i.none(group, "validatingwebhookconfigurations")
	case resourcequota.PluginName:
		return i.noneInNamespace("", "resourcequotas")
	case limitranger.PluginName:
		return i.noneInNamespace("", "limitranges")
	}
	return nil
}

// table finds a kind's table when it is asked for, as plugins are made before there are tables. It stays nil where other servers write,
// too, since the table may then lack what they were told is written.
func (i idleness) table(group, resource string) func() *api.Kind {
	var found atomic.Pointer[api.Kind]
	return func() *api.Kind {
		if kind := found.Load(); kind != nil {
			return kind
		}
		kind := i.registry.Kind(schema.GroupResource{Group: group, Resource: resource})
		if kind == nil || kind.Shared() {
			return nil
		}
		found.Store(kind)
		return kind
	}
}

// none says that there is no object of a kind.
func (i idleness) none(group, resource string) func(admission.Attributes) bool {
	kind := i.table(group, resource)
	return func(admission.Attributes) bool {
		k := kind()
		return k != nil && k.Table.Len() == 0
	}
}

// policies says that there is no policy of a kind and the request does not make one: the plugin, which is dormant until then, begins before
// the first of its policies is there.
func (i idleness) policies(group, resource string) func(admission.Attributes) bool {
	none := i.none(group, resource)
	return func(a admission.Attributes) bool {
		r := a.GetResource()
		return none(a) && (r.Resource != resource || r.Group != group)
	}
}

// noneInNamespace says that there is no object of a kind in the request's namespace.
func (i idleness) noneInNamespace(group, resource string) func(admission.Attributes) bool {
	kind := i.table(group, resource)
	return func(a admission.Attributes) bool {
		k := kind()
		if k == nil {
			return false
		}
		if k.Table.Len() == 0 {
			return true
		}
		empty := true
		k.Table.Snapshot().Ascend(k.Key(a.GetNamespace(), ""), "", func(*store.Record) bool { empty = false; return false })
		return empty
	}
}

// livelyNamespace says that the request's namespace is there and may get objects, or that one is to go.
func (i idleness) livelyNamespace() func(admission.Attributes) bool {
	kind := i.table("", "namespaces")
	return func(a admission.Attributes) bool {
		k := kind()
		if k == nil || a.GetNamespace() == "" || a.GetKind().Kind == "Namespace" {
			return false
		}
		if a.GetOperation() == admission.Delete {
			return true
		}
		rec := k.Table.Get(k.Key("", a.GetNamespace()))
		if rec == nil {
			return false
		}
		ns, ok := rec.Object.(*corev1.Namespace)
		return ok && ns.Status.Phase != corev1.NamespaceTerminating
	}
}
