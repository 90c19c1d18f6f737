package ownership

import (
	"fmt"
	"math/rand"
	"os"
	"reflect"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	batchv1 "k8s.io/api/batch/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	flowcontrolv1 "k8s.io/api/flowcontrol/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	schedulingv1 "k8s.io/api/scheduling/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/managedfields"
	"k8s.io/client-go/applyconfigurations"
	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/randfill"
	"sigs.k8s.io/structured-merge-diff/v6/fieldpath"
	"sigs.k8s.io/structured-merge-diff/v6/typed"
)

// pairOf is our manager and upstream's, of the same resource.
type pairOf struct {
	ours     *Manager
	upstream *managedfields.FieldManager
}

func newPair(t testing.TB, gvk schema.GroupVersionKind, subresource string, reset *fieldpath.Set) pairOf {
	t.Helper()
	example, err := scheme.Scheme.New(gvk)
	require.NoError(t, err)
	example.GetObjectKind().SetGroupVersionKind(gvk)
	types := applyconfigurations.NewTypeConverter(scheme.Scheme)
	value, err := types.ObjectToTyped(example, typed.AllowDuplicates)
	require.NoError(t, err)
	ours, err := New(example, value, gvk.GroupVersion(), subresource, reset)
	require.NoError(t, err)
	var filters map[fieldpath.APIVersion]fieldpath.Filter
	if reset != nil {
		filters = fieldpath.NewExcludeFilterSetMap(map[fieldpath.APIVersion]*fieldpath.Set{fieldpath.APIVersion(gvk.GroupVersion().String()): reset})
	}
	upstream, err := managedfields.NewDefaultFieldManager(types, runtime.UnsafeObjectConvertor(scheme.Scheme), scheme.Scheme, scheme.Scheme, gvk,
		gvk.GroupVersion(), subresource, filters)
	require.NoError(t, err)
	return pairOf{ours, upstream}
}

// names that lists are indexed by are few, so that two objects have some in common.
func filler(r *rand.Rand) *randfill.Filler {
	word := func() string {
		return []string{"a", "b", "bc", "bC", "d.e/f", "TCP", "zz-1", "", "10.0.0.1", "Ready", "x,y", "k:{", "12", "true"}[r.Intn(14)]
	}
	return randfill.NewWithSeed(r.Int63()).NilChance(0.6).NumElements(0, 3).MaxDepth(12).Funcs(
		func(s *string, _ randfill.Continue) { *s = word() },
		func(i *int32, _ randfill.Continue) { *i = int32(r.Intn(12)) - 1 },
		func(i *int64, _ randfill.Continue) { *i = int64(r.Intn(4)) },
		func(t *metav1.Time, _ randfill.Continue) { t.Time = time.Unix(int64(r.Intn(3)), int64(r.Intn(2))) },
		func(t *metav1.MicroTime, _ randfill.Continue) { t.Time = time.Unix(1, int64(r.Intn(3)*700)) },
		func(q *resource.Quantity, _ randfill.Continue) {
			*q = resource.MustParse([]string{"1", "1000m", "2Gi", "0"}[r.Intn(4)])
		},
		func(i *intstr.IntOrString, _ randfill.Continue) {
			*i = []intstr.IntOrString{intstr.FromInt32(1), intstr.FromString("1"), intstr.FromString("x")}[r.Intn(3)]
		},
		func(f *metav1.ManagedFieldsEntry, _ randfill.Continue) {},
		func(f *[]metav1.ManagedFieldsEntry, _ randfill.Continue) { *f = nil },
		func(m *metav1.TypeMeta, _ randfill.Continue) {},
		func(r *runtime.RawExtension, _ randfill.Continue) {},
	)
}

func accessor(t testing.TB, obj runtime.Object) metav1.Object {
	acc, err := meta.Accessor(obj)
	require.NoError(t, err)
	return acc
}

// mutate fills some fields of an object anew.
func mutate(r *rand.Rand, f *randfill.Filler, v reflect.Value) {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			mutate(r, f, v.Elem())
		}
	case reflect.Struct:
		if special[v.Type()] != opaque {
			f.Fill(v.Addr().Interface())
			return
		}
		for i := range v.NumField() {
			field := v.Field(i)
			if !field.CanSet() || v.Type().Field(i).Name == "TypeMeta" || v.Type().Field(i).Name == "ManagedFields" {
				continue
			}
			if r.Intn(8) == 0 {
				f.Fill(field.Addr().Interface())
			} else {
				mutate(r, f, field)
			}
		}
	case reflect.Slice:
		for i := range v.Len() {
			if r.Intn(2) == 0 {
				mutate(r, f, v.Index(i))
			}
		}
	}
}

// reword replaces what was filled into texts of named types, which the filler's own functions do not reach.
func reword(r *rand.Rand, v reflect.Value) {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			reword(r, v.Elem())
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Field(i).CanSet() && special[v.Type()] == opaque {
				reword(r, v.Field(i))
			}
		}
	case reflect.Slice:
		for i := range v.Len() {
			reword(r, v.Index(i))
		}
	case reflect.String:
		if s := v.String(); !plain(s) {
			v.SetString([]string{"", "TCP", "UDP", "Ready", "x"}[r.Intn(5)])
		}
	}
}

var resources = []struct {
	gvk         schema.GroupVersionKind
	subresource string
	reset       *fieldpath.Set
}{
	{corev1.SchemeGroupVersion.WithKind("Pod"), "", fieldpath.NewSet(fieldpath.MakePathOrDie("status"))},
	{corev1.SchemeGroupVersion.WithKind("Pod"), "status", fieldpath.NewSet(fieldpath.MakePathOrDie("spec"), fieldpath.MakePathOrDie("metadata", "deletionTimestamp"))},
	{corev1.SchemeGroupVersion.WithKind("ConfigMap"), "", nil},
	{corev1.SchemeGroupVersion.WithKind("Secret"), "", nil},
	{corev1.SchemeGroupVersion.WithKind("Service"), "", fieldpath.NewSet(fieldpath.MakePathOrDie("status"))},
	{corev1.SchemeGroupVersion.WithKind("Node"), "status", fieldpath.NewSet(fieldpath.MakePathOrDie("spec"))},
	{corev1.SchemeGroupVersion.WithKind("Event"), "", nil},
	{corev1.SchemeGroupVersion.WithKind("Namespace"), "", fieldpath.NewSet(fieldpath.MakePathOrDie("status"))},
	{corev1.SchemeGroupVersion.WithKind("PersistentVolumeClaim"), "", fieldpath.NewSet(fieldpath.MakePathOrDie("status"))},
	{appsv1.SchemeGroupVersion.WithKind("Deployment"), "", fieldpath.NewSet(fieldpath.MakePathOrDie("status"))},
	{appsv1.SchemeGroupVersion.WithKind("ReplicaSet"), "status", fieldpath.NewSet(fieldpath.MakePathOrDie("spec"))},
	{appsv1.SchemeGroupVersion.WithKind("StatefulSet"), "", fieldpath.NewSet(fieldpath.MakePathOrDie("status"))},
	{batchv1.SchemeGroupVersion.WithKind("Job"), "", fieldpath.NewSet(fieldpath.MakePathOrDie("status"))},
	{coordinationv1.SchemeGroupVersion.WithKind("Lease"), "", nil},
	{discoveryv1.SchemeGroupVersion.WithKind("EndpointSlice"), "", nil},
	{networkingv1.SchemeGroupVersion.WithKind("Ingress"), "", fieldpath.NewSet(fieldpath.MakePathOrDie("status"))},
	{rbacv1.SchemeGroupVersion.WithKind("Role"), "", nil},
	{rbacv1.SchemeGroupVersion.WithKind("RoleBinding"), "", nil},
	{rbacv1.SchemeGroupVersion.WithKind("ClusterRole"), "", nil},
	{rbacv1.SchemeGroupVersion.WithKind("ClusterRoleBinding"), "", nil},
	{schedulingv1.SchemeGroupVersion.WithKind("PriorityClass"), "", nil},
	{flowcontrolv1.SchemeGroupVersion.WithKind("FlowSchema"), "", fieldpath.NewSet(fieldpath.MakePathOrDie("status"))},
	{flowcontrolv1.SchemeGroupVersion.WithKind("PriorityLevelConfiguration"), "", fieldpath.NewSet(fieldpath.MakePathOrDie("status"))},
	{corev1.SchemeGroupVersion.WithKind("ServiceAccount"), "", nil},
	{corev1.SchemeGroupVersion.WithKind("LimitRange"), "", nil},
	{corev1.SchemeGroupVersion.WithKind("ResourceQuota"), "", fieldpath.NewSet(fieldpath.MakePathOrDie("status"))},
	{corev1.SchemeGroupVersion.WithKind("Node"), "", fieldpath.NewSet(fieldpath.MakePathOrDie("status"))},
	{appsv1.SchemeGroupVersion.WithKind("DaemonSet"), "", fieldpath.NewSet(fieldpath.MakePathOrDie("status"))},
	{batchv1.SchemeGroupVersion.WithKind("CronJob"), "", fieldpath.NewSet(fieldpath.MakePathOrDie("status"))},
	{autoscalingv2.SchemeGroupVersion.WithKind("HorizontalPodAutoscaler"), "", fieldpath.NewSet(fieldpath.MakePathOrDie("status"))},
	{networkingv1.SchemeGroupVersion.WithKind("NetworkPolicy"), "", nil},
	{policyv1.SchemeGroupVersion.WithKind("PodDisruptionBudget"), "", fieldpath.NewSet(fieldpath.MakePathOrDie("status"))},
}

// rounds is how many objects of a kind are generated; KNARR_FUZZ_ROUNDS makes it more.
func rounds() int {
	if n, err := strconv.Atoi(os.Getenv("KNARR_FUZZ_ROUNDS")); err == nil {
		return n
	}
	return 30
}

// TestAsUpstream lets several managers write generated objects, ours and upstream's side by side.
func TestAsUpstream(t *testing.T) {
	for _, res := range resources {
		t.Run(res.gvk.Kind+res.subresource, func(t *testing.T) {
			p := newPair(t, res.gvk, res.subresource, res.reset)
			plainly := newPair(t, res.gvk, "", nil)
			known, all := 0, 0
			for seed := range rounds() {
				r := rand.New(rand.NewSource(int64(seed)))
				k, n := history(t, r, p, plainly, res.gvk)
				known, all = known+k, all+n
			}
			t.Logf("%d of %d updates are known", known, all)
			require.Greater(t, known*15, all, "too few updates are known (lists with two items of one name are not)")
		})
	}
}

// history creates an object and updates it several times; it tells how many of the writes ours knew.
func history(t *testing.T, r *rand.Rand, p, plainly pairOf, gvk schema.GroupVersionKind) (known, all int) {
	f := filler(r)
	obj, err := scheme.Scheme.New(gvk)
	require.NoError(t, err)
	f.Fill(obj)
	reword(r, reflect.ValueOf(obj))
	obj.GetObjectKind().SetGroupVersionKind(gvk)
	accessor(t, obj).SetUID("")
	var live runtime.Object
	for step := range 6 {
		manager := []string{"a", "kubectl-edit", "kubelet", ""}[r.Intn(4)]
		use := p
		if r.Intn(3) == 0 {
			use = plainly
		}
		var want, got runtime.Object
		var ok bool
		for same := false; !same; { // both in one second, by which entries are sorted
			began := time.Now()
			want, got = upstreams(t, use.upstream, live, obj, gvk, manager), obj.DeepCopyObject()
			now := time.Now()
			ok, same = use.ours.Update(live, got, manager, now), now.Unix() == began.Unix()
		}
		all++
		if ok {
			known++
			require.Equal(t, describe(t, want), describe(t, got), "step %d by %q\nlive %s\nobj %s", step, manager, dump(live), dump(obj))
		} else {
			require.Equal(t, obj, got, "a refused object was changed")
		}
		live = want.DeepCopyObject()
		accessor(t, live).SetUID("u")
		obj = live.DeepCopyObject()
		mutate(r, f, reflect.ValueOf(obj))
		reword(r, reflect.ValueOf(obj))
		accessor(t, obj).SetUID("u")
		if r.Intn(4) == 0 {
			accessor(t, obj).SetManagedFields(nil)
		}
	}
	return known, all
}

func upstreams(t *testing.T, m *managedfields.FieldManager, live, obj runtime.Object, gvk schema.GroupVersionKind, manager string) runtime.Object {
	if live == nil {
		empty, err := scheme.Scheme.New(gvk)
		require.NoError(t, err)
		live = empty
	}
	return m.UpdateNoErrors(live.DeepCopyObject(), obj.DeepCopyObject(), manager)
}

// describe tells managed fields in a form in which times have their stored precision.
func describe(t *testing.T, obj runtime.Object) string {
	out := ""
	for _, e := range accessor(t, obj).GetManagedFields() {
		out += fmt.Sprintf("%s %s %s %s %v %s %s\n", e.Manager, e.Operation, e.APIVersion, e.Subresource, e.Time == nil, e.FieldsType, e.FieldsV1.GetRawString())
	}
	return out
}

func dump(obj runtime.Object) string {
	if obj == nil {
		return "nil"
	}
	var out []byte
	info, _ := runtime.SerializerInfoForMediaType(scheme.Codecs.SupportedMediaTypes(), runtime.ContentTypeJSON)
	out, err := runtime.Encode(info.Serializer, obj)
	if err != nil {
		return err.Error()
	}
	return string(out)
}

func benchPair(b *testing.B) (pairOf, *corev1.Pod, *corev1.Pod) {
	p := newPair(b, corev1.SchemeGroupVersion.WithKind("Pod"), "status", resources[1].reset)
	live := &corev1.Pod{
		TypeMeta:   metav1.TypeMeta{Kind: "Pod", APIVersion: "v1"},
		ObjectMeta: metav1.ObjectMeta{Name: "p", UID: "u", Labels: map[string]string{"app": "bench"}},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "image:1", Ports: []corev1.ContainerPort{{ContainerPort: 80}}}}},
		Status: corev1.PodStatus{
			Phase: corev1.PodRunning, PodIP: "10.0.0.1", Message: "m",
			Conditions:        []corev1.PodCondition{{Type: "Ready", Status: "True"}, {Type: "Initialized", Status: "True"}},
			ContainerStatuses: []corev1.ContainerStatus{{Name: "c", Image: "i", ImageID: "x"}},
		},
	}
	main := newPair(b, corev1.SchemeGroupVersion.WithKind("Pod"), "", resources[0].reset)
	require.True(b, main.ours.Update(nil, live, "kubectl", time.Now()))
	before := live.DeepCopy()
	before.Status = corev1.PodStatus{}
	require.True(b, p.ours.Update(before, live, "kubelet", time.Now()))
	after := live.DeepCopy()
	after.Status.Message = "other"
	return p, live, after
}

func BenchmarkUpdate(b *testing.B) {
	p, live, after := benchPair(b)
	b.Run("ours", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			require.True(b, p.ours.Update(live, after, "kubelet", time.Now()))
		}
	})
	b.Run("upstream", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			p.upstream.UpdateNoErrors(live, after, "kubelet")
		}
	})
}

// TestSure: what shapes are sure of changes no verdict, and spares most of the looking.
func TestSure(t *testing.T) {
	for _, res := range resources {
		quick, thorough := newPair(t, res.gvk, res.subresource, res.reset).ours.shape, newPair(t, res.gvk, res.subresource, res.reset).ours.shape
		all, sure := 0, 0
		doubt(thorough, map[*shape]bool{}, func(s bool) {
			all++
			if s {
				sure++
			}
		})
		require.Greater(t, sure*3, all, res.gvk)
		for seed := range 50 {
			r := rand.New(rand.NewSource(int64(seed)))
			obj, err := scheme.Scheme.New(res.gvk)
			require.NoError(t, err)
			filler(r).Fill(obj)
			o := operand{v: reflect.ValueOf(obj).Elem()}
			require.Equal(t, known(thorough, o), known(quick, o), "%s, seed %d", res.gvk, seed)
		}
	}
}

// doubt lets a shape be sure of nothing, after telling of what it was.
func doubt(s *shape, seen map[*shape]bool, was func(sure bool)) {
	if s == nil || seen[s] {
		return
	}
	seen[s] = true
	was(s.sure)
	s.sure = false
	doubt(s.elem, seen, was)
	for i := range s.fields {
		doubt(s.fields[i].shape, seen, was)
	}
}
