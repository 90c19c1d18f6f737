// Package sysmon finds the monitor of a Go program's runtime, which takes processors away from system calls and goroutines that keep them.
package sysmon

import (
	"fmt"
	"path/filepath"
	"strconv"
)

// pidLimit is more than the highest number of a thread (PID_MAX_LIMIT of Linux).
const pidLimit = 1 << 22

// Thread gives the number of the thread that the monitor of process pid runs on: the first that a Go program without cgo makes. Numbers of threads grow, and begin anew at the highest.
func Thread(pid int) (tid int, err error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	if err != nil {
		return 0, err
	}
	least := pidLimit
	for _, t := range tasks {
		n, err := strconv.Atoi(filepath.Base(t))
		if age := (n - pid + pidLimit) % pidLimit; err == nil && age > 0 && age < least {
			tid, least = n, age
		}
	}
	if tid == 0 {
		return 0, fmt.Errorf("process %d has one thread", pid)
	}
	return tid, nil
}
