package runtime_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestCancelledStartLeavesNoProcess: a caller that gives up in the middle of a start finds the container either running or
// without a process; one that ran on while it counts as ended could never be stopped.
func TestCancelledStartLeavesNoProcess(t *testing.T) {
	h := newHost(t)
	p := h.pod()
	for i := range 20 {
		id := p.create("exec sleep 1000")
		resp, err := h.ContainerStatus(h.ctx, id, true)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(h.ctx, time.Duration(i)*2*time.Millisecond)
		err = h.StartContainer(ctx, id)
		cancel()
		if err == nil {
			if err := h.StopContainer(h.ctx, id, 0); err != nil {
				t.Fatal(err)
			}
			continue
		}
		found, _ := filepath.Glob("/sys/fs/cgroup/*" + resp.Info["cgroup"] + "/cgroup.procs")
		for _, file := range append(found, "/sys/fs/cgroup"+resp.Info["cgroup"]+"/cgroup.procs") {
			if procs, err := os.ReadFile(file); err == nil && len(procs) > 0 {
				t.Fatalf("start given up after %d ms: container is ended, but in %s are %q", 2*i, file, procs)
			}
		}
	}
}
