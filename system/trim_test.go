package system

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestProgramRange(t *testing.T) {
	for line, want := range map[string]bool{
		"00400000-02c00000 r-xp 00000000 fe:00 12 /bin/knarr":            true,
		"02c00000-05c00000 r--p 02800000 fe:00 12 /bin/knarr":            true,
		"05c00000-05d00000 rw-p 05800000 fe:00 12 /bin/knarr":            false,
		"7f00000000-7f00010000 r-xp 00000000 fe:00 13 /lib/other":        false,
		"7f00000000-7f00010000 r--s 00000000 fe:00 12 /bin/knarr":        false,
		"7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0        [stack]": false,
		"": false,
	} {
		start, end, ok := programRange(line, "/bin/knarr")
		require.Equal(t, want, ok, line)
		if ok {
			require.Less(t, start, end)
		}
	}
	dropProgramPages() // the test goes on running
}
