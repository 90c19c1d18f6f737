package api

import (
	"encoding/json"
	"math"
	"reflect"
	"testing"

	"github.com/stretchr/testify/require"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"knarr/store"
)

var shipKind = schema.GroupVersionKind{Group: "example.com", Version: "v1", Kind: "Ship"}

func ship(spec any) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: map[string]any{"apiVersion": "example.com/v1", "kind": "Ship", "spec": spec,
		"metadata": map[string]any{"name": "knarr", "resourceVersion": "7"}}}
}

// TestAsRead: what is kept as it is must be what a restart reads.
func TestAsRead(t *testing.T) {
	f := newCodecForm(unstructured.UnstructuredJSONScheme, shipKind)
	for name, tc := range map[string]struct {
		spec any
		kept bool
	}{
		"plain":               {map[string]any{"a": "b", "c": int64(1), "d": 1.5, "e": true, "f": nil, "g": []any{"h", map[string]any{}}}, true},
		"text with escapes":   {"<&>\u2028\x00é", true},
		"empty list":          {[]any{}, true},
		"integral number":     {map[string]any{"a": 1.0}, false},
		"large number":        {1e20, false},
		"small number":        {1e-7, true},
		"Go integer":          {[]any{1}, false},
		"Go list":             {map[string]any{"a": []string{"b"}}, false},
		"absent list":         {map[string]any{"a": []any(nil)}, false},
		"absent map":          {map[string]any{"a": map[string]any(nil)}, false},
		"broken text":         {"\xff", false},
		"name that is broken": {map[string]any{"\xff": "a"}, false},
	} {
		given := ship(tc.spec)
		require.Equal(t, tc.kept, asRead(given.Object), name)
		want := &unstructured.Unstructured{}
		data, err := given.MarshalJSON()
		require.NoError(t, err, name)
		require.NoError(t, want.UnmarshalJSON(data), name)
		if tc.kept {
			require.True(t, reflect.DeepEqual(want.Object, given.Object), name)
		}
		made, err := f.toStored(given, nil, false)
		require.NoError(t, err, name)
		require.Equal(t, want, made.object, name)
		again, err := want.MarshalJSON()
		require.NoError(t, err, name)
		require.Equal(t, string(again), string(made.data), name)
	}
	require.False(t, asRead(math.Inf(1)))
}

// shouting is a codec that changes what it reads.
type shouting struct{ runtime.Codec }

func (s shouting) Decode(data []byte, kind *schema.GroupVersionKind, into runtime.Object) (runtime.Object, *schema.GroupVersionKind, error) {
	obj, got, err := s.Codec.Decode(data, kind, into)
	if err == nil {
		obj.(*unstructured.Unstructured).Object["loud"] = true
	}
	return obj, got, err
}

// TestFromStored: each reader gets its codec's view in a copy of its own, whichever of them came first.
func TestFromStored(t *testing.T) {
	plain, loud := newCodecForm(unstructured.UnstructuredJSONScheme, shipKind), newCodecForm(shouting{unstructured.UnstructuredJSONScheme}, shipKind)
	rec := &store.Record{Object: ship(map[string]any{"crew": int64(3)})}
	before, err := json.Marshal(rec.Object)
	require.NoError(t, err)
	for range 3 {
		a, err := plain.fromStored(rec)
		require.NoError(t, err)
		require.Equal(t, rec.Object, a)
		b, err := loud.fromStored(rec)
		require.NoError(t, err)
		require.Equal(t, true, b.(*unstructured.Unstructured).Object["loud"])
		for _, obj := range []runtime.Object{a, b} {
			obj.(*unstructured.Unstructured).Object["spec"].(map[string]any)["crew"] = "spoilt"
		}
	}
	after, err := json.Marshal(rec.Object)
	require.NoError(t, err)
	require.Equal(t, string(before), string(after))
}
