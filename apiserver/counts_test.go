package apiserver

import (
	"testing"

	"github.com/stretchr/testify/require"
	"k8s.io/component-base/metrics/testutil"
)

// TestAuthenticationCounts: who was authenticated is counted on children that are looked up once, also after the series were set back.
func TestAuthenticationCounts(t *testing.T) {
	registerMetrics()
	counts := findAuthenticationCounts()
	require.NotNil(t, counts, "this version of upstream has other series")
	require.Same(t, counts.of("someone"), counts.of("system:node:a"))
	require.NotSame(t, counts.of("someone"), counts.of("admin"))
	mail := counts.of("a@example.com") // nobody else is counted there
	value := func() float64 {
		v, err := testutil.GetCounterMetricValue(counts.users.WithLabelValues(labelEmail))
		require.NoError(t, err)
		return v
	}
	before := value()
	mail.add()
	mail.add()
	require.Equal(t, before+2, value())
	counts.users.Reset() // as DELETE /metrics does, with all series
	counts.forget()
	mail.add()
	require.Equal(t, 1.0, value())
	(*authenticationCounts)(nil).of("x").add() // nobody counts
	(*authenticationCounts)(nil).forget()
}
