// Package patching applies patches to Go objects.
//
// Upstream's handler turns the whole object into a JSON tree or text, patches that and reads the object back. Here only the fields
// that the patch names take that way, through the same code of upstream's (k8s.io/apimachinery/pkg/util/strategicpatch,
// gopkg.in/evanphx/json-patch and their decoders); all others are copied. The result is the same, since what is stored comes back
// from a JSON tree as it was. A patch that is not plainly right (an unknown field, a duplicate key, a directive about a
// whole object, an error of any kind) is refused, for upstream's handler to answer.
package patching

import (
	"encoding/json"
	"reflect"
	"slices"
	"strings"
	"sync"

	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	kjson "sigs.k8s.io/json"
)

// Directives of strategic merge patches that stand beside the field that they are about; other directives are about the whole object.
const (
	setElementOrder         = "$setElementOrder/"
	deleteFromPrimitiveList = "$deleteFromPrimitiveList/"
)

// Apply gives a copy of a versioned object with a strategic or a JSON merge patch applied, without defaults for what the patch
// left out. The object is not changed. It gives false for a patch that upstream's handler has to deal with. The copy shares
// with the object, where the patch does not touch them, its managed fields and the fields of the Go names in shared.
func Apply(obj runtime.Object, kind types.PatchType, patch []byte, shared ...string) (runtime.Object, bool) {
	tree := map[string]any{}
	if strict, err := kjson.UnmarshalStrict(patch, &tree); err != nil || len(strict) > 0 {
		return nil, false
	}
	t := reflect.TypeOf(obj).Elem()
	p := &part{root: reflect.ValueOf(obj).Elem(), original: map[string]any{}, strategic: kind == types.StrategicMergePatchType}
	if !p.gather(t, tree) {
		return nil, false
	}
	fresh := reflect.New(t)
	var ok bool
	switch kind {
	case types.StrategicMergePatchType:
		ok = p.strategicMerge(tree, fresh.Interface().(runtime.Object))
	case types.MergePatchType:
		ok = p.merge(tree, patch, fresh)
	}
	if !ok {
		return nil, false
	}
	return p.copy(fresh.Elem(), shared), true
}

// metadata and managedFields lead to the managed fields of an object, by Go names.
const metadata, managedFields = "ObjectMeta", "ManagedFields"

// drafts are objects that are copied from, by type: reflect.Type to *sync.Pool of runtime.Object.
var drafts sync.Map

// copy gives a copy of the object with the touched fields of another.
func (p *part) copy(fresh reflect.Value, shared []string) runtime.Object {
	t := p.root.Type()
	pool, ok := drafts.Load(t)
	if !ok {
		pool, _ = drafts.LoadOrStore(t, &sync.Pool{New: func() any { return reflect.New(t).Interface() }})
	}
	draft := pool.(*sync.Pool).Get().(runtime.Object)
	defer pool.(*sync.Pool).Put(draft)
	from := reflect.ValueOf(draft).Elem()
	defer from.SetZero()
	from.Set(p.root)
	for _, name := range shared {
		from.FieldByName(name).SetZero()
	}
	if m := from.FieldByName(metadata); m.IsValid() {
		m.FieldByName(managedFields).SetZero()
	}
	for _, path := range p.touched {
		from.FieldByIndex(path).SetZero()
	}
	out := draft.DeepCopyObject()
	to := reflect.ValueOf(out).Elem()
	for _, name := range shared {
		to.FieldByName(name).Set(p.root.FieldByName(name))
	}
	if m := to.FieldByName(metadata); m.IsValid() {
		m.FieldByName(managedFields).Set(p.root.FieldByName(metadata).FieldByName(managedFields))
	}
	for _, path := range p.touched {
		to.FieldByIndex(path).Set(fresh.FieldByIndex(path))
	}
	return out
}

// part is what a patch touches of an object.
type part struct {
	root      reflect.Value
	original  map[string]any // the touched fields' trees
	touched   [][]int        // the touched fields
	strategic bool
}

// gather turns the fields that a patch names into trees: fields of the object, and of the structs directly in it
// (metadata, spec, status).
func (p *part) gather(t reflect.Type, patch map[string]any) bool {
	for key, value := range patch {
		name, ok := p.fieldName(key)
		if !ok {
			return false
		}
		f, ok := fieldsOf(t)[name]
		if !ok {
			return false
		}
		inner, isTree := value.(map[string]any)
		if name == "apiVersion" || name == "kind" {
			return false
		}
		if f.typ.Kind() != reflect.Struct || !isTree {
			if f.typ.Kind() == reflect.Struct || !p.add(p.original, name, f, f.index) {
				return false
			}
			continue
		}
		below := map[string]any{}
		p.original[name] = below
		for key := range inner {
			innerName, ok := p.fieldName(key)
			if !ok {
				return false
			}
			g, ok := fieldsOf(f.typ)[innerName]
			if !ok || !p.add(below, innerName, g, append(f.index[:len(f.index):len(f.index)], g.index...)) {
				return false
			}
		}
	}
	return true
}

// fieldName is the field that a key of a patch is about.
func (p *part) fieldName(key string) (string, bool) {
	if p.strategic {
		if name, ok := strings.CutPrefix(key, setElementOrder); ok {
			return name, true
		}
		if name, ok := strings.CutPrefix(key, deleteFromPrimitiveList); ok {
			return name, true
		}
	}
	return key, !strings.HasPrefix(key, "$")
}

// stringMap is the type of labels, and of what a ConfigMap holds.
var stringMap = reflect.TypeFor[map[string]string]()

// add puts a field's tree into the original.
func (p *part) add(into map[string]any, name string, f field, index []int) bool {
	if _, twice := into[name]; twice {
		return true
	}
	p.touched = append(p.touched, index)
	v := p.root.FieldByIndex(index)
	switch {
	case v.IsZero() && f.omitEmpty:
		return true
	case v.Kind() == reflect.String:
		into[name] = v.String()
		return true
	case v.Type() == stringMap && !v.IsNil():
		texts := v.Interface().(map[string]string)
		tree := make(map[string]any, len(texts)+1)
		for key, text := range texts {
			tree[key] = text
		}
		into[name] = tree
		return true
	}
	// Upstream's converter takes structs only: the field goes in one of its own.
	box := reflect.New(f.box)
	box.Elem().Field(0).Set(v)
	tree, err := runtime.DefaultUnstructuredConverter.ToUnstructured(box.Interface())
	if value, ok := tree[boxed]; ok {
		into[name] = value
	}
	return err == nil
}

func (p *part) strategicMerge(patch map[string]any, out runtime.Object) bool {
	merged, err := strategicpatch.StrategicMergeMapPatch(p.original, patch, out)
	if err != nil {
		return false
	}
	v := reflect.ValueOf(out).Elem()
	if fill(v, map[string]any(merged)) {
		return true
	}
	v.SetZero()
	return runtime.DefaultUnstructuredConverter.FromUnstructuredWithValidation(merged, out, true) == nil
}

// merge applies a JSON merge patch, given as tree and as text, to the touched fields and reads them into a zero object.
func (p *part) merge(tree map[string]any, patch []byte, fresh reflect.Value) bool {
	if isText(p.original) {
		if fill(fresh.Elem(), mergeTrees(p.original, tree)) {
			return true
		}
		fresh.Elem().SetZero()
	}
	original, err := json.Marshal(p.original)
	if err != nil {
		return false
	}
	merged, err := jsonpatch.MergePatch(original, patch)
	if err != nil {
		return false
	}
	strict, err := kjson.UnmarshalStrict(merged, fresh.Interface())
	return err == nil && len(strict) == 0
}

// field is where a JSON name leads in a struct.
type field struct {
	index     []int
	typ       reflect.Type
	omitEmpty bool
	box       reflect.Type // a struct that holds only this field, by the name of boxed
}

// boxed is the JSON name of the field of a box.
const boxed = "v"

var structs sync.Map // reflect.Type to map[string]field

func fieldsOf(t reflect.Type) map[string]field {
	if f, ok := structs.Load(t); ok {
		return f.(map[string]field)
	}
	out := map[string]field{}
	for i := range t.NumField() {
		sf := t.Field(i)
		name, options, _ := strings.Cut(sf.Tag.Get("json"), ",")
		switch {
		case name != "" && name != "-":
			box := reflect.StructOf([]reflect.StructField{{Name: "V", Type: sf.Type, Tag: reflect.StructTag(`json:"` + boxed + "," + options + `"`)}})
			out[name] = field{sf.Index, sf.Type, slices.Contains(strings.Split(options, ","), "omitempty"), box}
		case sf.Anonymous && sf.Type.Kind() == reflect.Struct:
			for name, f := range fieldsOf(sf.Type) {
				f.index = append([]int{i}, f.index...)
				out[name] = f
			}
		}
	}
	structs.Store(t, out)
	return out
}
