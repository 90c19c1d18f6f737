package apiserver

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/endpoints/handlers/fieldmanager"
	"k8s.io/kubernetes/pkg/apis/core"
)

// TestHeldTimes has upstream look at objects with and without held times: what comes out is the same, and it is spared the comparison of all
// of both wherever they differ.
func TestHeldTimes(t *testing.T) {
	at := func(seconds int64) *metav1.Time { return &metav1.Time{Time: time.Unix(seconds, 0)} }
	pod := func(seconds int64) *core.Pod {
		return &core.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: "p", Labels: map[string]string{"a": "b"}, ManagedFields: []metav1.ManagedFieldsEntry{
				{Manager: "m", FieldsV1: metav1.NewFieldsV1(`{"f:spec":{}}`), Time: at(1)}, {Manager: "n", FieldsV1: metav1.NewFieldsV1(`{"f:status":{}}`), Time: at(seconds)}}},
			Spec:   core.PodSpec{NodeName: "n", Containers: []core.Container{{Name: "c"}}},
			Status: core.PodStatus{Phase: core.PodPending},
		}
	}
	for name, tc := range map[string]struct {
		change func(*core.Pod)
		held   bool
	}{
		"nothing but the time": {func(p *core.Pod) {}, false},
		"nothing for an empty map": {func(p *core.Pod) {
			p.Annotations = map[string]string{}
		}, false},
		"labels":      {func(p *core.Pod) { p.Labels["a"] = "c" }, true},
		"annotations": {func(p *core.Pod) { p.Annotations = map[string]string{"a": "c"} }, true},
		"finalizers":  {func(p *core.Pod) { p.Finalizers = []string{"a/b"} }, false},
		"spec":        {func(p *core.Pod) { p.Spec.Containers[0].Image = "i" }, true},
		"status":      {func(p *core.Pod) { p.Status.Phase = core.PodRunning }, true},
		"a manager more": {func(p *core.Pod) {
			p.Status.Phase = core.PodRunning
			p.ManagedFields = append(p.ManagedFields, metav1.ManagedFieldsEntry{Manager: "o", Time: at(9)})
		}, false},
		"other fields": {func(p *core.Pod) {
			p.Status.Phase = core.PodRunning
			p.ManagedFields[1].FieldsV1 = metav1.NewFieldsV1(`{"f:spec":{},"f:status":{}}`)
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			old, plain := pod(5), pod(7)
			tc.change(plain)
			held := plain.DeepCopy()
			var times heldTimes
			times.hold(held, old)
			require.Equal(t, tc.held, len(times.shown) > 0)
			if tc.held {
				require.Equal(t, at(5), held.ManagedFields[1].Time)
			}
			want, err := fieldmanager.IgnoreManagedFieldsTimestampsTransformer(context.Background(), plain, old)
			require.NoError(t, err)
			got, err := fieldmanager.IgnoreManagedFieldsTimestampsTransformer(context.Background(), held, old)
			require.NoError(t, err)
			times.release(got)
			require.Equal(t, want, got)
			require.Equal(t, pod(5), old)
		})
	}
	p := pod(7)
	var times heldTimes
	times.hold(p, &core.Pod{ObjectMeta: metav1.ObjectMeta{ManagedFields: pod(5).ManagedFields}})
	p.ManagedFields = pod(9).ManagedFields // by somebody else
	times.release(p)
	require.Equal(t, at(9), p.ManagedFields[1].Time)
}
