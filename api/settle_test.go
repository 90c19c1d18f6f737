package api

import (
	"bytes"
	"maps"
	"slices"
	"strconv"
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

// TestSettle: of every type that is stored as protobuf, an object at random that can be settled is then what reading its encoding gives, and its
// encoding with a resource version is made of the one without.
func TestSettle(t *testing.T) {
	const each = 40
	scheme := legacyscheme.Scheme
	s := protobuf.NewSerializer(scheme, scheme)
	encode := encoder(s)
	settled, revisions, types := 0, 0, 0
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
			got, err := encode(obj)
			require.NoError(t, err, gvk)
			require.True(t, bytes.Equal(data.Bytes(), got), gvk)
			if checkRevised(t, encode, obj, int64(1)<<(i%63)) {
				revisions++
			}
		}
	}
	t.Logf("%d of %d objects of %d types are settled, %d have their bytes revised", settled, types*each, types, revisions)
	require.Greater(t, settled, types*each/4)
	require.Greater(t, revisions, settled/3)
}

// checkRevised compares an object's bytes at a revision with those that are made of its stored ones; false where they cannot be.
func checkRevised(t *testing.T, encode func(runtime.Object) ([]byte, error), obj runtime.Object, revision int64) bool {
	acc, err := meta.Accessor(obj)
	require.NoError(t, err)
	acc.SetResourceVersion("")
	data, err := encode(obj)
	require.NoError(t, err)
	kept := bytes.Clone(data)
	got := revised(ownBytes(data), revision)
	require.True(t, bytes.Equal(kept, data), "the stored bytes were changed")
	acc.SetResourceVersion(strconv.FormatInt(revision, 10))
	want, err := obj.(interface{ Marshal() ([]byte, error) }).Marshal()
	require.NoError(t, err)
	if got == nil {
		return false
	}
	require.True(t, bytes.Equal(want, got), "%T", obj)
	again, err := encode(obj)
	require.NoError(t, err)
	require.Nil(t, revised(ownBytes(again), revision), "it has a revision")
	return true
}

// TestRevisedBroken: bytes that our encoder does not make are left alone.
func TestRevisedBroken(t *testing.T) {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "a name"}}
	data, err := pod.Marshal()
	require.NoError(t, err)
	require.NotNil(t, revised(data, 1))
	for cut := range 20 { // the metadata are longer
		require.Nil(t, revised(data[:cut], 1), cut)
	}
	for name, in := range map[string]string{
		"nothing": "", "a number": "\x08\x01", "other field": "\x12\x00", "no version": "\x0a\x00", "six other fields": "\x0a\x0c\x0a\x00\x12\x00\x1a\x00\x22\x00\x2a\x00\x3a\x00",
	} {
		require.Nil(t, revised([]byte(in), 1), name)
	}
	require.Nil(t, ownBytes([]byte("k8s\x00\x0a\x00")), "no object")
	require.Nil(t, ownBytes([]byte("{}")))
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
