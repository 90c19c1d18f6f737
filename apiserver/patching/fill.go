package patching

import (
	"reflect"

	"sigs.k8s.io/structured-merge-diff/v6/value"
)

// fill reads a JSON tree into a value that is zero, as upstream's converter, which takes a map of the names that it saw for each
// structure to find unknown ones. It gives false for what is not plainly right; the value may be filled in part then.
// Source: fromUnstructured in k8s.io/apimachinery/pkg/runtime/converter.go.
func fill(to reflect.Value, tree any) bool {
	if tree == nil {
		return true
	}
	switch to.Kind() {
	case reflect.String:
		s, ok := tree.(string)
		to.SetString(s)
		return ok
	case reflect.Bool:
		b, ok := tree.(bool)
		to.SetBool(b)
		return ok
	case reflect.Int32, reflect.Int64:
		i, ok := tree.(int64)
		if !ok || to.OverflowInt(i) {
			return false
		}
		to.SetInt(i)
		return true
	case reflect.Pointer, reflect.Struct, reflect.Slice, reflect.Map:
	default:
		return false
	}
	if entry := value.TypeReflectEntryOf(to.Type()); entry.CanConvertFromUnstructured() {
		return entry.FromUnstructured(reflect.ValueOf(tree), to) == nil
	}
	switch tree := tree.(type) {
	case []any:
		return fillSlice(to, tree)
	case map[string]any:
		switch to.Kind() {
		case reflect.Struct:
			return fillStruct(to, tree)
		case reflect.Map:
			return fillMap(to, tree)
		}
	}
	if to.Kind() != reflect.Pointer {
		return false
	}
	to.Set(reflect.New(to.Type().Elem()))
	return fill(to.Elem(), tree)
}

func fillSlice(to reflect.Value, tree []any) bool {
	if to.Kind() != reflect.Slice || tree == nil || to.Type().Elem().Kind() == reflect.Uint8 {
		return false
	}
	to.Set(reflect.MakeSlice(to.Type(), len(tree), len(tree)))
	for i, item := range tree {
		if !fill(to.Index(i), item) {
			return false
		}
	}
	return true
}

func fillStruct(to reflect.Value, tree map[string]any) bool {
	fields := fieldsOf(to.Type())
	for name, item := range tree {
		f, ok := fields[name]
		if !ok || !fill(to.FieldByIndex(f.index), item) {
			return false
		}
	}
	return true
}

func fillMap(to reflect.Value, tree map[string]any) bool {
	t := to.Type()
	if tree == nil || t.Key().Kind() != reflect.String {
		return false
	}
	to.Set(reflect.MakeMapWithSize(t, len(tree)))
	for name, item := range tree {
		v := reflect.New(t.Elem()).Elem()
		if !fill(v, item) {
			return false
		}
		to.SetMapIndex(reflect.ValueOf(name).Convert(t.Key()), v)
	}
	return true
}
