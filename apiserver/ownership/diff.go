package ownership

import (
	"reflect"
	"slices"
	"strconv"
	"time"

	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// operand is one side of a comparison: a value without pointers around it, null, or absent (v is not valid).
type operand struct {
	v    reflect.Value
	null bool
}

func (o operand) absent() bool { return !o.v.IsValid() }

// operandOf reads a value of a shape.
func operandOf(s *shape, v reflect.Value) operand {
	for v.Kind() == reflect.Pointer {
		if v.IsNil() {
			return operand{v, true}
		}
		v = v.Elem()
	}
	switch s.kind {
	case bytes, dictionary, list:
		return operand{v, v.IsNil()}
	case instant:
		return operand{v, timeOf(v).IsZero()}
	case precise:
		t := v.Interface().(metav1.MicroTime)
		return operand{v, t.IsZero()}
	}
	return operand{v: v}
}

// of reads a field of a structure; absent when the structure is.
func (f *field) of(o operand) operand {
	if o.absent() || o.null {
		return operand{}
	}
	v := o.v
	for _, i := range f.index {
		v = v.Field(i)
	}
	if f.omitted(v) {
		return operand{}
	}
	return operandOf(f.shape, v)
}

// differ compares two versions of an object and gathers what changed (was added or modified) and what was removed.
type differ struct {
	changed, removed paths
	// refused is set when the objects hold something that only upstream's comparison knows.
	refused bool
	// items is scratch space for list items, used as a stack.
	items []item
}

// item is an element of a list or a dictionary on both sides.
type item struct {
	elem string
	l, r operand
}

// child compares one child of two nodes.
func (d *differ) child(elem string, s *shape, l, r operand, ca, ra int32) {
	if l.absent() && r.absent() {
		return
	}
	c, x := d.changed.add(ca, elem), d.removed.add(ra, elem)
	d.values(s, l, r, c, x)
	d.changed.dropEmpty(ca, c)
	d.removed.dropEmpty(ra, x)
}

// values compares two values, at least one of which is there.
func (d *differ) values(s *shape, l, r operand, c, x int32) {
	leaf := s.kind < structure || s.atomic || d.hollow(s, l) && d.hollow(s, r)
	if !leaf {
		switch s.kind {
		case structure:
			for i := range s.fields {
				f := &s.fields[i]
				if !f.hidden {
					d.child(f.elem, f.shape, f.of(l), f.of(r), c, x)
				} else if !f.never && !(known(f.shape, f.of(l)) && known(f.shape, f.of(r))) {
					d.refused = true
				}
			}
		case dictionary:
			d.entries(s, l, r, c, x)
		case list:
			d.elements(s, l, r, c, x)
		}
	}
	switch {
	case l.absent():
		d.changed.nodes[c].member = true
		d.refused = d.refused || leaf && !known(s, r)
	case r.absent():
		d.removed.nodes[x].member = true
	case leaf && !d.equal(s, l, r):
		d.changed.nodes[c].member = true
	}
}

// known says whether a value holds nothing opaque and no list items without keys; upstream looks for what the schema forbids
// also where nothing changed.
func known(s *shape, o operand) bool {
	if s.kind == opaque {
		return o.absent()
	}
	if s.sure || o.absent() || o.null {
		return true
	}
	switch s.kind {
	case structure:
		for i := range s.fields {
			if f := &s.fields[i]; !f.shape.sure && !known(f.shape, f.of(o)) {
				return false
			}
		}
	case dictionary:
		for it := o.v.MapRange(); it.Next(); {
			if !known(s.elem, operandOf(s.elem, it.Value())) {
				return false
			}
		}
	case list:
		for i := range o.v.Len() {
			e := operandOf(s.elem, o.v.Index(i))
			if !known(s.elem, e) {
				return false
			}
			if _, ok := s.element(e); !s.atomic && !ok {
				return false
			}
		}
	}
	return true
}

// hollow says whether a value has no children.
func (d *differ) hollow(s *shape, o operand) bool {
	if o.absent() || o.null {
		return true
	}
	if s.kind != structure {
		return o.v.Len() == 0
	}
	for i := range s.fields {
		if f := &s.fields[i]; !f.of(o).absent() {
			return false
		}
	}
	return true
}

// entries compares two dictionaries.
func (d *differ) entries(s *shape, l, r operand, c, x int32) {
	start := len(d.items)
	if !r.absent() && !r.null {
		for it := r.v.MapRange(); it.Next(); {
			e := item{elem: d.fieldElem(it.Key().String()), r: operandOf(s.elem, it.Value())}
			if !l.absent() && !l.null {
				if v := l.v.MapIndex(it.Key()); v.IsValid() {
					e.l = operandOf(s.elem, v)
				}
			}
			d.items = append(d.items, e)
		}
	}
	if !l.absent() && !l.null {
		for it := l.v.MapRange(); it.Next(); {
			if !r.absent() && !r.null && r.v.MapIndex(it.Key()).IsValid() {
				continue
			}
			d.items = append(d.items, item{elem: d.fieldElem(it.Key().String()), l: operandOf(s.elem, it.Value())})
		}
	}
	d.all(start, s.elem, c, x)
}

func (d *differ) fieldElem(name string) string {
	if !plain(name) {
		d.refused = true
	}
	return "f:" + name
}

// all compares the items from start on, in order, and takes them off the stack.
func (d *differ) all(start int, s *shape, c, x int32) {
	slices.SortFunc(d.items[start:], func(a, b item) int { return compare(a.elem, b.elem) })
	for i := start; i < len(d.items) && !d.refused; i++ {
		e := d.items[i]
		d.child(e.elem, s, e.l, e.r, c, x)
	}
	clear(d.items[start:])
	d.items = d.items[:start]
}

// elements compares two associative lists.
func (d *differ) elements(s *shape, l, r operand, c, x int32) {
	start := len(d.items)
	middle := start
	for _, side := range []operand{l, r} {
		middle = len(d.items)
		if side.absent() || side.null {
			continue
		}
		for i := range side.v.Len() {
			o := operandOf(s.elem, side.v.Index(i))
			elem, ok := s.element(o)
			if !ok || slices.ContainsFunc(d.items[middle:], func(e item) bool { return e.elem == elem }) {
				d.refused = true
				return
			}
			d.items = append(d.items, item{elem: elem, r: o})
		}
	}
	d.items = pair(d.items, start, middle)
	d.all(start, s.elem, c, x)
}

// pair brings the items of the left list, from start on, together with those of the right list, from middle on.
func pair(items []item, start, middle int) []item {
	for i := start; i < middle; i++ {
		items[i].l, items[i].r = items[i].r, operand{}
	}
	n := middle
	for i := middle; i < len(items); i++ {
		at := slices.IndexFunc(items[start:middle], func(e item) bool { return e.elem == items[i].elem })
		if at >= 0 {
			items[start+at].r = items[i].r
			continue
		}
		items[n] = items[i]
		n++
	}
	return items[:n]
}

// element writes the path element of a list item.
func (s *shape) element(o operand) (string, bool) {
	if s.set {
		out, ok := scalar(append(make([]byte, 0, 48), "v:"...), s.elem, o)
		return string(out), ok
	}
	out := append(make([]byte, 0, 64), "k:{"...)
	first := true
	for i := range s.keys {
		k := &s.keys[i]
		f := &s.elem.fields[k.at]
		v := f.of(o)
		if v.absent() && k.absent == "" {
			continue
		}
		if !first {
			out = append(out, ',')
		}
		first = false
		out = append(append(append(out, `\"`...), k.name...), `\":`...)
		if v.absent() {
			out = append(out, k.absent...)
			continue
		}
		var ok bool
		if out, ok = scalar(out, f.shape, v); !ok {
			return "", false
		}
	}
	return string(append(out, '}')), !first
}

// scalar writes a value as it stands in a path element.
func scalar(out []byte, s *shape, o operand) ([]byte, bool) {
	if o.null {
		return out, false
	}
	switch s.kind {
	case text:
		t := o.v.String()
		return append(append(append(out, `\"`...), t...), `\"`...), plain(t)
	case integer:
		return strconv.AppendInt(out, o.v.Int(), 10), true
	case boolean:
		return strconv.AppendBool(out, o.v.Bool()), true
	}
	return out, false
}

// equal says whether two values that are there are equal, down to the last field.
func (d *differ) equal(s *shape, l, r operand) bool {
	if l.absent() || r.absent() || l.null || r.null {
		return l.absent() == r.absent() && l.null == r.null
	}
	switch s.kind {
	case structure:
		for i := range s.fields {
			f := &s.fields[i]
			if !d.equal(f.shape, f.of(l), f.of(r)) {
				return false
			}
		}
		return true
	case dictionary:
		return d.equalEntries(s, l, r)
	case list:
		// Upstream compares lists as Go values, by which an empty list in an item is not a missing one.
		return reflect.DeepEqual(l.v.Interface(), r.v.Interface())
	case opaque:
		d.refused = true
		return false
	}
	return equalScalars(s.kind, l.v, r.v)
}

func (d *differ) equalEntries(s *shape, l, r operand) bool {
	if l.v.Len() != r.v.Len() {
		return false
	}
	for it := l.v.MapRange(); it.Next(); {
		v := r.v.MapIndex(it.Key())
		if !v.IsValid() || !d.equal(s.elem, operandOf(s.elem, it.Value()), operandOf(s.elem, v)) {
			return false
		}
	}
	return true
}

func equalScalars(k kind, l, r reflect.Value) bool {
	switch k {
	case boolean:
		return l.Bool() == r.Bool()
	case integer:
		return l.Int() == r.Int()
	case unsigned:
		return l.Uint() == r.Uint()
	case float:
		return l.Float() == r.Float()
	case text:
		return l.String() == r.String()
	case bytes:
		return string(l.Bytes()) == string(r.Bytes())
	case instant:
		return timeOf(l).Unix() == timeOf(r).Unix()
	case precise:
		a, b := l.Interface().(metav1.MicroTime), r.Interface().(metav1.MicroTime)
		return a.UnixMicro() == b.UnixMicro()
	case quantity:
		a, b := l.Interface().(resource.Quantity), r.Interface().(resource.Quantity)
		return a.String() == b.String()
	case intOrText:
		a, b := l.Interface().(intstr.IntOrString), r.Interface().(intstr.IntOrString)
		return a.Type == b.Type && (a.Type == intstr.Int && a.IntVal == b.IntVal || a.Type == intstr.String && a.StrVal == b.StrVal)
	case duration:
		return l.Int() == r.Int()
	}
	return false
}

func timeOf(v reflect.Value) time.Time {
	if v.CanAddr() {
		return v.Addr().Interface().(*metav1.Time).Time
	}
	return v.Interface().(metav1.Time).Time
}
