package apiserver_test

import (
	"testing"

	"github.com/stretchr/testify/require"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
)

// TestGates: every feature is on or off as upstream's own gate says, also when it is asked again.
func TestGates(t *testing.T) {
	all := utilfeature.DefaultMutableFeatureGate.GetAll()
	require.NotEmpty(t, all)
	require.NotEqual(t, any(utilfeature.DefaultMutableFeatureGate), any(utilfeature.DefaultFeatureGate))
	on := 0
	for range 2 {
		for name := range all {
			want := utilfeature.DefaultMutableFeatureGate.Enabled(name)
			require.Equal(t, want, utilfeature.DefaultFeatureGate.Enabled(name), name)
			if want {
				on++
			}
		}
	}
	require.Greater(t, on, len(all)/2)
	require.Panics(t, func() { utilfeature.DefaultFeatureGate.Enabled("NoSuchFeature") })
	require.ElementsMatch(t, utilfeature.DefaultMutableFeatureGate.KnownFeatures(), utilfeature.DefaultFeatureGate.KnownFeatures())
}
