package system

import (
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"knarr/internal/sysmon"
)

func TestRelaxMonitor(t *testing.T) {
	tid, err := sysmon.Thread(os.Getpid())
	require.NoError(t, err)
	slack := func(tid int) int {
		data, err := os.ReadFile(slackFile(tid))
		if err != nil {
			t.Skip(err)
		}
		n, err := strconv.Atoi(strings.TrimSpace(string(data)))
		require.NoError(t, err)
		return n
	}
	before := slack(tid)
	t.Cleanup(func() { _ = os.WriteFile(slackFile(tid), []byte(strconv.Itoa(before)), 0) })
	require.NoError(t, relaxMonitor())
	if os.Geteuid() != 0 {
		t.Skip("needs CAP_SYS_NICE")
	}
	require.Equal(t, monitorSlack, slack(tid))
	require.NotEqual(t, monitorSlack, slack(os.Getpid()), "only the monitor's")
}
