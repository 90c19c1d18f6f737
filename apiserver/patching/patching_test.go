package patching

import (
	"encoding/json"
	"math/rand"
	"reflect"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	flowcontrolv1 "k8s.io/api/flowcontrol/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	schedulingv1 "k8s.io/api/scheduling/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	kjson "sigs.k8s.io/json"
	"sigs.k8s.io/randfill"
)

// upstreams patches as upstream's handler does: the whole object as a tree, or as text.
func upstreams(t *testing.T, obj runtime.Object, kind types.PatchType, patch []byte) runtime.Object {
	t.Helper()
	out := reflect.New(reflect.TypeOf(obj).Elem()).Interface().(runtime.Object)
	if kind == types.MergePatchType {
		data, err := json.Marshal(obj)
		require.NoError(t, err)
		data, err = jsonpatch.MergePatch(data, patch)
		require.NoError(t, err)
		require.NoError(t, json.Unmarshal(data, out))
		return out
	}
	tree, err := runtime.DefaultUnstructuredConverter.ToUnstructured(obj)
	require.NoError(t, err)
	patchTree := map[string]any{}
	require.NoError(t, kjson.UnmarshalCaseSensitivePreserveInts(patch, &patchTree))
	tree, err = strategicpatch.StrategicMergeMapPatch(tree, patchTree, out)
	require.NoError(t, err)
	require.NoError(t, runtime.DefaultUnstructuredConverter.FromUnstructured(tree, out))
	return out
}

// stored is an object as it is stored.
func stored(t *testing.T, obj runtime.Object) string {
	t.Helper()
	data, err := obj.(interface{ Marshal() ([]byte, error) }).Marshal()
	require.NoError(t, err)
	return string(data)
}

func filler(r *rand.Rand) *randfill.Filler {
	return randfill.NewWithSeed(r.Int63()).NilChance(0.6).NumElements(0, 3).MaxDepth(9).Funcs(
		func(s *string, _ randfill.Continue) { *s = []string{"a", "b", "c", "d", "e", "f"}[r.Intn(6)] },
		func(i *int64, _ randfill.Continue) { *i = int64(r.Intn(9)) },
		func(t *metav1.Time, _ randfill.Continue) { t.Time = time.Unix(int64(r.Intn(3)), 0).Local() },
		func(q *resource.Quantity, _ randfill.Continue) {
			*q = resource.MustParse([]string{"1", "500m", "2Gi"}[r.Intn(3)])
		},
		func(i *intstr.IntOrString, _ randfill.Continue) { *i = intstr.FromInt32(int32(r.Intn(2))) },
		func(f *metav1.FieldsV1, _ randfill.Continue) { f.SetRawString(`{"f:a":{}}`) },
		func(m *metav1.TypeMeta, _ randfill.Continue) {},
	)
}

// examples are of the kinds whose patches are generated.
var examples = []runtime.Object{
	&corev1.Pod{}, &corev1.ConfigMap{}, &corev1.Node{}, &corev1.Service{}, &corev1.ServiceAccount{}, &corev1.ResourceQuota{}, &corev1.LimitRange{}, &corev1.PersistentVolumeClaim{},
	&appsv1.Deployment{}, &appsv1.StatefulSet{}, &appsv1.DaemonSet{}, &batchv1.Job{}, &batchv1.CronJob{}, &autoscalingv2.HorizontalPodAutoscaler{},
	&networkingv1.Ingress{}, &networkingv1.NetworkPolicy{}, &policyv1.PodDisruptionBudget{}, &rbacv1.ClusterRole{}, &rbacv1.RoleBinding{}, &schedulingv1.PriorityClass{},
	&flowcontrolv1.FlowSchema{}, &flowcontrolv1.PriorityLevelConfiguration{},
}

// TestAsUpstream makes the patch from one generated object to another and applies it to a third.
func TestAsUpstream(t *testing.T) {
	for _, example := range examples {
		for _, kind := range []types.PatchType{types.StrategicMergePatchType, types.MergePatchType} {
			t.Run(reflect.TypeOf(example).String()+string(kind), func(t *testing.T) {
				known := 0
				for seed := range 60 {
					r := rand.New(rand.NewSource(int64(seed)))
					f := filler(r)
					var objs [3]runtime.Object
					for i := range objs {
						objs[i] = example.DeepCopyObject()
						f.Fill(objs[i])
					}
					patch, ok := between(t, kind, objs[0], objs[1])
					if !ok {
						continue
					}
					live := objs[r.Intn(2)*2] // the one that the patch was made from, or another
					before := live.DeepCopyObject()
					got, ok := Apply(live, kind, patch)
					require.Equal(t, before, live, "the object was changed")
					if !ok {
						continue
					}
					known++
					want := stored(t, upstreams(t, live, kind, patch))
					require.Equal(t, want, stored(t, got), "seed %d, patch %s", seed, patch)
					if reflect.ValueOf(live).Elem().FieldByName("Spec").IsValid() {
						got, ok := Apply(live, kind, patch, "Spec")
						require.True(t, ok)
						require.Equal(t, before, live, "the object was changed")
						require.Equal(t, want, stored(t, got), "seed %d, patch %s, sharing the spec", seed, patch)
					}
				}
				t.Logf("%d of 60 patches are known", known)
				require.Greater(t, known, 15)
			})
		}
	}
}

func between(t *testing.T, kind types.PatchType, a, b runtime.Object) ([]byte, bool) {
	t.Helper()
	before, err := json.Marshal(a)
	require.NoError(t, err)
	after, err := json.Marshal(b)
	require.NoError(t, err)
	if kind == types.MergePatchType {
		patch, err := jsonpatch.CreateMergePatch(before, after)
		return patch, err == nil
	}
	patch, err := strategicpatch.CreateTwoWayMergePatch(before, after, a)
	return patch, err == nil
}

func TestRefused(t *testing.T) {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p"}, Status: corev1.PodStatus{Phase: "Running", Conditions: []corev1.PodCondition{{Type: "Ready"}}}}
	for _, patch := range []string{
		`{"status":{"phas":"x"}}`, `{"status":{"phase":1}}`, `{"status":{"phase":"a","phase":"b"}}`, `{"nothing":1}`, `{"status":null}`,
		`{"$patch":"replace","status":{}}`, `{"status":{"$retainKeys":["phase"],"phase":"x"}}`, `{"kind":"Pod"}`, `[]`, `{`, ``,
		`{"status":{"conditions":[{"status":"True"}]}}`,
	} {
		got, ok := Apply(pod, types.StrategicMergePatchType, []byte(patch))
		require.False(t, ok, "%s gave %v", patch, got)
	}
}

func BenchmarkApply(b *testing.B) {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p"}, Status: corev1.PodStatus{Phase: "Running",
		Conditions: []corev1.PodCondition{{Type: "Ready", Status: "False"}, {Type: "Initialized", Status: "True"}}}}
	patch := []byte(`{"status":{"phase":"Running","message":"m","conditions":[{"type":"Ready","status":"True"}]}}`)
	b.ReportAllocs()
	for b.Loop() {
		_, ok := Apply(pod, types.StrategicMergePatchType, patch)
		require.True(b, ok)
	}
}

// TestFill reads trees of generated objects, which it has to know, and such as do not fit, which it has to leave to upstream's converter.
func TestFill(t *testing.T) {
	for seed := range 100 {
		pod, got := &corev1.Pod{}, &corev1.Pod{}
		filler(rand.New(rand.NewSource(int64(seed)))).Fill(pod)
		tree, err := runtime.DefaultUnstructuredConverter.ToUnstructured(pod)
		require.NoError(t, err)
		require.True(t, fill(reflect.ValueOf(got).Elem(), tree), "seed %d", seed)
		want := &corev1.Pod{}
		require.NoError(t, runtime.DefaultUnstructuredConverter.FromUnstructuredWithValidation(tree, want, true))
		require.Equal(t, want, got)
	}
	for _, tree := range []map[string]any{
		{"nothing": "x"}, {"spec": "x"}, {"spec": []any{}}, {"spec": map[string]any{"hostNetwork": "true"}}, {"spec": map[string]any{"priority": int64(1 << 40)}},
		{"spec": map[string]any{"priority": 1.0}}, {"metadata": map[string]any{"labels": map[string]any{"a": int64(1)}}}, {"status": map[string]any{"startTime": "x"}},
		{"spec": map[string]any{"containers": map[string]any{}}}, {"status": map[string]any{"phase": true}},
	} {
		require.False(t, fill(reflect.ValueOf(&corev1.Pod{}).Elem(), tree), "%v", tree)
	}
}
