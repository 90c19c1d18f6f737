package api_test

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	autoscalingv1 "k8s.io/api/autoscaling/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/value"
	"k8s.io/apiserver/pkg/storage/value/encrypt/identity"
	"k8s.io/apiserver/pkg/storage/value/encrypt/secretbox"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/kubernetes/pkg/apis/apps"
	"k8s.io/kubernetes/pkg/apis/autoscaling"
	"k8s.io/kubernetes/pkg/apis/core"
	"k8s.io/kubernetes/pkg/apis/rbac"

	"knarr/api"
	"knarr/store"
	"knarr/store/pebble"
)

// rawCodec writes bytes as they are: what a disk, another program or another key might have left.
type rawCodec struct{ bytes []byte }

func (c rawCodec) Encode(context.Context, string, runtime.Object) ([]byte, error) {
	return bytes.Clone(c.bytes), nil
}

func (c rawCodec) Decode(context.Context, string, []byte, int64) (runtime.Object, error) {
	return &corev1.ConfigMap{}, nil
}

// storedKind is a kind whose stored bytes are read.
type storedKind struct {
	resource schema.GroupResource
	example  runtime.Object // of the version that the REST storage works with
	list     runtime.Object
	stored   runtime.Object // what is in the store
	custom   bool
}

func storedKinds() []storedKind {
	m := metav1.ObjectMeta{Name: "x", Namespace: "n", Labels: map[string]string{"a": "b"}}
	typed := func(obj runtime.Object) runtime.Object {
		kinds, _, err := scheme.Scheme.ObjectKinds(obj)
		if err != nil {
			panic(err)
		}
		obj.GetObjectKind().SetGroupVersionKind(kinds[0])
		return obj
	}
	pod := corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "i"}}}
	ship := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "example.com/v1", "kind": "Ship",
		"metadata": map[string]any{"name": "x", "namespace": "n"}, "spec": map[string]any{"crew": int64(6), "tons": 1.5}}}
	definition := &apiextensionsv1.CustomResourceDefinition{TypeMeta: metav1.TypeMeta{APIVersion: "apiextensions.k8s.io/v1", Kind: "CustomResourceDefinition"},
		ObjectMeta: metav1.ObjectMeta{Name: "ships.example.com"}, Spec: apiextensionsv1.CustomResourceDefinitionSpec{Group: "example.com"}}
	return []storedKind{
		{schema.GroupResource{Resource: "configmaps"}, &core.ConfigMap{}, &core.ConfigMapList{}, typed(&corev1.ConfigMap{ObjectMeta: m, Data: map[string]string{"k": "v"}}), false},
		{schema.GroupResource{Resource: "secrets"}, &core.Secret{}, &core.SecretList{}, typed(&corev1.Secret{ObjectMeta: m, Data: map[string][]byte{"k": {0, 1}}}), false},
		{schema.GroupResource{Resource: "pods"}, &core.Pod{}, &core.PodList{}, typed(&corev1.Pod{ObjectMeta: m, Spec: pod}), false},
		{schema.GroupResource{Group: "apps", Resource: "deployments"}, &apps.Deployment{}, &apps.DeploymentList{},
			typed(&appsv1.Deployment{ObjectMeta: m, Spec: appsv1.DeploymentSpec{Template: corev1.PodTemplateSpec{Spec: pod}}}), false},
		{schema.GroupResource{Group: "autoscaling", Resource: "horizontalpodautoscalers"}, &autoscaling.HorizontalPodAutoscaler{}, &autoscaling.HorizontalPodAutoscalerList{},
			typed(&autoscalingv1.HorizontalPodAutoscaler{ObjectMeta: m, Spec: autoscalingv1.HorizontalPodAutoscalerSpec{MaxReplicas: 1}}), false},
		{schema.GroupResource{Group: "rbac.authorization.k8s.io", Resource: "roles"}, &rbac.Role{}, &rbac.RoleList{}, typed(&rbacv1.Role{ObjectMeta: m}), false},
		{schema.GroupResource{Group: "apiextensions.k8s.io", Resource: "customresourcedefinitions"}, &apiextensions.CustomResourceDefinition{}, &apiextensions.CustomResourceDefinitionList{}, definition, false},
		{schema.GroupResource{Group: "example.com", Resource: "ships"}, ship, &unstructured.UnstructuredList{}, ship, true},
	}
}

// encodings are the forms that a value may have in the store: upstream's protobuf, and the JSON of custom resources and of
// stores of old.
func (k storedKind) encodings(t testing.TB) [][]byte {
	t.Helper()
	var out [][]byte
	var b bytes.Buffer
	require.NoError(t, json.NewSerializerWithOptions(json.DefaultMetaFactory, scheme.Scheme, scheme.Scheme, json.SerializerOptions{}).Encode(k.stored, &b))
	out = append(out, bytes.Clone(b.Bytes()))
	b.Reset()
	if err := protobuf.NewSerializer(scheme.Scheme, scheme.Scheme).Encode(k.stored, &b); err == nil {
		out = append(out, bytes.Clone(b.Bytes()))
	}
	return out
}

// vault opens one kind at a time over a store that holds one value.
type vault struct {
	store    *store.Store
	registry *api.Registry
}

func newVault(t testing.TB) *vault {
	t.Helper()
	ctx := context.Background()
	engine, err := pebble.Open(ctx, pebble.Options{Dir: "db", FS: vfs.NewMem()})
	require.NoError(t, err)
	s, err := store.Open(ctx, store.Options{Engine: engine, Debug: true})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	transformers := map[schema.GroupResource]value.Transformer{{Resource: "secrets"}: value.NewPrefixTransformers(nil,
		value.PrefixTransformer{Prefix: []byte("k8s:enc:secretbox:v1:key1:"), Transformer: secretbox.NewSecretboxTransformer([32]byte{1})},
		value.PrefixTransformer{Transformer: identity.NewEncryptCheckTransformer()})}
	registry, err := api.NewRegistry(s, func(r schema.GroupResource) value.Transformer { return transformers[r] })
	require.NoError(t, err)
	return &vault{s, registry}
}

// open puts a value into the store and opens the kind's table over it. It gives the key for the storage.
func (v *vault) open(t testing.TB, k storedKind, value []byte) (s storage.Interface, key string, err error) {
	t.Helper()
	getter := v.registry.GetRESTOptions
	if k.custom {
		getter = v.registry.CustomResources().GetRESTOptions
	}
	opts, err := getter(k.resource, k.example)
	require.NoError(t, err)
	ctx, prefix := context.Background(), api.KeyRoot+opts.ResourcePrefix+"/"
	table, err := v.store.OpenTable(ctx, store.TableOptions{Prefix: prefix, Codec: rawCodec{value}})
	require.NoError(t, err)
	op := store.Op{Table: table, Key: prefix + "n/x", Object: &corev1.ConfigMap{}}
	if old := table.Get(op.Key); old != nil {
		op.Expect = old.Revision
	}
	_, err = v.store.Txn(ctx, op)
	require.NoError(t, err)
	v.store.CloseTable(prefix)
	t.Cleanup(func() { v.store.CloseTable(prefix) })
	attrs := func(runtime.Object) (labels.Set, fields.Set, error) { return nil, nil, nil }
	s, _, err = opts.Decorator(opts.StorageConfig, opts.ResourcePrefix, nil, k.example.DeepCopyObject, k.list.DeepCopyObject, attrs, nil, nil)
	return s, opts.ResourcePrefix + "/n/x", err
}

// FuzzStored reads any bytes that a store might hold. Either they are an object of the kind, which can be read, written and
// read again, or opening the kind says that the value is corrupt, and of which key.
func FuzzStored(f *testing.F) {
	v, kinds := newVault(f), storedKinds()
	for i := range kinds {
		for j := range kinds {
			for _, seed := range kinds[j].encodings(f) {
				f.Add(uint8(i), seed)
				f.Add(uint8(i), seed[:len(seed)/2])
			}
		}
		for _, seed := range []string{"", "k8s\x00", "{}", "null", "[]", `{"kind":"List","apiVersion":"v1","items":[]}`, `{"kind":"Status","apiVersion":"v1"}`, "k8s:enc:secretbox:v1:key1:" + string(make([]byte, 64)), "k8s:enc:aescbc:v1:x:y"} {
			f.Add(uint8(i), []byte(seed))
		}
	}
	f.Fuzz(func(t *testing.T, kind uint8, value []byte) {
		k := kinds[int(kind)%len(kinds)]
		s, key, err := v.open(t, k, value)
		if err != nil {
			var corrupt *store.CorruptError
			if !errors.As(err, &corrupt) || corrupt.Key == "" || corrupt.Err == nil {
				t.Fatalf("%v is no CorruptError that names its key", err)
			}
			return
		}
		ctx, out := context.Background(), k.example.DeepCopyObject()
		if err := s.Get(ctx, key, storage.GetOptions{}, out); err != nil {
			t.Fatalf("%s was opened and cannot be read: %v", k.resource, err)
		}
		m, err := meta.Accessor(out)
		require.NoError(t, err)
		was := m.GetLabels()
		set := func(obj runtime.Object, _ storage.ResponseMeta) (runtime.Object, *uint64, error) {
			m, err := meta.Accessor(obj)
			require.NoError(t, err)
			m.SetLabels(map[string]string{"changed": "yes"})
			return obj, nil, nil
		}
		if err := s.GuaranteedUpdate(ctx, key, k.example.DeepCopyObject(), false, nil, storage.UpdateFunc(set), nil); err != nil {
			t.Fatalf("%s with labels %v was opened and cannot be written: %v", k.resource, was, err)
		}
		if err := s.Get(ctx, key, storage.GetOptions{}, out); err != nil {
			t.Fatalf("%s was written and cannot be read: %v", k.resource, err)
		}
	})
}
