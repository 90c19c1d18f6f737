package runtime

import (
	"os"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestRejoinStaysWhereItIs(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("moving processes between control groups needs root")
	}
	before, err := os.ReadFile("/proc/self/cgroup")
	require.NoError(t, err)
	require.NoError(t, rejoinCgroup(probeFeatures().cgroup2))
	after, err := os.ReadFile("/proc/self/cgroup")
	require.NoError(t, err)
	require.Equal(t, string(before), string(after))
}
