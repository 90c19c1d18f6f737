package patching

import (
	"encoding/json"
	"math/rand"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// randomTree is an object of JSON; nothings says that it may hold nulls.
func randomTree(r *rand.Rand, depth int, nothings bool) map[string]any {
	out := map[string]any{}
	for range r.Intn(4) {
		out[string('a'+rune(r.Intn(4)))] = randomValue(r, depth, nothings)
	}
	return out
}

func randomValue(r *rand.Rand, depth int, nothings bool) any {
	switch n := r.Intn(6); {
	case n < 2 && depth > 0:
		return randomTree(r, depth-1, nothings)
	case n == 2 && depth > 0:
		return []any{randomValue(r, depth-1, nothings), "x"}
	case n == 3 && nothings:
		return nil
	}
	return string('p' + rune(r.Intn(3)))
}

// TestMergeTrees merges generated trees as the library merges their text.
func TestMergeTrees(t *testing.T) {
	for seed := range 2000 {
		r := rand.New(rand.NewSource(int64(seed)))
		tree, patch := randomTree(r, 3, seed%7 == 0), randomTree(r, 3, seed%3 > 0)
		before, err := json.Marshal(tree)
		require.NoError(t, err)
		change, err := json.Marshal(patch)
		require.NoError(t, err)
		got := mergeTrees(tree, patch)
		after, err := json.Marshal(tree)
		require.NoError(t, err)
		require.Equal(t, string(before), string(after), "the tree was changed")
		want, err := jsonpatch.MergePatch(before, change)
		require.NoError(t, err)
		have, err := json.Marshal(got)
		require.NoError(t, err)
		require.JSONEq(t, string(want), string(have), "seed %d: %s and %s", seed, before, change)
	}
	require.False(t, isText(map[string]any{"a": []any{"b", "\xff"}}))
	require.False(t, isText(map[string]any{"\xff": "a"}))
	require.True(t, isText(map[string]any{"a": []any{"ö", int64(1), nil}}))
}

// TestMergePatches applies patches to a ConfigMap and a Secret, whose bytes go by the text.
func TestMergePatches(t *testing.T) {
	maps := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "m", Labels: map[string]string{"a": "b"}}, Data: map[string]string{"k": "v", "l": "\xff"}}
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "s"}, Data: map[string][]byte{"k": []byte("v")}, Type: "Opaque"}
	for patch, want := range map[string]map[string]string{
		`{"data":{"k":"w"}}`:           {"k": "w", "l": "\ufffd"},
		`{"data":{"l":null}}`:          {"k": "v"},
		`{"data":{"l":null,"k":null}}`: {},
		`{"data":null}`:                nil,
	} {
		got, ok := Apply(maps, types.MergePatchType, []byte(patch))
		require.True(t, ok, patch)
		require.Equal(t, want, got.(*corev1.ConfigMap).Data, patch)
		require.Equal(t, maps.Labels, got.(*corev1.ConfigMap).Labels, patch)
	}
	got, ok := Apply(secret, types.MergePatchType, []byte(`{"data":{"l":"dw=="}}`))
	require.True(t, ok)
	require.Equal(t, map[string][]byte{"k": []byte("v"), "l": []byte("w")}, got.(*corev1.Secret).Data)
	for _, patch := range []string{`{"data":{"k":1}}`, `{"data":["k"]}`, `{"data":{"k":{}}}`, `{"data":"k"}`, `{"dat":{}}`, `{"data":{},"data":{}}`, `{"kind":"ConfigMap"}`} {
		_, ok := Apply(maps, types.MergePatchType, []byte(patch))
		require.False(t, ok, patch)
	}
}

func BenchmarkMerge(b *testing.B) {
	m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "m", Namespace: "n"}, Data: map[string]string{"key": strings.Repeat("x", 200), "other": "1"}}
	patch := []byte(`{"data":{"other":"2"}}`)
	b.ReportAllocs()
	for b.Loop() {
		_, ok := Apply(m, types.MergePatchType, patch)
		require.True(b, ok)
	}
}
