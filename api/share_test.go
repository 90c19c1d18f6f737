package api

import (
	"fmt"
	"math/rand"
	"testing"
	"time"

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
		shareFields(p)
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

// TestReread: what is stored of an update is what decoding it gives, and shares its spec with the old pod where that stays.
func TestReread(t *testing.T) {
	kind := &Kind{}
	config := &storagebackend.ConfigForResource{GroupResource: schema.GroupResource{Resource: "pods"}}
	config.EncodeVersioner = corev1.SchemeGroupVersion
	require.NoError(t, bindScheme(kind, &tableCodec{}, config, &core.Pod{}))
	f := kind.form.(*hubForm)
	store := func(pod *corev1.Pod, old runtime.Object) (*corev1.Pod, []byte) {
		hub, err := f.scheme.ConvertToVersion(pod.DeepCopy(), f.hub)
		require.NoError(t, err)
		stored, data, err := f.toStored(hub, old)
		require.NoError(t, err)
		return stored.(*corev1.Pod), data
	}
	r := rand.New(rand.NewSource(1))
	fill := randfill.NewWithSeed(1).NilChance(0.5).NumElements(0, 2).MaxDepth(9).Funcs(
		func(t *metav1.Time, _ randfill.Continue) {
			t.Time = time.Unix(int64(r.Intn(3)), int64(r.Intn(2))).UTC()
		},
		func(q *resource.Quantity, _ randfill.Continue) {
			*q = resource.MustParse([]string{"1", "1.5m", "2Gi"}[r.Intn(3)])
		},
		func(i *intstr.IntOrString, _ randfill.Continue) { *i = intstr.FromInt32(int32(r.Intn(2))) },
		func(f *metav1.FieldsV1, _ randfill.Continue) { f.SetRawString(`{"f:a":{}}`) })
	for i := range 100 {
		first, next := &corev1.Pod{}, &corev1.Pod{}
		fill.Fill(first)
		fill.Fill(next)
		old, _ := store(first, nil)
		before := old.DeepCopy()
		same := next.DeepCopy()
		same.Spec = *old.Spec.DeepCopy()
		want, wantData := store(same, nil)
		got, data := store(same, old)
		require.Equal(t, wantData, data)
		require.Equal(t, want, got, "pod %d", i)
		require.Same(t, old.Spec.SecurityContext, got.Spec.SecurityContext)

		next.Spec.NodeName = old.Spec.NodeName + "-other"
		want, _ = store(next, nil)
		got, _ = store(next, old)
		require.Equal(t, want, got, "pod %d", i)
		require.NotSame(t, old.Spec.SecurityContext, got.Spec.SecurityContext)
		got, _ = store(next, &corev1.ConfigMap{})
		require.Equal(t, want, got, "pod %d", i)
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
