package store

import (
	"math/rand/v2"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
)

// TestLabelSets takes and leaves sets at random: equal labels have one set, others another, and of what nobody uses nothing is left.
func TestLabelSets(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	var sets labelSets
	held := map[int]*LabelSet{}
	for range 5000 {
		i := random.IntN(50)
		var next *LabelSet
		if random.IntN(4) > 0 {
			labels := map[string]string{}
			for range random.IntN(3) {
				labels[strconv.Itoa(random.IntN(3))] = strconv.Itoa(random.IntN(3))
			}
			var obj runtime.Object = &metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{Labels: labels}}
			if random.IntN(3) == 0 {
				tree := &unstructured.Unstructured{Object: map[string]any{}}
				tree.SetLabels(labels)
				obj = tree
			}
			next = sets.take(obj, held[i])
			require.Equal(t, len(labels) == 0, next == nil)
			if next != nil {
				require.Equal(t, labels, next.Labels())
			}
		}
		sets.leave(held[i])
		held[i] = next
	}
	distinct := map[string]*LabelSet{}
	for _, set := range held {
		if set != nil {
			text := labelText(set.labels)
			require.True(t, distinct[text] == nil || distinct[text] == set, text)
			distinct[text] = set
		}
	}
	require.Len(t, sets.known, len(distinct))
	for _, set := range held {
		sets.leave(set)
	}
	require.Empty(t, sets.known)
}

func labelText(labels map[string]string) (out string) {
	for _, k := range []string{"0", "1", "2"} {
		if v, ok := labels[k]; ok {
			out += k + "=" + v + ","
		}
	}
	return out
}

// TestLabelSetsShare lets objects of equal labels have one map.
func TestLabelSetsShare(t *testing.T) {
	var sets labelSets
	a := &metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"a": "b"}}}
	b := &metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"a": "b"}}}
	require.Same(t, sets.take(a, nil), sets.take(b, nil))
	a.Labels["c"] = "d"
	require.Equal(t, a.Labels, b.Labels)
}

// TestLabelSetsCollide keeps sets apart that have the same hash.
func TestLabelSetsCollide(t *testing.T) {
	other := &LabelSet{labels: map[string]string{"x": "y"}, hash: hashLabels(map[string]string{"a": "b"})}
	sets := labelSets{known: map[uint64]*LabelSet{other.hash: other}}
	set := sets.take(&metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"a": "b"}}}, nil)
	require.Equal(t, map[string]string{"a": "b"}, set.Labels())
	sets.leave(set)
	require.Equal(t, map[uint64]*LabelSet{other.hash: other}, sets.known)
}
