package client

import (
	"fmt"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/klog/v2"

	"knarr/store"
)

// atRevision returns obj as it was, with another resourceVersion: the last state of an object that is gone, at the revision in which it is.
func atRevision(obj runtime.Object, revision int64) runtime.Object {
	out, err := store.WithRevision(obj, revision)
	if err != nil {
		klog.ErrorS(err, "Object without metadata", "type", fmt.Sprintf("%T", obj))
		return obj
	}
	return out
}

// metadataOf is the projection of metadata informers: a shell around the object's own ObjectMeta (whose maps and slices it shares, as far
// as the object is typed). Nothing is kept; a shell lives as long as its reader holds it.
func metadataOf(obj runtime.Object) (runtime.Object, error) {
	out := &metav1.PartialObjectMetadata{TypeMeta: metav1.TypeMeta{APIVersion: metav1.SchemeGroupVersion.String(), Kind: "PartialObjectMetadata"}}
	if o, ok := obj.(metav1.ObjectMetaAccessor); ok {
		if m, ok := o.GetObjectMeta().(*metav1.ObjectMeta); ok {
			out.ObjectMeta = *m
			return out, nil
		}
	}
	m, err := meta.Accessor(obj)
	if err != nil {
		return nil, fmt.Errorf("metadata of %T: %w", obj, err)
	}
	out.ObjectMeta = metav1.ObjectMeta{
		Name: m.GetName(), GenerateName: m.GetGenerateName(), Namespace: m.GetNamespace(), UID: m.GetUID(),
		ResourceVersion: m.GetResourceVersion(), Generation: m.GetGeneration(),
		CreationTimestamp: m.GetCreationTimestamp(), DeletionTimestamp: m.GetDeletionTimestamp(),
		DeletionGracePeriodSeconds: m.GetDeletionGracePeriodSeconds(),
		Labels:                     m.GetLabels(), Annotations: m.GetAnnotations(), OwnerReferences: m.GetOwnerReferences(), Finalizers: m.GetFinalizers(),
	}
	return out, nil
}
