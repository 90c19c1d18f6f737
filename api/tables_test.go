package api_test

import (
	"testing"

	"github.com/stretchr/testify/require"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	admissionregistrationv1beta1 "k8s.io/api/admissionregistration/v1beta1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"knarr/api"
)

// TestConvertBetweenVersions: readers may want another version of a group than the one that is stored.
func TestConvertBetweenVersions(t *testing.T) {
	stored := &admissionregistrationv1beta1.MutatingAdmissionPolicy{ObjectMeta: metav1.ObjectMeta{Name: "p", Labels: map[string]string{"k": "v"}}}
	out, err := api.Convert(stored, admissionregistrationv1.SchemeGroupVersion)
	require.NoError(t, err)
	seen, ok := out.(*admissionregistrationv1.MutatingAdmissionPolicy)
	require.True(t, ok, "%T", out)
	require.Equal(t, stored.ObjectMeta, seen.ObjectMeta)
	seen.Labels["k"] = "changed"
	require.Equal(t, "v", stored.Labels["k"], "the copy is private")
}
