package apiserver

import (
	"context"
	"maps"
	"reflect"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/endpoints/handlers/fieldmanager"
	kjson "sigs.k8s.io/json"

	"knarr/api"
	"knarr/apiserver/patching"
	"knarr/apiserver/structural"
)

// decodeCustom reads the body as a custom resource, with its defaults. One of which upstream's decoder would drop something, or warn, is refused.
func (wr *change) decodeCustom() (runtime.Object, error) {
	tree := map[string]any{}
	if strict, err := kjson.UnmarshalStrict(wr.body, &tree); err != nil || len(strict) > 0 || tree == nil {
		return nil, wr.refuse()
	}
	metadata, ok := tree["metadata"].(map[string]any)
	if !ok || tree["apiVersion"] != wr.kind.Stored.GroupVersion().String() || tree["kind"] != wr.kind.Stored.Kind || !structural.Metadata(metadata) ||
		!wr.custom.schema.Complete(tree) {
		return nil, wr.refuse()
	}
	return &unstructured.Unstructured{Object: tree}, nil
}

// applyCustom gives the patched custom resource, and is called again whenever the object has changed in the meantime. quiet says that no plugin will change
// it: then it shares with the object before what stays, and its managed fields wait in owned until it is checked.
func (wr *change) applyCustom(quiet bool) (runtime.Object, error) {
	wr.refused, wr.owned = false, nil
	live, ok := wr.outcome.Before.(*unstructured.Unstructured)
	if !ok {
		return nil, wr.absent()
	}
	was, ok := live.Object["metadata"].(map[string]any)
	switch {
	case !ok || was["uid"] == nil:
		return nil, wr.absent()
	case wr.outcome.Check != nil && was["deletionTimestamp"] != nil:
		return nil, errBeingDeleted
	}
	tree, ok := patching.MergeTree(live.Object, wr.body)
	if !ok {
		return nil, wr.refuse()
	}
	is, ok := tree["metadata"].(map[string]any)
	if !ok || is["name"] != was["name"] || is["namespace"] != was["namespace"] || is["uid"] != was["uid"] || tree["apiVersion"] != live.Object["apiVersion"] ||
		tree["kind"] != live.Object["kind"] || !structural.Metadata(is) || !wr.custom.schema.Complete(tree) {
		return nil, wr.refuse()
	}
	obj := &unstructured.Unstructured{Object: tree}
	if !quiet {
		return wr.ownCustom(live, obj.DeepCopy()), nil
	}
	out := wr.ownCustom(live, obj)
	if u, ok := out.(*unstructured.Unstructured); ok && wr.outcome.Check != nil {
		wr.owned = api.TakeManagedFields(u)
	}
	return out, nil
}

// ownCustom sets the managed fields of a custom resource that becomes what live was, nil for a new one.
func (wr *change) ownCustom(live, obj runtime.Object) runtime.Object {
	before := &unstructured.Unstructured{}
	if live == nil {
		before.SetGroupVersionKind(wr.kind.Stored)
	} else {
		before.Object = maps.Clone(live.(*unstructured.Unstructured).Object)
	}
	return wr.scope.FieldManager.UpdateNoErrors(before, obj, wr.manager)
}

// putOwned puts the managed fields back into a patched custom resource, and does what upstream's storage, which saw none, would do to them: a new time is
// dropped where nothing else is new.
func (wr *change) putOwned(ctx context.Context, obj, old runtime.Object) error {
	api.PutManagedFields(obj, wr.owned)
	if plainlyDiffer(obj, old) {
		return nil
	}
	_, err := fieldmanager.IgnoreManagedFieldsTimestampsTransformer(ctx, obj, old)
	return err
}

// plainlyDiffer says that two custom resources differ in something besides their managed fields. False leaves it open.
func plainlyDiffer(a, b runtime.Object) bool {
	x, ok := a.(*unstructured.Unstructured)
	y, is := b.(*unstructured.Unstructured)
	if !ok || !is || len(x.Object) != len(y.Object) {
		return false
	}
	for name, v := range x.Object {
		if name != "metadata" && !reflect.DeepEqual(v, y.Object[name]) {
			return true
		}
	}
	m, _ := x.Object["metadata"].(map[string]any)
	n, _ := y.Object["metadata"].(map[string]any)
	for name, v := range m {
		if name != "managedFields" && !reflect.DeepEqual(v, n[name]) {
			return true
		}
	}
	return false
}
