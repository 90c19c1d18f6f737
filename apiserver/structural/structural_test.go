package structural

import (
	"math/rand"
	"testing"

	"github.com/stretchr/testify/require"
	structuralschema "k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/defaulting"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/objectmeta"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/pruning"
	"k8s.io/apimachinery/pkg/runtime"
)

// generator makes schemas, and values that mostly fit them.
type generator struct{ *rand.Rand }

func (g generator) oneIn(n int) bool { return g.Intn(n) == 0 }

var names = []string{"a", "b", "c", "kind", "metadata", "status"}

func (g generator) schema(depth int) structuralschema.Structural {
	s := structuralschema.Structural{Generic: structuralschema.Generic{Nullable: g.oneIn(4)}}
	kind := g.Intn(6)
	if depth == 0 {
		kind = 5
	}
	switch {
	case kind < 3:
		s.Type, s.Properties = "object", map[string]structuralschema.Structural{}
		for range g.Intn(4) {
			s.Properties[names[g.Intn(len(names))]] = g.schema(depth - 1)
		}
		s.XPreserveUnknownFields, s.XEmbeddedResource = g.oneIn(4), g.oneIn(12)
	case kind == 3:
		s.Type, s.AdditionalProperties = "object", &structuralschema.StructuralOrBool{Bool: true}
		if inner := g.schema(depth - 1); !g.oneIn(4) {
			s.AdditionalProperties = &structuralschema.StructuralOrBool{Structural: &inner}
		}
	case kind == 4:
		s.Type = "array"
		if inner := g.schema(depth - 1); !g.oneIn(6) {
			s.Items = &inner
		}
		s.XPreserveUnknownFields = g.oneIn(6)
	default:
		s.Type = "string"
	}
	if g.oneIn(4) {
		s.Default.Object = g.value(&s, depth)
	}
	return s
}

func (g generator) value(s *structuralschema.Structural, depth int) any {
	switch {
	case g.oneIn(40):
		return nil
	case s == nil || g.oneIn(30):
		return []any{"x", int64(1), true, map[string]any{"u": "v"}, []any{map[string]any{}}, []any{map[string]any{"u": "v"}}}[g.Intn(6)]
	case s.Type == "array":
		out := []any{}
		for range g.Intn(3) {
			out = append(out, g.value(s.Items, depth-1))
		}
		return out
	case s.Type != "object":
		return "x"
	}
	out := map[string]any{}
	for name := range s.Properties {
		if p := s.Properties[name]; !g.oneIn(4) {
			out[name] = g.value(&p, depth-1)
		}
	}
	if s.AdditionalProperties != nil {
		out["more"] = g.value(s.AdditionalProperties.Structural, depth-1)
	}
	if g.oneIn(30) {
		out["unknown"] = "x"
	}
	return out
}

// object makes a whole one.
func (g generator) object(s *structuralschema.Structural) map[string]any {
	out, ok := g.value(s, 3).(map[string]any)
	if !ok {
		out = map[string]any{}
	}
	out["apiVersion"], out["kind"] = "example.com/v1", "Ship"
	m := map[string]any{"name": "s", "generation": int64(1), "creationTimestamp": "2026-01-01T00:00:00Z", "uid": "u"}
	for _, odd := range []struct {
		name  string
		value any
	}{
		{"labels", map[string]any{"a": "b"}}, {"labels", map[string]any{}}, {"labels", map[string]any{"a": int64(1)}}, {"annotations", nil}, {"generation", int64(0)},
		{"creationTimestamp", "2026-01-01T01:00:00+01:00"}, {"deletionTimestamp", "2026-01-01T00:00:00.5Z"}, {"deletionTimestamp", "2026-13-01T00:00:00Z"}, {"creationTimestamp", nil},
		{"creationTimestamp", "0001-01-01T00:00:00Z"}, {"finalizers", []any{"f", ""}}, {"finalizers", []any{nil}}, {"deletionGracePeriodSeconds", int64(0)}, {"unknown", "x"}, {"namespace", ""}, {"uid", int64(1)},
		{"ownerReferences", []any{map[string]any{"apiVersion": "v1", "kind": "K", "name": "n", "uid": "", "controller": true}}}, {"ownerReferences", []any{map[string]any{"kind": "K"}}},
		{"ownerReferences", []any{map[string]any{"apiVersion": "v1", "kind": "K", "name": "n", "uid": "", "controller": nil}}},
		{"managedFields", []any{map[string]any{"manager": "m", "operation": "Update", "apiVersion": "v1", "time": "2026-01-01T00:00:00Z", "fieldsType": "FieldsV1", "fieldsV1": map[string]any{"f:a": map[string]any{}}}}},
		{"managedFields", []any{map[string]any{"manager": "", "fieldsV1": map[string]any{}}}}, {"managedFields", []any{map[string]any{"fieldsV1": nil}}}, {"managedFields", []any{map[string]any{"fieldsV1": "x"}}},
	} {
		if g.oneIn(25) {
			m[odd.name] = odd.value
		}
	}
	out["metadata"] = m
	return out
}

// read is what upstream makes of an object that it reads: unstructuredSchemaCoercer.apply and the defaults after it, in
// k8s.io/apiextensions-apiserver/pkg/apiserver/customresource_handler.go.
func read(t *testing.T, in map[string]any, s *structuralschema.Structural, drop bool) (map[string]any, bool) {
	t.Helper()
	obj := runtime.DeepCopyJSON(in)
	kind, version := obj["kind"], obj["apiVersion"]
	m, _, _, err := objectmeta.GetObjectMetaWithOptions(obj, objectmeta.ObjectMetaOptions{DropMalformedFields: drop})
	if err != nil {
		return nil, false
	}
	pruning.PruneWithOptions(obj, s, true, structuralschema.UnknownFieldPathOptions{})
	defaulting.PruneNonNullableNullsWithoutDefaults(obj, s)
	if err, _ := objectmeta.CoerceWithOptions(nil, obj, s, false, objectmeta.CoerceOptions{DropInvalidFields: drop}); err != nil {
		return nil, false
	}
	if drop && m.Generation == 0 {
		m.Generation = 1
	}
	obj["kind"], obj["apiVersion"] = kind, version
	require.NoError(t, objectmeta.SetObjectMeta(obj, m))
	defaulting.Default(obj, s)
	return obj, true
}

func root(g generator) structuralschema.Structural {
	for {
		if s := g.schema(3); s.Type == "object" && len(s.Properties) > 0 && s.Default.Object == nil {
			return s
		}
	}
}

// TestAsUpstream: what is said to stay as it is stays as it is, and what is completed becomes what upstream makes of it.
func TestAsUpstream(t *testing.T) {
	held, completed := 0, 0
	for seed := range 20_000 {
		g := generator{rand.New(rand.NewSource(int64(seed)))}
		s := root(g)
		schema := New(&s)
		for range 3 {
			obj := g.object(&s)
			before := runtime.DeepCopyJSON(obj)
			if schema.Holds(obj) {
				held++
				want, ok := read(t, obj, &s, true)
				require.True(t, ok)
				require.Equal(t, want, obj, "seed %d", seed)
			}
			require.Equal(t, before, obj, "seed %d: it was changed", seed)
			if schema.Complete(obj) && Metadata(obj["metadata"].(map[string]any)) {
				completed++
				want, ok := read(t, before, &s, false)
				require.True(t, ok)
				if _, dated := want["metadata"].(map[string]any)["creationTimestamp"].(string); !dated {
					delete(want["metadata"].(map[string]any), "creationTimestamp")
				}
				require.Equal(t, want, obj, "seed %d", seed)
			}
		}
	}
	t.Logf("%d of 60,000 are as read, %d after they are completed", held, completed)
	require.Greater(t, held, 3000)
	require.Greater(t, completed, 6000)
}

func TestOthersAreNotKnown(t *testing.T) {
	obj := map[string]any{"apiVersion": "example.com/v1", "kind": "Ship", "metadata": map[string]any{"name": "n"}}
	require.False(t, New(nil).Holds(obj))
	require.False(t, New(nil).Complete(obj))
	require.False(t, New(&structuralschema.Structural{}).Holds(map[string]any{"metadata": "x"}))
	require.False(t, Metadata(map[string]any{"name": ""}))
}
