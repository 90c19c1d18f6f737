package api

import (
	"fmt"
	"reflect"
	"strings"
	"sync"
	"time"
	"unsafe"

	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// settle makes an object of a protobuf type what reading its encoding would give, in place, so that nothing has to be read: times get their
// stored precision, and empty lists are absent. It returns false for an object with anything else that reading would change, a field
// without a number in protobuf for one.
//
// In any case the object can be encoded by many at once afterwards: quantities remember their text at the first time that it is asked for, without
// a lock. The object must be its caller's alone but for parts that have been through settle before: those it does not write to.
func settle(obj runtime.Object) bool {
	v := reflect.ValueOf(obj)
	if v.Kind() != reflect.Pointer || v.IsNil() || v.Elem().Kind() != reflect.Struct {
		return false
	}
	s := settlerOf(v.Elem().Type())
	return s.at == nil || s.at(v.UnsafePointer())
}

// settler settles the value at an address, of the type it was made for; at is nil where a type has nothing to settle.
type settler struct {
	at func(unsafe.Pointer) bool
}

// settlers are those of the objects' types: reflect.Type to *settler.
var settlers sync.Map

func settlerOf(t reflect.Type) *settler {
	if s, ok := settlers.Load(t); ok {
		return s.(*settler)
	}
	c := settlerMaker{made: map[reflect.Type]*settler{}, root: t}
	s, _ := settlers.LoadOrStore(t, c.of(t))
	return s.(*settler)
}

// settlerMaker makes the settlers of a type and of what it is made of.
type settlerMaker struct {
	made map[reflect.Type]*settler
	root reflect.Type
}

var (
	timeType      = reflect.TypeFor[metav1.Time]()
	microTimeType = reflect.TypeFor[metav1.MicroTime]()
	quantityType  = reflect.TypeFor[resource.Quantity]()
	typeMetaType  = reflect.TypeFor[metav1.TypeMeta]()
)

// of gives the settler of a type. That of a type which is being made, since it holds itself, is filled in later.
func (c *settlerMaker) of(t reflect.Type) *settler {
	if s, ok := c.made[t]; ok {
		return s
	}
	s := &settler{at: func(unsafe.Pointer) bool { return false }} // until it is made: not nil
	c.made[t] = s
	s.at = c.make(t)
	return s
}

func (c *settlerMaker) make(t reflect.Type) func(unsafe.Pointer) bool {
	switch t {
	case timeType:
		return settleTime(time.Second)
	case microTimeType:
		return settleTime(time.Microsecond)
	case quantityType:
		return settleQuantity
	}
	switch t.Kind() {
	case reflect.Struct:
		return c.ofStruct(t)
	case reflect.Pointer:
		return c.ofPointer(t)
	case reflect.Slice:
		return c.ofSlice(t)
	case reflect.Map:
		return c.ofMap(t)
	case reflect.Bool, reflect.String, reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64, reflect.Uint8, reflect.Uint32, reflect.Uint64,
		reflect.Float32, reflect.Float64:
		return nil
	}
	return mustBeZero(t) // interfaces and whatever else has no encoding
}

// settleTime cuts a time to a precision and puts it into the local zone, as the methods Unmarshal of metav1.Time and metav1.MicroTime do.
func settleTime(precision time.Duration) func(unsafe.Pointer) bool {
	return func(p unsafe.Pointer) bool {
		t := (*time.Time)(p)
		var want time.Time
		if !t.IsZero() {
			want = time.Unix(t.Unix(), int64(time.Duration(t.Nanosecond()).Truncate(precision))).Local()
		}
		if *t != want {
			*t = want
		}
		return true
	}
}

// bigOffset is where a quantity keeps a number that does not fit into 64 bits.
var bigOffset = func() uintptr {
	f, ok := quantityType.FieldByName("d")
	if !ok || f.Type.Size() != unsafe.Sizeof(uintptr(0)) {
		panic(fmt.Sprintf("api: %s has changed", quantityType))
	}
	return f.Offset
}()

// settleQuantity knows small numbers; a big one may be written with a smaller precision than it has, and one that was never set is read as zero.
func settleQuantity(p unsafe.Pointer) bool {
	_ = (*resource.Quantity)(p).String() // remembers
	return isPlain((*resource.Quantity)(p))
}

func isPlain(q *resource.Quantity) bool {
	return *(*unsafe.Pointer)(unsafe.Add(unsafe.Pointer(q), bigOffset)) == nil && q.Format != ""
}

func mustBeZero(t reflect.Type) func(unsafe.Pointer) bool {
	return func(p unsafe.Pointer) bool { return reflect.NewAt(t, p).Elem().IsZero() }
}

// fieldSettler is the settler of a field at an offset.
type fieldSettler struct {
	offset uintptr
	*settler
}

func (c *settlerMaker) ofStruct(t reflect.Type) func(unsafe.Pointer) bool {
	var fields []fieldSettler
	for i := range t.NumField() {
		f := t.Field(i)
		tag := f.Tag.Get("protobuf")
		switch {
		case f.Type == typeMetaType && t == c.root: // what reading sets it to is set for every object
		case strings.HasPrefix(tag, "bytes,"), strings.HasPrefix(tag, "varint,"), strings.HasPrefix(tag, "fixed64,"):
			if s := c.of(f.Type); s.at != nil {
				fields = append(fields, fieldSettler{f.Offset, s})
			}
		default:
			fields = append(fields, fieldSettler{f.Offset, &settler{at: mustBeZero(f.Type)}})
		}
	}
	if len(fields) == 0 {
		return nil
	}
	return func(p unsafe.Pointer) bool {
		ok := true
		for i := range fields {
			ok = fields[i].at(unsafe.Add(p, fields[i].offset)) && ok
		}
		return ok
	}
}

func (c *settlerMaker) ofPointer(t reflect.Type) func(unsafe.Pointer) bool {
	of := c.of(t.Elem())
	if of.at == nil {
		return nil
	}
	return func(p unsafe.Pointer) bool {
		to := *(*unsafe.Pointer)(p)
		return to == nil || of.at(to)
	}
}

// ofSlice knows that an empty list is absent in protobuf; empty bytes are not.
func (c *settlerMaker) ofSlice(t reflect.Type) func(unsafe.Pointer) bool {
	of, size := c.of(t.Elem()), t.Elem().Size()
	nilable := t.Elem().Kind() == reflect.Pointer || t.Elem().Kind() == reflect.Slice || t.Elem().Kind() == reflect.Map
	if nilable {
		return mustBeZero(t)
	}
	return func(p unsafe.Pointer) bool {
		s := *(*[]byte)(p) // of whatever type: its address and length
		if len(s) == 0 {
			return dropEmpty(p, s == nil, size)
		}
		if of.at == nil {
			return true
		}
		first, ok := unsafe.Pointer(unsafe.SliceData(s)), true
		for i := range len(s) {
			ok = of.at(unsafe.Add(first, uintptr(i)*size)) && ok
		}
		return ok
	}
}

// dropEmpty makes an empty list at p none.
func dropEmpty(p unsafe.Pointer, none bool, size uintptr) bool {
	if none {
		return true
	}
	if size == 1 { // bytes
		return false
	}
	*(*[]struct{})(p) = nil
	return true
}

// ofMap knows maps to text, bytes and quantities; of others only that they are absent.
func (c *settlerMaker) ofMap(t reflect.Type) func(unsafe.Pointer) bool {
	switch {
	case t.ConvertibleTo(reflect.TypeFor[map[string]string]()):
		return func(p unsafe.Pointer) bool { return dropEmptyMap[string](p) }
	case t == reflect.TypeFor[map[string][]byte]():
		return func(p unsafe.Pointer) bool {
			for _, v := range *(*map[string][]byte)(p) {
				if v == nil { // is read as empty
					return false
				}
			}
			return dropEmptyMap[[]byte](p)
		}
	case t.Key().Kind() == reflect.String && t.Elem() == quantityType:
		return func(p unsafe.Pointer) bool {
			for _, q := range *(*map[string]resource.Quantity)(p) { // whose text nobody can remember: what is in a map is asked by way of copies
				if !isPlain(&q) {
					return false
				}
			}
			return dropEmptyMap[resource.Quantity](p)
		}
	}
	return mustBeZero(t)
}

// dropEmptyMap makes an empty map at p none.
func dropEmptyMap[V any](p unsafe.Pointer) bool {
	if m := (*map[string]V)(p); len(*m) == 0 && *m != nil {
		*m = nil
	}
	return true
}
