package ownership

import (
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/structured-merge-diff/v6/schema"
	"sigs.k8s.io/structured-merge-diff/v6/value"
)

// kind says how values of a shape are read and compared.
type kind uint8

const (
	opaque kind = iota // we do not know: only absent values can be compared
	boolean
	integer
	unsigned
	float
	text
	bytes
	instant   // metav1.Time
	precise   // metav1.MicroTime
	quantity  // resource.Quantity
	intOrText // intstr.IntOrString
	duration  // metav1.Duration
	structure
	dictionary
	list
)

// shape is a Go type as the schema of managed fields sees it.
type shape struct {
	kind   kind
	atomic bool
	fields []field    // of a structure, by name
	elem   *shape     // of a dictionary or a list
	keys   []keyField // of a list of structures that is indexed by keys; such a list, or a set, is not atomic
	set    bool       // a list of scalars that is a set
	// sure says that every value of the shape is known (see known), so that nobody has to look.
	sure bool
}

// field is one field of a structure.
type field struct {
	name, elem string // elem is the path element: f:name
	index      []int
	omitEmpty  bool
	omitZero   func(reflect.Value) bool
	shape      *shape
	// hidden fields are left out of comparisons: those that the resource's strategy resets, and managedFields itself.
	hidden bool
	// never is set for a field that no manager can own.
	never bool
}

// keyField is one key of an associative list, in order of names.
type keyField struct {
	name   string
	at     int    // in the fields of the element
	absent string // how the schema's default is written, empty without one
}

// shaper builds shapes; it remembers those of named types, which may be recursive.
type shaper struct {
	schema *schema.Schema
	known  map[shapeKey]*shape
}

type shapeKey struct {
	goType reflect.Type
	name   string
	rel    schema.ElementRelationship
}

var (
	marshaler      = reflect.TypeFor[json.Marshaler]()
	converter      = reflect.TypeFor[value.UnstructuredConverter]()
	converterError = reflect.TypeFor[value.UnstructuredConverterWithError]()
	special        = map[reflect.Type]kind{
		reflect.TypeFor[metav1.Time]():        instant,
		reflect.TypeFor[metav1.MicroTime]():   precise,
		reflect.TypeFor[resource.Quantity]():  quantity,
		reflect.TypeFor[intstr.IntOrString](): intOrText,
		reflect.TypeFor[metav1.Duration]():    duration,
	}
)

// build gives the shape of a Go type; what does not fit the schema becomes opaque.
func (b *shaper) build(t reflect.Type, ref schema.TypeRef) *shape {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	key := shapeKey{goType: t}
	if ref.NamedType != nil {
		key.name = *ref.NamedType
		if ref.ElementRelationship != nil {
			key.rel = *ref.ElementRelationship
		}
		if s := b.known[key]; s != nil {
			return s
		}
	}
	s := &shape{}
	if ref.NamedType != nil {
		b.known[key] = s
	}
	if atom, ok := b.schema.Resolve(ref); ok && kinds(atom) == 1 {
		b.fill(s, t, atom)
	}
	return s
}

// kinds counts what an atom may be.
func kinds(a schema.Atom) int {
	n := 0
	for _, is := range []bool{a.Scalar != nil, a.List != nil, a.Map != nil} {
		if is {
			n++
		}
	}
	return n
}

func (b *shaper) fill(s *shape, t reflect.Type, atom schema.Atom) {
	if k, ok := special[t]; ok {
		if atom.Scalar != nil && scalarFits(*atom.Scalar, k) {
			s.kind = k
		}
		return
	}
	p := reflect.PointerTo(t)
	if p.Implements(marshaler) || p.Implements(converter) || p.Implements(converterError) {
		return
	}
	switch {
	case atom.Scalar != nil:
		if k := scalarKind(t); k != opaque && scalarFits(*atom.Scalar, k) {
			s.kind = k
		}
	case atom.List != nil:
		b.fillList(s, t, atom.List)
	case t.Kind() == reflect.Map && t.Key().Kind() == reflect.String:
		s.kind, s.atomic = dictionary, atom.Map.ElementRelationship == schema.Atomic
		if len(atom.Map.Fields) > 0 {
			s.kind = opaque
			return
		}
		s.elem = b.build(t.Elem(), atom.Map.ElementType)
	case t.Kind() == reflect.Struct:
		b.fillStruct(s, t, atom.Map)
	}
}

func scalarKind(t reflect.Type) kind {
	switch t.Kind() {
	case reflect.Bool:
		return boolean
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return integer
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32:
		return unsigned
	case reflect.Float32, reflect.Float64:
		return float
	case reflect.String:
		return text
	case reflect.Slice:
		if t.Elem().Kind() == reflect.Uint8 {
			return bytes
		}
	}
	return opaque
}

func scalarFits(s schema.Scalar, k kind) bool {
	switch s {
	case schema.Untyped:
		return true
	case schema.Boolean:
		return k == boolean
	case schema.Numeric:
		return k == integer || k == unsigned || k == float
	case schema.String:
		return k == text || k == bytes || k == instant || k == precise || k == quantity || k == duration
	}
	return false
}

func (b *shaper) fillList(s *shape, t reflect.Type, l *schema.List) {
	if t.Kind() != reflect.Slice || t.Elem().Kind() == reflect.Uint8 || t.Elem().Kind() == reflect.Pointer {
		return
	}
	s.elem = b.build(t.Elem(), l.ElementType)
	switch {
	case l.ElementRelationship == schema.Atomic:
		s.kind, s.atomic = list, true
	case len(l.Keys) == 0:
		if s.elem.kind == text || s.elem.kind == integer {
			s.kind, s.set = list, true
		}
	case s.elem.kind == structure:
		s.keys = keysOf(s.elem, b.schema, l)
		if s.keys != nil {
			s.kind = list
		}
	}
}

// keysOf finds the keys of an associative list in its elements; nil when one is of a kind we cannot write.
func keysOf(elem *shape, sc *schema.Schema, l *schema.List) []keyField {
	atom, _ := sc.Resolve(l.ElementType)
	var out []keyField
	for _, name := range l.Keys {
		at := slices.IndexFunc(elem.fields, func(f field) bool { return f.name == name })
		if at < 0 {
			return nil
		}
		if k := elem.fields[at].shape.kind; k != text && k != integer && k != boolean {
			return nil
		}
		key := keyField{name: name, at: at}
		if f, ok := atom.Map.FindField(name); ok && f.Default != nil {
			switch d := f.Default.(type) {
			case string:
				if !plain(d) {
					return nil
				}
				key.absent = `\"` + d + `\"`
			case int, int64, bool:
				key.absent = fmt.Sprint(d)
			default:
				return nil
			}
		}
		out = append(out, key)
	}
	slices.SortFunc(out, func(a, b keyField) int { return strings.Compare(a.name, b.name) })
	return out
}

func (b *shaper) fillStruct(s *shape, t reflect.Type, m *schema.Map) {
	fields := map[string]field{}
	if !b.collect(fields, t, m, nil) {
		return
	}
	s.kind, s.atomic = structure, m.ElementRelationship == schema.Atomic
	for _, f := range fields {
		s.fields = append(s.fields, f)
	}
	slices.SortFunc(s.fields, func(a, b field) int { return strings.Compare(a.name, b.name) })
}

// collect gathers the fields of a struct and of the structs embedded in it, a later one of the same name winning as in
// upstream's cache of types.
func (b *shaper) collect(out map[string]field, t reflect.Type, m *schema.Map, path []int) bool {
	for i := range t.NumField() {
		sf := t.Field(i)
		tag := sf.Tag.Get("json")
		if sf.PkgPath != "" && !sf.Anonymous || tag == "-" {
			continue
		}
		name, opts, _ := strings.Cut(tag, ",")
		index := append(slices.Clone(path), i)
		if sf.Anonymous && name == "" {
			if sf.Type.Kind() != reflect.Struct || !b.collect(out, sf.Type, m, index) {
				return false
			}
			continue
		}
		if name == "" {
			name = sf.Name
		}
		options := strings.Split(opts, ",")
		f := field{name: name, elem: "f:" + name, index: index, omitEmpty: slices.Contains(options, "omitempty"), shape: &shape{}}
		if slices.Contains(options, "omitzero") {
			f.omitZero = value.OmitZeroFunc(sf.Type)
		}
		if sc, ok := m.FindField(name); ok {
			f.shape = b.build(sf.Type, sc.Type)
		}
		out[name] = f
	}
	return true
}

// hide gives a copy of a structure's shape without a field, which a path of names leads to.
func hide(s *shape, path []string, never bool) (*shape, error) {
	if s.kind != structure {
		return nil, fmt.Errorf("ownership: no structure holds %s", strings.Join(path, "."))
	}
	out := *s
	out.fields = slices.Clone(s.fields)
	at := slices.IndexFunc(out.fields, func(f field) bool { return f.name == path[0] })
	if at < 0 {
		return &out, nil // a path that the type does not have
	}
	if len(path) == 1 {
		out.fields[at].hidden = true
		out.fields[at].never = never
		return &out, nil
	}
	inner, err := hide(out.fields[at].shape, path[1:], never)
	if err != nil {
		return nil, err
	}
	out.fields[at].shape = inner
	return &out, nil
}

// findSure sets sure of a shape and of those below it; it is not set for shapes that hold themselves.
func (s *shape) findSure(seen map[*shape]bool) bool {
	if seen[s] {
		return s.sure
	}
	seen[s] = true
	switch s.kind {
	case opaque:
	case structure:
		sure := true
		for i := range s.fields {
			sure = s.fields[i].shape.findSure(seen) && sure
		}
		s.sure = sure
	case dictionary, list:
		s.sure = s.elem.findSure(seen) && (s.kind == dictionary || s.atomic)
	default:
		s.sure = true
	}
	return s.sure
}

// omitted says whether a field with this value is not part of the object.
func (f *field) omitted(v reflect.Value) bool {
	return f.omitEmpty && isEmpty(v) || f.omitZero != nil && f.omitZero(v)
}

func isEmpty(v reflect.Value) bool {
	switch v.Kind() {
	case reflect.Map, reflect.Slice, reflect.String, reflect.Array:
		return v.Len() == 0
	case reflect.Pointer, reflect.Interface:
		return v.IsNil()
	case reflect.Bool:
		return !v.Bool()
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return v.Int() == 0
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return v.Uint() == 0
	case reflect.Float32, reflect.Float64:
		return v.Float() == 0
	}
	return false
}
