package api

import (
	"bytes"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
)

// TestSettle: of every type that is stored as protobuf, an object at random that can be settled is then what reading its encoding gives.
func TestSettle(t *testing.T) {
	const each = 40
	scheme := legacyscheme.Scheme
	s := protobuf.NewSerializer(scheme, scheme)
	settled, types := 0, 0
	for _, gvk := range slices.SortedFunc(maps.Keys(scheme.AllKnownTypes()), func(a, b schema.GroupVersionKind) int { return strings.Compare(a.String(), b.String()) }) {
		example, err := scheme.New(gvk)
		require.NoError(t, err)
		if _, err := meta.Accessor(example); err != nil || gvk.Version == runtime.APIVersionInternal {
			continue
		}
		types++
		for i := range each {
			obj, err := scheme.New(gvk)
			require.NoError(t, err)
			filler(int64(i), i%2 > 0).Fill(obj)
			obj.GetObjectKind().SetGroupVersionKind(gvk)
			if !settle(obj) {
				continue
			}
			settled++
			var data bytes.Buffer
			require.NoError(t, s.Encode(obj, &data), gvk)
			read, _, err := s.Decode(data.Bytes(), nil, nil)
			require.NoError(t, err, gvk)
			read.GetObjectKind().SetGroupVersionKind(gvk)
			requireSame(t, read, obj)
		}
	}
	t.Logf("%d of %d objects of %d types are settled", settled, types*each, types)
	require.Greater(t, settled, types*each/4)
}

// TestSettleFinds names what reading an encoding would change.
func TestSettleFinds(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 6, time.FixedZone("x", 3600))
	pod := func(change func(*corev1.Pod)) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{CreationTimestamp: metav1.Time{Time: at}}, Spec: corev1.PodSpec{Containers: []corev1.Container{{}}}}
		p.Kind = "Pod"
		change(p)
		return p
	}
	for name, obj := range map[string]runtime.Object{
		"type inside": &corev1.PersistentVolumeClaimList{Items: []corev1.PersistentVolumeClaim{{TypeMeta: metav1.TypeMeta{Kind: "x"}}}},
		"no number":   pod(func(p *corev1.Pod) { p.Spec.Overhead = corev1.ResourceList{"cpu": resource.Quantity{}} }),
		"large number": pod(func(p *corev1.Pod) {
			p.Spec.Overhead = corev1.ResourceList{"cpu": resource.MustParse("123456789012345678901234567890")}
		}),
		"bytes of nothing": &corev1.ConfigMap{BinaryData: map[string][]byte{"a": nil}},
		"object inside":    &metav1.WatchEvent{Object: runtime.RawExtension{Object: &corev1.Pod{}}},
		"nothing":          (*corev1.Pod)(nil),
	} {
		require.False(t, settle(obj), name)
	}
	sound := pod(func(p *corev1.Pod) {
		p.Labels, p.Annotations = map[string]string{"a": "b"}, map[string]string{}
		p.Spec.Containers[0].Env = []corev1.EnvVar{}
		p.Spec.Overhead = corev1.ResourceList{}
	})
	require.True(t, settle(sound))
	require.Nil(t, sound.Annotations)
	require.Nil(t, sound.Spec.Containers[0].Env)
	require.Nil(t, sound.Spec.Overhead)
	require.Equal(t, time.Unix(at.Unix(), 0).Local(), sound.CreationTimestamp.Time)
}

func BenchmarkSettle(b *testing.B) {
	pod := &corev1.Pod{}
	for seed := int64(1); ; seed++ {
		*pod = corev1.Pod{}
		if filler(seed, true).Fill(pod); settle(pod) {
			break
		}
	}
	b.ReportAllocs()
	for b.Loop() {
		settle(pod)
	}
}
