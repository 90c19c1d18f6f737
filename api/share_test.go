package api

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
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

func TestShareUnchanged(t *testing.T) {
	pod := func(image string) *corev1.Pod {
		return &corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "main", Image: image}}}}
	}
	old, now, other := pod("a:1"), pod("a:1"), pod("a:2")
	now.Status.Phase = corev1.PodRunning
	shareUnchanged(now, old)
	require.Same(t, &old.Spec.Containers[0], &now.Spec.Containers[0])
	require.Equal(t, corev1.PodRunning, now.Status.Phase)
	shareUnchanged(other, old)
	require.Equal(t, "a:2", other.Spec.Containers[0].Image)
	shareUnchanged(other, &corev1.ConfigMap{})
}
