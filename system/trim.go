package system

import (
	"bufio"
	"context"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// trimDelay is how long after its start a process gives back what only the start needed.
const trimDelay = 5 * time.Second

// trimAfterStart gives back, once, the memory that a start needs and the life after it does not: freed heap, and the pages of
// the program that initialization touched. Pages of the program that are used again come back from the page cache.
func trimAfterStart(ctx context.Context) {
	select {
	case <-ctx.Done():
		return
	case <-time.After(trimDelay):
	}
	debug.FreeOSMemory()
	dropProgramPages()
}

// dropProgramPages unmaps the read-only pages of the program itself. It is a hint: what fails changes nothing.
func dropProgramPages() {
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	maps, err := os.Open("/proc/self/maps")
	if err != nil {
		return
	}
	defer maps.Close()
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		start, end, ok := programRange(lines.Text(), exe)
		if ok {
			_, _, _ = unix.Syscall(unix.SYS_MADVISE, start, end-start, unix.MADV_DONTNEED)
		}
	}
}

// programRange reads a line of /proc/self/maps; ok for a private, unwritable mapping of the program.
func programRange(line, exe string) (start, end uintptr, ok bool) {
	f := strings.Fields(line)
	if len(f) < 6 || f[5] != exe || len(f[1]) != 4 || f[1][1] != '-' || f[1][3] != 'p' {
		return 0, 0, false
	}
	low, high, found := strings.Cut(f[0], "-")
	if !found {
		return 0, 0, false
	}
	a, err := strconv.ParseUint(low, 16, 64)
	if err != nil {
		return 0, 0, false
	}
	b, err := strconv.ParseUint(high, 16, 64)
	return uintptr(a), uintptr(b), err == nil && b > a
}
