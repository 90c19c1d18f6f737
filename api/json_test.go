package api

import (
	"encoding/json"
	"math"
	"math/rand"
	"testing"

	"github.com/stretchr/testify/require"
)

func anyTree(r *rand.Rand, depth int) any {
	switch n := r.Intn(9); {
	case n < 5 || depth == 0:
		return []any{nil, true, false, int64(0), int64(math.MinInt64), r.Int63(), 1.5, 0.0, math.Copysign(0, -1), 1e-7, 1e21, -1e300, 123456789.125, float32(1), 7,
			"", "plain", "<&>", "\u2028é\n\t\"\\\x00\x7f", "\xff", []string{"a"}, map[string]string{"b": "<"}, []any(nil), map[string]any(nil)}[r.Intn(24)]
	case n == 5:
		out := []any{}
		for range r.Intn(4) {
			out = append(out, anyTree(r, depth-1))
		}
		return out
	}
	out := map[string]any{}
	for range r.Intn(6) {
		out[[]string{"b", "a", "ü", "<", "", "Z", "f:metadata", `k:{"name":"x"}`, "\xff"}[r.Intn(9)]] = anyTree(r, depth-1)
	}
	return out
}

// TestTreesAsTheLibrary encodes generated trees, ours and by encoding/json.
func TestTreesAsTheLibrary(t *testing.T) {
	for seed := range 20_000 {
		tree := anyTree(rand.New(rand.NewSource(int64(seed))), 4)
		want, err := json.Marshal(tree)
		require.NoError(t, err)
		got, err := encodeTree(tree, "\n")
		require.NoError(t, err)
		require.Equal(t, string(want)+"\n", string(got), "seed %d", seed)
	}
	for _, bad := range []any{math.NaN(), []any{math.Inf(1)}, map[string]any{"a": func() {}}} {
		_, err := encodeTree(bad, "")
		require.Error(t, err)
	}
}

func BenchmarkEncodeTree(b *testing.B) {
	var tree any
	require.NoError(b, json.Unmarshal([]byte(`{"apiVersion":"bench.example.com/v1","kind":"Gadget","metadata":{"creationTimestamp":"2026-01-01T00:00:00Z","generation":1,"labels":{"app":"bench","shard":"1"},
"managedFields":[{"apiVersion":"bench.example.com/v1","fieldsType":"FieldsV1","fieldsV1":{"f:metadata":{"f:labels":{".":{},"f:app":{},"f:shard":{}}},"f:spec":{".":{},"f:color":{},"f:level":{},"f:parts":{},"f:size":{}}},
"manager":"apibench","operation":"Update","time":"2026-01-01T00:00:00Z"}],"name":"g-000001","namespace":"bench","uid":"0"},"spec":{"color":"green","level":3,"parts":["a","b"],"size":2}}`), &tree))
	b.Run("library", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_, _ = json.Marshal(tree)
		}
	})
	b.Run("ours", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_, _ = encodeTree(tree, "")
		}
	})
}
