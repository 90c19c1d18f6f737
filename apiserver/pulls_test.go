package apiserver

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
)

// TestSetDefaults: an object gets upstream's defaults, whether an image has been seen before or not.
func TestSetDefaults(t *testing.T) {
	images := []string{"", "a", "a:latest", "a:1", "b/c:latest", "r:5000/a", "r:5000/a:latest", "a:1@sha256:" + strings.Repeat("a", 64), "A", "a b", ":", "a:latest:latest",
		strings.Repeat("x", maxImageBytes+1), "é:latest"}
	for round := range 3 {
		for i, image := range images {
			pod := &corev1.Pod{Spec: corev1.PodSpec{
				InitContainers: []corev1.Container{{Image: image}, {Image: image, ImagePullPolicy: corev1.PullNever}},
				Containers:     []corev1.Container{{Image: images[(i+round)%len(images)]}, {Image: image}, {Image: "other", ImagePullPolicy: "Odd"}}}}
			want := pod.DeepCopy()
			legacyscheme.Scheme.Default(want)
			setDefaults(pod)
			require.Equal(t, want, pod, "%q", image)
		}
	}
	config := &corev1.Secret{}
	setDefaults(config)
	require.Equal(t, corev1.SecretTypeOpaque, config.Type)
}

// TestPullPoliciesBounded: what is remembered is bounded, in number and length.
func TestPullPoliciesBounded(t *testing.T) {
	var p pullPolicies
	for i := range 2*maxImages + 1 {
		p.learn([]*corev1.Container{{Image: fmt.Sprint("image", i), ImagePullPolicy: corev1.PullAlways}})
		require.LessOrEqual(t, len(p.known), maxImages)
	}
	one := []corev1.Container{{Image: fmt.Sprint("image", 2*maxImages)}, {Image: "image0"}}
	require.Len(t, p.fill(one, nil), 1)
	require.Equal(t, corev1.PullAlways, one[0].ImagePullPolicy)
	p.learn([]*corev1.Container{{Image: strings.Repeat("x", maxImageBytes+1), ImagePullPolicy: corev1.PullAlways}})
	require.Len(t, p.known, 1)
}
