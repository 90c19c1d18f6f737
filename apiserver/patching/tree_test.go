package patching

import (
	"encoding/json"
	"math/rand"
	"testing"

	"github.com/stretchr/testify/require"
	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	"k8s.io/apimachinery/pkg/runtime"
	kjson "sigs.k8s.io/json"
)

// jsonValue is any value of JSON.
func jsonValue(r *rand.Rand, depth int) any {
	switch n := r.Intn(8); {
	case n == 0:
		return nil
	case n < 5 || depth == 0:
		return []any{"x", int64(1), 1.5, true, "<&>", ""}[r.Intn(6)]
	case n == 5:
		out := []any{}
		for range r.Intn(3) {
			out = append(out, jsonValue(r, depth-1))
		}
		return out
	}
	out := map[string]any{}
	for range r.Intn(4) {
		out[[]string{"a", "b", "metadata"}[r.Intn(3)]] = jsonValue(r, depth-1)
	}
	return out
}

// TestTreesAsUpstream merges generated trees, ours and by upstream's library.
func TestTreesAsUpstream(t *testing.T) {
	for seed := range 20_000 {
		r := rand.New(rand.NewSource(int64(seed)))
		obj, isTree := jsonValue(r, 4).(map[string]any)
		patch, isPatch := jsonValue(r, 4).(map[string]any)
		if !isTree || !isPatch {
			continue
		}
		before := runtime.DeepCopyJSON(obj)
		data, err := json.Marshal(patch)
		require.NoError(t, err)
		got, ok := MergeTree(obj, data)
		require.True(t, ok, "seed %d", seed)
		require.Equal(t, before, obj, "seed %d: the object was changed", seed)
		doc, err := json.Marshal(obj)
		require.NoError(t, err)
		merged, err := jsonpatch.MergePatch(doc, data)
		require.NoError(t, err)
		want := map[string]any{}
		require.NoError(t, kjson.UnmarshalCaseSensitivePreserveInts(merged, &want))
		require.Equal(t, want, got, "seed %d, %s patched with %s", seed, doc, data)
	}
	for _, patch := range []string{`[]`, `null`, `{`, ``, `{"a":1,"a":2}`, `{"a":1.0}`, `{"a":[{"b":2e3}]}`, `{"a":92233720368547758070}`, `"x"`} {
		_, ok := MergeTree(map[string]any{}, []byte(patch))
		require.False(t, ok, patch)
	}
}
