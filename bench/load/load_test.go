package load

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestRunCountsEverything(t *testing.T) {
	r := Run(context.Background(), "x", Groups{{Name: "self", PIDs: PIDs{os.Getpid()}}}, 100, 7, func(_ context.Context, i int) error {
		for end := time.Now().Add(time.Millisecond); time.Now().Before(end); {
		}
		if i%10 == 0 {
			return errors.New("tenth")
		}
		return nil
	})
	require.Equal(t, 100, r.Ops)
	require.Equal(t, 10, r.Errors)
	require.Equal(t, "tenth", r.First)
	require.Positive(t, r.Memory["self"].Anonymous)
	require.Greater(t, r.Memory["self"].Proportional, r.Memory["self"].Anonymous)
	require.Positive(t, r.CPU["self"])
	require.LessOrEqual(t, r.P50, r.P99)

	said, err := json.Marshal(r)
	require.NoError(t, err)
	var again Result
	require.NoError(t, json.Unmarshal(said, &again))
	require.Equal(t, r, again)
}

func TestPercentile(t *testing.T) {
	d := []time.Duration{3, 1, 2}
	require.EqualValues(t, 2, Percentile(d, 50))
	require.EqualValues(t, 3, Percentile(d, 99))
	require.Zero(t, Percentile(nil, 50), "nothing has a percentile")
}

func TestParseGroups(t *testing.T) {
	for _, c := range []struct {
		in   string
		want Groups // nil: refused
	}{
		{"", Groups{}},
		{"1,22", Groups{{Name: "server", PIDs: PIDs{1, 22}}}},
		{"api=1;all=2,/sys/x", Groups{{Name: "api", PIDs: PIDs{1}}, {Name: "all", PIDs: PIDs{2}, Cgroup: "/sys/x"}}},
		{"1,x", nil}, {"-3", nil}, {"/a,/b", nil},
	} {
		got, err := ParseGroups(c.in)
		if c.want == nil {
			require.Error(t, err, c.in)
			continue
		}
		require.NoError(t, err, c.in)
		require.ElementsMatch(t, c.want, got, c.in)
	}
}

func TestWakeupsCountsSleeps(t *testing.T) {
	self := PIDs{os.Getpid()}
	before := self.Wakeups()
	for range 20 {
		time.Sleep(time.Millisecond)
	}
	require.Greater(t, self.Wakeups(), before)
}
