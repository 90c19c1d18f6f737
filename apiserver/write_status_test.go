package apiserver

import (
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
)

// TestEncodeStatus holds the answer to a deletion to upstream's, byte for byte.
func TestEncodeStatus(t *testing.T) {
	for _, status := range []*metav1.Status{
		{Status: metav1.StatusSuccess},
		{Status: metav1.StatusSuccess, Details: &metav1.StatusDetails{Name: "m", Kind: "configmaps", UID: "0d1f"}},
		{Status: metav1.StatusSuccess, Details: &metav1.StatusDetails{Name: "<&>", Group: "apps", Kind: "deployments", UID: "0d1f"}},
	} {
		for _, f := range []format{jsonFormat{}, protoFormat{}} {
			info, ok := runtime.SerializerInfoForMediaType(legacyscheme.Codecs.SupportedMediaTypes(), f.contentType())
			require.True(t, ok)
			before := status.DeepCopy()
			want, err := runtime.Encode(legacyscheme.Codecs.EncoderForVersion(info.Serializer, schema.GroupVersion{Group: "apps", Version: "v1"}), status.DeepCopy())
			require.NoError(t, err)
			head, body, tail, err := (&change{format: f}).encodeStatus(status)
			require.NoError(t, err)
			require.Equal(t, string(want), string(slices.Concat(head, body, tail)), f.name())
			require.Equal(t, before, status)
		}
	}
}
