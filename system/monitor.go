package system

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"

	"knarr/internal/sysmon"
)

// monitorSlack is how late the runtime's monitor thread may wake up, in nanoseconds. While a process does anything, that thread looks each 20 us, which with the usual slack
// of 50 us is a twelfth of the processor time of a server under load. What it looks for is a processor that a system call keeps (a sync of the log takes longer than this)
// and a goroutine that has run for 10 ms.
const monitorSlack = 200_000

// lighten makes the process take less of the machine's processors and memory than Go programs do, until ctx ends: see relaxMonitor and trimWhenQuiet.
func lighten(ctx context.Context, pace pace) {
	if err := relaxMonitor(); err != nil {
		slog.Warn("the runtime's monitor stays busy", "err", err)
	}
	trimWhenQuiet(ctx, pace)
}

// relaxMonitor gives the runtime's monitor its slack. It needs the right to (CAP_SYS_NICE); without it, nothing changes.
func relaxMonitor() error {
	tid, err := sysmon.Thread(os.Getpid())
	if err != nil {
		return err
	}
	err = os.WriteFile(slackFile(tid), []byte(strconv.Itoa(monitorSlack)), 0)
	if errors.Is(err, os.ErrPermission) || errors.Is(err, os.ErrNotExist) { // the last: a kernel without it
		return nil
	}
	return err
}

func slackFile(tid int) string { return fmt.Sprintf("/proc/%d/timerslack_ns", tid) }
