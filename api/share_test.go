package api

import (
	"bytes"
	"fmt"
	"math/rand"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apiserver/pkg/storage/storagebackend"
	"k8s.io/kubernetes/pkg/apis/core"
	"sigs.k8s.io/randfill"
)

func TestShareFields(t *testing.T) {
	pod := func(fields string) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{ManagedFields: []metav1.ManagedFieldsEntry{{FieldsV1: metav1.NewFieldsV1(fields)}, {}}}}
		shareParts(p)
		require.Equal(t, fields, p.ManagedFields[0].FieldsV1.GetRawString())
		return p
	}
	at := func(p *corev1.Pod) *byte { return &p.ManagedFields[0].FieldsV1.GetRawBytes()[0] }
	a, b, c := pod(`{"f:spec":{}}`), pod(`{"f:spec":{}}`), pod(`{"f:status":{}}`)
	require.Same(t, at(a), at(b))
	require.NotSame(t, at(a), at(c))
	for i := range 2 * maxFieldSets {
		pod(fmt.Sprintf(`{"f:%d":{}}`, i))
	}
	require.LessOrEqual(t, len(sharedFields.known), maxFieldSets)
	large := string(make([]byte, maxFieldSetBytes+1))
	require.NotSame(t, at(pod(large)), at(pod(large)))
}

// filler makes objects at random, with short times and numbers that are written in several ways; sound ones have no empty lists and maps.
func filler(seed int64, sound bool) *randfill.Filler {
	r := rand.New(rand.NewSource(seed))
	least := 0
	if sound {
		least = 1
	}
	return randfill.NewWithSeed(seed).NilChance(0.5).NumElements(least, 2).MaxDepth(9).Funcs(
		func(t *metav1.Time, _ randfill.Continue) {
			t.Time = time.Unix(int64(r.Intn(3)), int64(r.Intn(2))).UTC()
		},
		func(t *metav1.MicroTime, _ randfill.Continue) {
			t.Time = time.Unix(int64(r.Intn(3)), int64(r.Intn(2))*1500).UTC()
		},
		func(q *resource.Quantity, _ randfill.Continue) {
			*q = resource.MustParse([]string{"1", "1.5m", "2Gi", "0.0000000001", "123456789012345678901234567890"}[r.Intn(5)])
		},
		func(i *intstr.IntOrString, _ randfill.Continue) { *i = intstr.FromInt32(int32(r.Intn(2))) },
		func(r *runtime.RawExtension, _ randfill.Continue) { r.Raw = []byte("{}") },
		func(f *metav1.FieldsV1, _ randfill.Continue) { f.SetRawString(`{"f:a":{}}`) })
}

// requireSame compares all that JSON shows of two objects, what is nil and what is empty, and their times; a number may be held in another way.
func requireSame(t *testing.T, want, got runtime.Object) {
	t.Helper()
	numbers := cmp.Comparer(func(a, b resource.Quantity) bool { return a.String() == b.String() && a.Format == b.Format })
	times := cmp.Comparer(func(a, b time.Time) bool { return a == b })
	require.Empty(t, cmp.Diff(want, got, numbers, times))
}

// TestShareNames: what is shared is bounded, and equal.
func TestShareNames(t *testing.T) {
	pod := func(i int) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: fmt.Sprint("space ", i), Labels: map[string]string{"app": fmt.Sprint(i), "tier": "a"}}}
		want := p.DeepCopy()
		shareParts(p)
		require.Equal(t, want, p)
		return p
	}
	a, b := pod(0), pod(0)
	require.Equal(t, unsafe.StringData(a.Namespace), unsafe.StringData(b.Namespace))
	for i := range 2 * maxNames {
		pod(i)
	}
	require.LessOrEqual(t, len(sharedNames.known), maxNames)
}

// TestSharePods: pods share what they have in common with one of the same image, and stay what they are.
func TestSharePods(t *testing.T) {
	fill := filler(1, true)
	stored := func(p *corev1.Pod) *corev1.Pod { // as bytes and back
		data, err := p.Marshal()
		require.NoError(t, err)
		out := &corev1.Pod{}
		require.NoError(t, out.Unmarshal(data))
		settle(out)
		return out
	}
	for i := range 300 {
		one, two := &corev1.Pod{}, &corev1.Pod{}
		fill.Fill(one)
		if i%3 == 0 {
			fill.Fill(two)
		} else {
			one.DeepCopyInto(two)
			two.Name = "another"
			for v := range two.Spec.Volumes {
				two.Spec.Volumes[v].Name += "-other"
			}
		}
		image := corev1.Container{Name: "c", Image: fmt.Sprint("image ", i), VolumeMounts: []corev1.VolumeMount{{Name: "v", MountPath: "/v"}}}
		one.Spec.Containers, two.Spec.Containers = append([]corev1.Container{image}, one.Spec.Containers...), append([]corev1.Container{image}, two.Spec.Containers...)
		one, two = stored(one), stored(two)
		wantOne, wantTwo := one.DeepCopy(), two.DeepCopy()
		for _, p := range []*corev1.Pod{one, two} {
			shareParts(p)
			sharePod(p)
		}
		require.Equal(t, wantOne, one)
		require.Equal(t, wantTwo, two)
		if i%3 != 0 && one.Spec.SecurityContext != nil {
			require.Same(t, one.Spec.SecurityContext, two.Spec.SecurityContext)
		}
		require.Same(t, &one.Spec.Containers[0].VolumeMounts[0], &two.Spec.Containers[0].VolumeMounts[0])
	}
	require.LessOrEqual(t, len(sharedSpecs.known), maxPodSpecs)
}

// TestReread: what is stored of an update is what decoding it gives, and shares its spec with the old pod where that stays.
func TestReread(t *testing.T) {
	kind := &Kind{}
	config := &storagebackend.ConfigForResource{GroupResource: schema.GroupResource{Resource: "pods"}}
	config.EncodeVersioner = corev1.SchemeGroupVersion
	require.NoError(t, bindScheme(kind, &tableCodec{}, config, &core.Pod{}))
	f := kind.form.(*hubForm)
	store := func(pod *corev1.Pod, old runtime.Object, final bool) (*corev1.Pod, []byte) {
		hub, err := f.scheme.ConvertToVersion(pod.DeepCopy(), f.hub)
		require.NoError(t, err)
		made, err := f.toStored(hub, old, final)
		require.NoError(t, err)
		return made.object.(*corev1.Pod), made.data
	}
	for i := range 200 {
		final := i%2 == 1
		fill := filler(int64(i), final)
		first, next := &corev1.Pod{}, &corev1.Pod{}
		fill.Fill(first)
		fill.Fill(next)
		old, _ := store(first, nil, final)
		before := old.DeepCopy()
		same := next.DeepCopy()
		same.Spec = *old.Spec.DeepCopy()
		want, wantData := store(same, nil, false)
		got, data := store(same, old, final)
		require.True(t, bytes.Equal(wantData, data), "pod %d", i)
		requireSame(t, want, got)
		require.Same(t, old.Spec.SecurityContext, got.Spec.SecurityContext)

		next.Spec.NodeName = old.Spec.NodeName + "-other"
		want, _ = store(next, nil, false)
		got, _ = store(next, old, final)
		requireSame(t, want, got)
		require.NotSame(t, old.Spec.SecurityContext, got.Spec.SecurityContext)
		got, _ = store(next, &corev1.ConfigMap{}, final)
		requireSame(t, want, got)
		require.Equal(t, before, old, "the old pod was changed")
	}
}

// TestEmbedded: only messages as our encoder makes them are taken apart.
func TestEmbedded(t *testing.T) {
	for name, tc := range map[string]struct {
		in   string
		want []string
	}{
		"two":       {"\x0a\x01a\x12\x02bc", []string{"a", "bc"}},
		"empty":     {"\x0a\x00", []string{""}},
		"skipped":   {"\x12\x01a", nil},
		"repeated":  {"\x0a\x01a\x0a\x01a", nil},
		"a number":  {"\x08\x01", nil},
		"cut short": {"\x0a\x02a", nil},
		"no tag":    {"\xff", nil},
	} {
		got, ok := embedded([]byte(tc.in))
		require.Equal(t, tc.want != nil, ok, name)
		for i := range tc.want {
			require.Equal(t, tc.want[i], string(got[i]), name)
		}
	}
}
