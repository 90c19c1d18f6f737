//go:build cgo

package slack

/*
#define _GNU_SOURCE
#include <string.h>
#include <sys/prctl.h>

// The slack of timers in a container's init, in nanoseconds.
#define KNARR_SLACK 5000000UL

// A container's init has one processor for Go code, and the monitor thread of
// the Go runtime then looks each 20 us, or as late as the slack of its timers
// permits, whether a system call keeps it: a tenth of what init does. The
// thread inherits the slack that is set here, before the Go runtime starts. The
// linker has this after nsenter's constructor, which forks: what is forked takes
// the slack of its parent for its default. A test tells.
__attribute__((constructor)) static void knarr_slack(int argc, char **argv, char **envp)
{
	if (argc > 1 && argv[1] != NULL && strcmp(argv[1], "init") == 0)
		prctl(PR_SET_TIMERSLACK, KNARR_SLACK, 0, 0, 0);
}
*/
import "C"

import (
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// The first thread, which becomes the container's process, gets its own slack
// back: initializers run on it, and one that locks it keeps main on it.
func init() {
	if len(os.Args) > 1 && os.Args[1] == "init" {
		runtime.LockOSThread()
		_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 0, 0, 0, 0)
	}
}
