package api

import (
	"bytes"
	"context"
	"encoding/json"
	"maps"
	"math"
	"reflect"
	"strconv"
	"sync/atomic"
	"unicode/utf8"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"knarr/store"
)

// Kind gives the kind whose objects the storage keeps, in the version that the storage works with.
func (s *Storage) Kind() *Kind { return s.kind }

// Served gives a record's object as clients of the kind's version get it. It is shared and must not be changed. Errors: the object cannot be
// read in that version.
func (k *Kind) Served(rec *store.Record) (runtime.Object, error) {
	if f, ok := k.form.(*codecForm); ok {
		return f.served(rec)
	}
	return rec.Object, nil
}

// ServedJSON gives the JSON of what Served gives, without a newline at its end; of a custom resource it is made once for each record and shared, so
// that it must not be changed.
func (k *Kind) ServedJSON(rec *store.Record) ([]byte, error) {
	encode := func() ([]byte, error) {
		obj, err := k.Served(rec)
		if err != nil {
			return nil, err
		}
		return EncodeJSON(obj)
	}
	if name := k.JSONName(); name != "" {
		return rec.Encoding(name, encode)
	}
	return encode()
}

// JSONName is the name by which records cache what ServedJSON gives; empty for kinds that are not custom resources.
func (k *Kind) JSONName() string {
	if f, ok := k.form.(*codecForm); ok {
		return f.jsonID
	}
	return ""
}

// given is what an update of a record gets: a private copy, or what its caller only reads.
func (s *Storage) given(ctx context.Context, rec *store.Record) (runtime.Object, error) {
	o := s.outcome(ctx)
	if o == nil || !o.Reads {
		return s.kind.form.fromStored(rec)
	}
	obj, err := s.kind.Served(rec)
	o.Before = obj
	u, ok := obj.(*unstructured.Unstructured)
	if err != nil || !ok || o.Check == nil {
		return obj, err
	}
	u = &unstructured.Unstructured{Object: maps.Clone(u.Object)}
	TakeManagedFields(u)
	return u, nil
}

// TakeManagedFields takes an object's managed fields off and gives them as they stand in the tree, nil for none. The object's own map is written to,
// that of its metadata is replaced.
func TakeManagedFields(u *unstructured.Unstructured) any {
	m, ok := u.Object["metadata"].(map[string]any)
	if !ok || m["managedFields"] == nil {
		return nil
	}
	fields := m["managedFields"]
	m = maps.Clone(m)
	delete(m, "managedFields")
	u.Object["metadata"] = m
	return fields
}

// PutManagedFields puts back what TakeManagedFields took, into the metadata's own map.
func PutManagedFields(obj runtime.Object, fields any) {
	u, ok := obj.(*unstructured.Unstructured)
	if !ok || fields == nil {
		return
	}
	if m, ok := u.Object["metadata"].(map[string]any); ok {
		m["managedFields"] = fields
	}
}

// EncodeJSON gives the JSON of an object as upstream's serializer writes it, without the newline.
func EncodeJSON(obj runtime.Object) ([]byte, error) {
	if u, ok := obj.(*unstructured.Unstructured); ok {
		return encodeTree(u.Object, "")
	}
	return json.Marshal(obj)
}

// codecForm serves custom resources: each served version has a storage of its own whose codec prunes, defaults and
// converts, while the table holds the plain JSON tree in the storage version.
type codecForm struct {
	codec runtime.Codec
	gvk   schema.GroupVersionKind // that the storage works with
	// id and jsonID name the form, and what it serves in JSON, among all that read the same records.
	id, jsonID string
	// holds is what the kind was told by Trust; nil before.
	holds atomic.Pointer[func(map[string]any) bool]
}

// Trust tells a kind of custom resources that works with the stored version how to find out, without reading it, that an object of the stored version is served as it is stored: holds says so only
// if it is sure, and changes nothing.
func (k *Kind) Trust(holds func(map[string]any) bool) {
	if f, ok := k.form.(*codecForm); ok {
		f.holds.Store(&holds)
	}
}

// formNumber makes the names of codec forms.
var formNumber atomic.Int64

func newCodecForm(codec runtime.Codec, gvk schema.GroupVersionKind) *codecForm {
	id := "form " + strconv.FormatInt(formNumber.Add(1), 10)
	return &codecForm{codec: codec, gvk: gvk, id: id, jsonID: id + " JSON"}
}

func (f *codecForm) toStored(obj, _ runtime.Object, _ bool) (encoded, error) {
	if u, ok := obj.(*unstructured.Unstructured); ok && f.holds.Load() != nil && u.GroupVersionKind() == f.gvk && asRead(u.Object) {
		data, err := encodeTree(u.Object, "\n") // what the codec gives for an object of the stored version, which needs no conversion
		return encoded{object: u, data: data}, err
	}
	data, err := runtime.Encode(f.codec, obj)
	if err != nil {
		return encoded{}, err
	}
	if u, ok := obj.(*unstructured.Unstructured); ok && u.GetKind() != "" && bytes.HasPrefix(data, []byte(`{"apiVersion":"`+u.GetAPIVersion()+`",`)) && asRead(u.Object) {
		return encoded{object: u, data: data}, nil // reading data would give the same again
	}
	tree := &unstructured.Unstructured{}
	if err := tree.UnmarshalJSON(data); err != nil {
		return encoded{}, err
	}
	data, err = tree.MarshalJSON()
	return encoded{object: tree, data: data}, err
}

// asRead says that a tree is what reading its JSON gives: the types of JSON, and numbers without a fraction as integers.
func asRead(v any) bool {
	switch v := v.(type) {
	case map[string]any:
		for k, e := range v {
			if !utf8.ValidString(k) || !asRead(e) {
				return false
			}
		}
		return v != nil
	case []any:
		for _, e := range v {
			if !asRead(e) {
				return false
			}
		}
		return v != nil
	case string:
		return utf8.ValidString(v)
	case float64:
		return v != math.Trunc(v)
	case nil, bool, int64:
		return true
	}
	return false
}

// What asStored remembers of a record by a form's id.
var yes, no = []byte{1}, []byte{0}

// asStored says whether the codec makes nothing else of a record than what is stored, and remembers it: such records it need not be asked for
// again. made is what the codec gave when it was asked now, else nil.
func (f *codecForm) asStored(rec *store.Record) (same bool, made runtime.Object, err error) {
	known, err := rec.Encoding(f.id, func() (_ []byte, err error) {
		stored := rec.Object.(*unstructured.Unstructured)
		if holds := f.holds.Load(); holds != nil && stored.GroupVersionKind() == f.gvk && (*holds)(stored.Object) {
			return yes, nil
		}
		if made, err = f.decode(rec); err != nil {
			return nil, err
		}
		if u, ok := made.(*unstructured.Unstructured); ok && reflect.DeepEqual(u.Object, stored.Object) {
			return yes, nil
		}
		return no, nil
	})
	if err != nil {
		return false, nil, err
	}
	return known[0] == yes[0], made, nil
}

func (f *codecForm) fromStored(rec *store.Record) (runtime.Object, error) {
	same, made, err := f.asStored(rec)
	switch {
	case err != nil || made != nil:
		return made, err
	case same:
		return rec.Object.DeepCopyObject(), nil
	}
	return f.decode(rec)
}

// served is fromStored without a private copy.
func (f *codecForm) served(rec *store.Record) (runtime.Object, error) {
	same, made, err := f.asStored(rec)
	switch {
	case err != nil:
		return nil, err
	case same:
		return rec.Object, nil
	case made != nil:
		return made, nil
	}
	return f.decode(rec)
}

// decode reads the record's JSON as the storage's version.
func (f *codecForm) decode(rec *store.Record) (runtime.Object, error) {
	data, err := EncodeJSON(rec.Object)
	if err != nil {
		return nil, err
	}
	// Into an object, as upstream's storage does: without one, a field named items makes a list of it.
	into := &unstructured.Unstructured{}
	into.SetGroupVersionKind(f.gvk)
	obj, _, err := f.codec.Decode(data, nil, into)
	return obj, err
}
