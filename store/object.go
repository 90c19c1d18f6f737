package store

import (
	"fmt"
	"maps"
	"reflect"
	"strconv"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
)

// setRevision writes a revision into an object that nobody else sees yet; 0 clears it.
func setRevision(obj runtime.Object, rev int64) error {
	acc, err := meta.Accessor(obj)
	if err != nil {
		return fmt.Errorf("%T has no metadata: %w", obj, err)
	}
	if rev == 0 {
		acc.SetResourceVersion("")
		return nil
	}
	acc.SetResourceVersion(strconv.FormatInt(rev, 10))
	return nil
}

// WithRevision returns a shallow copy of a published object with another revision, 0 for none: everything but the path to the
// resourceVersion is shared, so the copy must not be changed either. Errors: obj is no pointer, or has no metadata.
func WithRevision(obj runtime.Object, rev int64) (runtime.Object, error) {
	var out runtime.Object
	if u, ok := obj.(*unstructured.Unstructured); ok {
		content := maps.Clone(u.Object)
		if m, ok := content["metadata"].(map[string]any); ok {
			content["metadata"] = maps.Clone(m)
		}
		out = &unstructured.Unstructured{Object: content}
	} else {
		v := reflect.ValueOf(obj)
		if v.Kind() != reflect.Pointer || v.IsNil() {
			return nil, fmt.Errorf("%T is not a pointer to an object", obj)
		}
		c := reflect.New(v.Elem().Type())
		c.Elem().Set(v.Elem())
		out = c.Interface().(runtime.Object)
	}
	if err := setRevision(out, rev); err != nil {
		return nil, err
	}
	return out, nil
}
