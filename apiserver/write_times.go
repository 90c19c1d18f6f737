package apiserver

import (
	"maps"
	"reflect"
	"slices"

	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// heldTimes are managed fields whose times are not in the object for a while.
type heldTimes struct{ real, shown []metav1.ManagedFieldsEntry }

// hold shows the old times in the managed fields of an object that is to become what old was, where the objects plainly differ otherwise.
// Upstream's storage takes the old times for an object that differs by nothing else, and compares all of both to learn that, by reflection; it
// looks no further where it sees no new time. release puts them right.
// Source: k8s.io/apiserver/pkg/endpoints/handlers/fieldmanager/equality.go.
func (h *heldTimes) hold(obj, old runtime.Object) {
	*h = heldTimes{}
	a, err := meta.Accessor(obj)
	if err != nil {
		return
	}
	b, err := meta.Accessor(old)
	if err != nil {
		return
	}
	fields, before := a.GetManagedFields(), b.GetManagedFields()
	if len(fields) == 0 || len(fields) != len(before) || !differ(obj, old, a, b) {
		return
	}
	shown := slices.Clone(fields)
	for i := range shown {
		shown[i].Time = before[i].Time
	}
	h.real, h.shown = fields, shown
	a.SetManagedFields(shown)
}

// release shows the right times again, unless the managed fields are others now.
func (h *heldTimes) release(obj runtime.Object) {
	if len(h.shown) == 0 {
		return
	}
	if a, err := meta.Accessor(obj); err == nil {
		if fields := a.GetManagedFields(); len(fields) == len(h.shown) && &fields[0] == &h.shown[0] {
			a.SetManagedFields(h.real)
		}
	}
	*h = heldTimes{}
}

// differ says whether two objects of a type plainly differ in labels, annotations or one of the parts besides metadata, the last of which
// changes most often: the status. False leaves it open.
func differ(obj, old runtime.Object, a, b metav1.Object) bool {
	if !maps.Equal(a.GetLabels(), b.GetLabels()) || !maps.Equal(a.GetAnnotations(), b.GetAnnotations()) {
		return true
	}
	v, w := reflect.ValueOf(obj), reflect.ValueOf(old)
	if v.Kind() != reflect.Pointer || v.Type() != w.Type() || v.Elem().Kind() != reflect.Struct {
		return false
	}
	v, w = v.Elem(), w.Elem()
	for i := v.NumField() - 1; i >= 0; i-- {
		f := v.Type().Field(i)
		if !f.Anonymous && f.IsExported() && !apiequality.Semantic.DeepEqual(v.Field(i).Addr().Interface(), w.Field(i).Addr().Interface()) {
			return true
		}
	}
	return false
}
