package netns_test

import (
	"errors"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"

	"knarr/network/netns"
)

func TestDump(t *testing.T) {
	other := errors.New("permission denied")
	for name, c := range map[string]struct {
		interrupted int
		then        error
		calls       int
		want        error
	}{
		"complete":                   {calls: 1},
		"complete after a few":       {interrupted: 7, calls: 8},
		"another error":              {interrupted: 1, then: other, calls: 2, want: other},
		"a machine that never rests": {interrupted: 1 << 20, calls: 50, want: netlink.ErrDumpInterrupted},
	} {
		t.Run(name, func(t *testing.T) {
			calls := 0
			found, err := netns.Dump(func() ([]int, error) {
				if calls++; calls <= c.interrupted {
					return []int{1}, netlink.ErrDumpInterrupted
				}
				return []int{1, 2}, c.then
			})
			require.ErrorIs(t, err, c.want)
			require.Equal(t, c.calls, calls)
			if c.want == nil {
				require.Equal(t, []int{1, 2}, found)
			}
		})
	}
}
