package api

import (
	"context"
	"fmt"
	"reflect"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/value"

	"knarr/store"
)

// KeyRoot is what upstream puts before every key.
const KeyRoot = "/registry"

// A Kind is one stored resource: its table and the rules of travel between the table and upstream's REST storage.
// It is immutable after creation and safe for concurrent use.
type Kind struct {
	// Resource names the kind without a version, e.g. deployments.apps.
	Resource schema.GroupResource
	// Stored is the type that the table holds, which is also upstream's storage version.
	Stored schema.GroupVersionKind
	// Table holds the objects.
	Table *store.Table

	store       *store.Store
	transformer value.Transformer // nil: stored as it is
	codec       *tableCodec
	prefix      string // key prefix with the final slash: /registry/pods/
	form        form
	attrs       storage.AttrFunc // labels and selectable fields of an object of the form's version; nil where nobody selects
}

// A form converts between what the table holds and what the REST storage works with.
// Both directions give private copies.
type form interface {
	// toStored gives the versioned, defaulted object that the table may own, and its plain encoding. It takes obj over: nobody may
	// rely on what obj holds afterwards. old is what the table holds instead so far, nil for nothing; both may share what did not change. final says
	// that nobody changes obj, or what it points to, ever after: the table may then keep that instead of copies.
	toStored(obj, old runtime.Object, final bool) (encoded, error)
	// fromStored gives an object that the REST storage may own, of the version it works with.
	fromStored(rec *store.Record) (runtime.Object, error)
}

// encoded is an object that the table may own, with its encoding.
type encoded struct {
	object runtime.Object
	data   []byte
	// same says that data is protobuf which object gives again, byte for byte.
	same bool
}

// Plain reports whether the stored objects are what clients of the stored version get, byte for byte: true for all
// built-in kinds, false for custom resources, whose versions are converted, pruned and defaulted on the way.
func (k *Kind) Plain() bool {
	_, ok := k.form.(*hubForm)
	return ok
}

// Select makes the selection of a request for objects of the stored version; namespace "" means all of them.
func (k *Kind) Select(namespace string, label labels.Selector, field fields.Selector) Selection {
	sel := Selection{Prefix: k.prefix, Label: label, marks: marksFor(label)}
	if namespace != "" {
		sel.Prefix += namespace + "/"
	}
	if field != nil && !field.Empty() {
		sel.Match = k.fieldMatch(storage.SelectionPredicate{Label: labels.Everything(), Field: field, GetAttrs: k.attrs})
	}
	return sel
}

// New makes an empty object of the stored type.
func (k *Kind) New() (runtime.Object, error) {
	f, ok := k.form.(*hubForm)
	if !ok {
		obj := &unstructured.Unstructured{}
		obj.SetGroupVersionKind(k.Stored)
		return obj, nil
	}
	obj, err := f.scheme.New(k.Stored)
	if err == nil {
		obj.GetObjectKind().SetGroupVersionKind(k.Stored)
	}
	return obj, err
}

// ConvertFieldLabel checks a field selector's field and gives its canonical name.
func (k *Kind) ConvertFieldLabel(label, value string) (string, string, error) {
	f, ok := k.form.(*hubForm)
	if !ok {
		return "", "", fmt.Errorf("%s has no Go type", k.Resource)
	}
	return f.scheme.ConvertFieldLabel(k.Stored, label, value)
}

// NotNewer fails when a client asks for a revision that the store has not reached.
func (k *Kind) NotNewer(resourceVersion string) error {
	return k.notNewer(storage.APIObjectVersioner{}, resourceVersion)
}

// Prefix is the key prefix of the kind, with its final slash.
func (k *Kind) Prefix() string { return k.prefix }

// Key is the key of one object; namespace is empty for cluster-scoped kinds.
func (k *Kind) Key(namespace, name string) string {
	if namespace == "" {
		return k.prefix + name
	}
	return k.prefix + namespace + "/" + name
}

// hubForm serves kinds whose types live in a scheme with an internal version: the built-in kinds, CustomResourceDefinition
// and APIService.
type hubForm struct {
	scheme *runtime.Scheme
	stored schema.GroupVersionKind
	hub    schema.GroupVersion
	// binary says that encode makes protobuf.
	binary bool
	encode func(runtime.Object) ([]byte, error)
	decode func([]byte) (runtime.Object, error)
}

func (f *hubForm) toStored(obj, old runtime.Object, final bool) (encoded, error) {
	out, err := f.scheme.UnsafeConvertToVersion(obj, f.stored.GroupVersion())
	if err != nil {
		return encoded{}, err
	}
	// What readers see now is what they will see after a restart (times have their stored precision, empty lists are absent).
	settled := final && f.binary && settle(out)
	f.scheme.Default(out)
	out.GetObjectKind().SetGroupVersionKind(f.stored)
	settled = settled && settle(out) // the defaults, too
	data, err := f.encode(out)
	if err != nil {
		return encoded{}, err
	}
	if settled {
		shareParts(out)
		if !shareSpec(out, old, data) {
			sharePod(out)
		}
		return encoded{out, data, true}, nil
	}
	if pod := f.reread(data, old); pod != nil {
		return encoded{object: pod, data: data}, nil
	}
	out, err = f.decode(data)
	return encoded{object: out, data: data}, err
}

func (f *hubForm) fromStored(rec *store.Record) (runtime.Object, error) {
	return f.scheme.UnsafeConvertToVersion(rec.Object.DeepCopyObject(), f.hub)
}

// shared is fromStored without a private copy: only the object's own fields may be written to, not what they point to.
func (f *hubForm) shared(rec *store.Record) (runtime.Object, error) {
	return f.scheme.UnsafeConvertToVersion(rec.Object, f.hub)
}

func decodeUnstructured(data []byte) (runtime.Object, error) {
	obj := &unstructured.Unstructured{}
	if err := obj.UnmarshalJSON(data); err != nil {
		return nil, err
	}
	return obj, nil
}

// tableCodec is the store.Codec of a kind: upstream's storage bytes, encrypted in upstream's provider format where the
// resource has a transformer. Source of the format: k8s.io/apiserver/pkg/storage/value.
type tableCodec struct {
	encode      func(runtime.Object) ([]byte, error)
	decode      func([]byte) (runtime.Object, error)
	transformer value.Transformer
}

var _ store.Codec = (*tableCodec)(nil)

func (c *tableCodec) Encode(ctx context.Context, key string, obj runtime.Object) ([]byte, error) {
	data, err := c.encode(obj)
	if err != nil {
		return nil, err
	}
	return c.seal(ctx, key, data)
}

// seal encrypts an encoding where the resource is encrypted.
func (c *tableCodec) seal(ctx context.Context, key string, data []byte) ([]byte, error) {
	if c.transformer == nil {
		return data, nil
	}
	return c.transformer.TransformToStorage(ctx, data, value.DefaultContext(key))
}

func (c *tableCodec) Decode(ctx context.Context, key string, data []byte, _ int64) (runtime.Object, error) {
	if c.transformer != nil {
		plain, _, err := c.transformer.TransformFromStorage(ctx, data, value.DefaultContext(key))
		if err != nil {
			return nil, fmt.Errorf("decrypt %s: %w", key, err)
		}
		data = plain
	}
	obj, err := c.decode(data)
	if err != nil {
		return nil, fmt.Errorf("decode %s: %w", key, err)
	}
	return obj, nil
}

// decodeInto reads bytes of any version that the scheme knows and gives the kind's stored, defaulted type; an object of
// another kind is an error.
func decodeInto(scheme *runtime.Scheme, deserializer runtime.Decoder, stored schema.GroupVersionKind) func([]byte) (runtime.Object, error) {
	want := reflect.PointerTo(scheme.AllKnownTypes()[stored])
	return func(data []byte) (runtime.Object, error) {
		obj, gvk, err := deserializer.Decode(data, nil, nil)
		if err != nil {
			return nil, err
		}
		scheme.Default(obj)
		if *gvk != stored {
			if obj, err = convertThroughHub(scheme, obj, stored.GroupVersion()); err != nil {
				return nil, err
			}
			scheme.Default(obj)
		}
		if reflect.TypeOf(obj) != want {
			return nil, fmt.Errorf("it is a %s, not a %s", gvk, stored.Kind)
		}
		obj.GetObjectKind().SetGroupVersionKind(stored)
		shareParts(obj)
		settle(obj)
		sharePod(obj)
		return obj, nil
	}
}

// convertThroughHub converts between two versions of a group, which know each other by the internal version only.
func convertThroughHub(scheme *runtime.Scheme, obj runtime.Object, gv schema.GroupVersion) (runtime.Object, error) {
	hub, err := scheme.ConvertToVersion(obj, runtime.InternalGroupVersioner)
	if err != nil {
		return nil, err
	}
	return scheme.UnsafeConvertToVersion(hub, gv)
}
