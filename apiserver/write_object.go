package apiserver

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/managedfields"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/endpoints/handlers"
	"k8s.io/apiserver/pkg/endpoints/handlers/fieldmanager"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/apiserver/pkg/warning"
	"k8s.io/kubernetes/pkg/api/legacyscheme"

	"knarr/api"
	"knarr/apiserver/patching"
)

func schemaResource(info *apirequest.RequestInfo) schema.GroupVersionResource {
	return schema.GroupVersionResource{Group: info.APIGroup, Version: info.APIVersion, Resource: info.Resource}
}

// create does what upstream's handler of creates does, in its order.
// Source: createHandler in k8s.io/apiserver/pkg/endpoints/handlers/create.go.
func (wr *change) create(ctx context.Context) (runtime.Object, error) {
	decode := wr.decode
	if wr.custom != nil {
		decode = wr.decodeCustom
	}
	obj, err := decode()
	if err != nil {
		return nil, wr.refuse()
	}
	acc, err := meta.Accessor(obj)
	if err != nil || acc.GetManagedFields() != nil || acc.GetResourceVersion() != "" || repeatsOwner(acc.GetOwnerReferences()) {
		return nil, wr.refuse()
	}
	rest.WipeObjectMetaSystemFields(acc)
	if rest.EnsureObjectNamespaceMatchesRequestNamespace(rest.ExpectedNamespaceForResource(wr.info.Namespace, wr.GroupVersionResource), acc) != nil {
		return nil, wr.refuse()
	}
	hub, err := wr.own(nil, obj)
	if err != nil {
		return nil, err
	}
	options := &metav1.CreateOptions{FieldManager: wr.fieldManager, FieldValidation: wr.fieldValidation}
	options.SetGroupVersionKind(metav1.SchemeGroupVersion.WithKind("CreateOptions"))
	attributes := wr.attributes(hub, nil, acc.GetName(), admission.Create, options)
	if err := wr.mutate(ctx, hub, attributes); err != nil {
		return nil, err
	}
	dropRepeatedOwners(ctx, hub)
	validate := rest.AdmissionToValidateObjectFunc(wr.writer.admit, attributes, wr.scope)
	if u, ok := hub.(*unstructured.Unstructured); ok && wr.writer.admit.quiet(validateStep, attributes) { // the plugins that are left need no copy
		fields := api.TakeManagedFields(u)
		wr.outcome.Check = func(ctx context.Context, obj, _ runtime.Object) error {
			api.PutManagedFields(obj, fields)
			return validate(ctx, obj)
		}
		return wr.storage.(rest.Creater).Create(ctx, hub, nil, options)
	}
	if wr.custom == nil && wr.writer.admit.onlyChecks(attributes) { // the same
		wr.outcome.Check = func(ctx context.Context, obj, _ runtime.Object) error { return validate(ctx, obj) }
		return wr.storage.(rest.Creater).Create(ctx, hub, nil, options)
	}
	return wr.storage.(rest.Creater).Create(ctx, hub, validate, options)
}

// decode reads the body as an object of the stored version, with defaults.
func (wr *change) decode() (runtime.Object, error) {
	info := serializers()[wr.contentType]
	s := runtime.Serializer(info.StrictSerializer)
	if wr.fieldValidation == metav1.FieldValidationIgnore {
		s = info.Serializer
	}
	want := wr.kind.Stored
	obj, got, err := s.Decode(wr.body, &want, nil)
	if err != nil {
		return nil, err
	}
	if *got != want {
		return nil, fmt.Errorf("%s is no %s", got, want)
	}
	setDefaults(obj)
	return obj, nil
}

// own sets the managed fields of an object that becomes what live was, nil for a new one, and gives its internal form. The versions are
// compared as they come back from the internal form, as upstream does; live is such a one. obj must not be used afterwards.
func (wr *change) own(live, obj runtime.Object) (runtime.Object, error) {
	if wr.custom != nil {
		return wr.ownCustom(live, obj), nil
	}
	hub, err := legacyscheme.Scheme.UnsafeConvertToVersion(obj, wr.hub)
	if err != nil {
		return nil, wr.refuse()
	}
	versioned, err := legacyscheme.Scheme.UnsafeConvertToVersion(hub, wr.kind.Stored.GroupVersion())
	if err != nil || !wr.owners.Update(live, versioned, wr.manager, time.Now()) {
		return nil, wr.refuse()
	}
	from, err := meta.Accessor(versioned)
	if err != nil {
		return nil, wr.refuse()
	}
	to, err := meta.Accessor(hub)
	if err != nil {
		return nil, wr.refuse()
	}
	to.SetManagedFields(from.GetManagedFields())
	return hub, nil
}

func (wr *change) attributes(obj, old runtime.Object, name string, operation admission.Operation, options runtime.Object) admission.Attributes {
	return admission.NewAttributesRecord(obj, old, wr.kind.Stored, wr.info.Namespace, name, wr.GroupVersionResource, wr.subresource, operation,
		options, false, wr.user)
}

// mutate runs the mutating admission plugins; managed fields that they spoil are put back.
// Source: k8s.io/apiserver/pkg/endpoints/handlers/fieldmanager/admission.go.
func (wr *change) mutate(ctx context.Context, obj runtime.Object, attributes admission.Attributes) error {
	plugins := wr.writer.admit
	if !plugins.Handles(attributes.GetOperation()) {
		return nil
	}
	if wr.custom != nil && plugins.quiet(admitStep, attributes) {
		return plugins.Admit(ctx, attributes, wr.scope)
	}
	acc, err := meta.Accessor(obj)
	if err != nil {
		return apierrors.NewInternalError(err)
	}
	before := acc.GetManagedFields()
	if err := plugins.Admit(ctx, attributes, wr.scope); err != nil {
		return err
	}
	after := acc.GetManagedFields()
	if len(after) == len(before) && (len(after) == 0 || &after[0] == &before[0]) {
		return nil
	}
	if err := managedfields.ValidateManagedFields(after); err != nil {
		acc.SetManagedFields(before)
		warning.AddWarning(ctx, "", fmt.Sprintf(fieldmanager.InvalidManagedFieldsAfterMutatingAdmissionWarningFormat, err.Error()))
	}
	return nil
}

// patch does what upstream's handler of patches does, in its order.
// Source: PatchResource in k8s.io/apiserver/pkg/endpoints/handlers/patch.go.
func (wr *change) patch(ctx context.Context) (runtime.Object, error) {
	options := &metav1.UpdateOptions{FieldManager: wr.fieldManager, FieldValidation: wr.fieldValidation}
	options.SetGroupVersionKind(metav1.SchemeGroupVersion.WithKind("UpdateOptions"))
	static := wr.attributes(nil, nil, wr.info.Name, admission.Update, options)
	admit := func(ctx context.Context, obj, old runtime.Object) (runtime.Object, error) {
		if wr.custom != nil {
			old = wr.outcome.Before
		}
		if err := wr.mutate(ctx, obj, wr.attributes(obj, old, wr.info.Name, admission.Update, options)); err != nil {
			return nil, err
		}
		dropRepeatedOwners(ctx, obj)
		if wr.outcome.Check != nil && wr.custom == nil {
			wr.times.hold(obj, old)
		}
		return obj, nil
	}
	apply := wr.apply
	if wr.custom != nil {
		wr.outcome.Reads = true
		apply = func(context.Context, runtime.Object, runtime.Object) (runtime.Object, error) {
			return wr.applyCustom(wr.writer.admit.quiet(admitStep, static))
		}
	}
	info := rest.DefaultUpdatedObjectInfo(nil, apply, admit)
	validate := rest.AdmissionToValidateObjectUpdateFunc(wr.writer.admit, static, wr.scope)
	wr.outcome.Check = func(ctx context.Context, obj, old runtime.Object) error {
		wr.times.release(obj)
		if wr.custom != nil {
			old = wr.outcome.Before
			if err := wr.putOwned(ctx, obj, old); err != nil {
				return err
			}
		}
		if spares := wr.writer.admit.onlyChecks(static) || wr.custom != nil && wr.writer.admit.quiet(validateStep, static); !spares {
			obj, old = obj.DeepCopyObject(), old.DeepCopyObject()
		}
		return validate(ctx, obj, old)
	}
	out, err := wr.update(ctx, info, nil, options)
	if errors.Is(err, errBeingDeleted) {
		wr.outcome.Check = nil
		out, err = wr.update(ctx, info, validate, options)
	}
	return out, err
}

// errBeingDeleted ends a try whose object may go by its update, with no end of the try to check at: upstream's storage has to validate copies.
var errBeingDeleted = errors.New("it is being deleted")

// update changes the object. validate is nil where the outcome's check does the same without copies.
func (wr *change) update(ctx context.Context, info rest.UpdatedObjectInfo, validate rest.ValidateObjectUpdateFunc, options *metav1.UpdateOptions) (runtime.Object, error) {
	never := func(context.Context, runtime.Object) error { return wr.absent() } // a patch creates nothing
	out, _, err := wr.storage.(rest.Patcher).Update(ctx, wr.info.Name, info, never, validate, false, options)
	return out, err
}

func (wr *change) absent() error { return apierrors.NewNotFound(wr.GroupResource(), wr.info.Name) }

// apply gives the patched object, and is called again whenever the object has changed in the meantime.
func (wr *change) apply(_ context.Context, _, current runtime.Object) (runtime.Object, error) {
	wr.refused = false
	old, err := meta.Accessor(current)
	if err != nil {
		return nil, wr.refuse()
	}
	if old.GetUID() == "" {
		return nil, wr.absent()
	}
	if wr.outcome.Check != nil && old.GetDeletionTimestamp() != nil {
		return nil, errBeingDeleted
	}
	live, err := legacyscheme.Scheme.UnsafeConvertToVersion(current, wr.kind.Stored.GroupVersion())
	if err != nil {
		return nil, wr.refuse()
	}
	obj, ok := patching.Apply(live, types.PatchType(wr.contentType), wr.body, wr.shared()...)
	if !ok {
		return nil, wr.refuse()
	}
	acc, err := meta.Accessor(obj)
	if err != nil || acc.GetName() != old.GetName() || acc.GetNamespace() != old.GetNamespace() || acc.GetUID() != old.GetUID() {
		return nil, wr.refuse()
	}
	legacyscheme.Scheme.Default(obj)
	return wr.own(live, obj)
}

// sharedOfStatus is what a patch of a status need not copy: upstream's strategies of the statuses of pods and nodes take it from the old object.
var sharedOfStatus = []string{"Spec"}

// shared names what the patched object may share with the old one, since nobody writes to it before it is stored.
func (wr *change) shared() []string {
	if wr.subresource == "status" && wr.writer.admit.spareSpecs(wr.attributes(nil, nil, wr.info.Name, admission.Update, nil)) {
		return sharedOfStatus
	}
	return nil
}

// repeatsOwner says whether two references are to one owner.
func repeatsOwner(refs []metav1.OwnerReference) bool {
	for i := range refs {
		for j := range refs[:i] {
			if refs[i].UID == refs[j].UID {
				return true
			}
		}
	}
	return false
}

// dropRepeatedOwners removes owner references that admission has added twice.
// Source: dedupOwnerReferences in k8s.io/apiserver/pkg/endpoints/handlers/rest.go.
func dropRepeatedOwners(ctx context.Context, obj runtime.Object) {
	acc, err := meta.Accessor(obj)
	if err != nil || !repeatsOwner(acc.GetOwnerReferences()) {
		return
	}
	var kept []metav1.OwnerReference
	var dropped []string
	for _, ref := range acc.GetOwnerReferences() {
		twice := false
		for _, k := range kept {
			twice = twice || k.UID == ref.UID && apiequality.Semantic.DeepEqual(k, ref)
		}
		if twice {
			dropped = append(dropped, string(ref.UID))
			continue
		}
		kept = append(kept, ref)
	}
	if len(dropped) == 0 {
		return
	}
	warning.AddWarning(ctx, "", fmt.Sprintf(handlers.DuplicateOwnerReferencesAfterMutatingAdmissionWarningFormat, strings.Join(dropped, ", ")))
	acc.SetOwnerReferences(kept)
}
