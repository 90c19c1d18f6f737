package runtime_test

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// maxShimBytes bounds the resident memory of an idle shim with forty running
// containers.
const maxShimBytes = 20 << 20

// TestShimMemory starts forty containers and looks at the shim when it is idle.
func TestShimMemory(t *testing.T) {
	h := newHost(t)
	empty := h.shimPSS()
	p := h.pod()
	const many = 40
	var wg sync.WaitGroup
	for range many {
		wg.Add(1)
		go func() {
			defer wg.Done()
			p.run("exec sleep 1000")
		}()
	}
	wg.Wait()
	var idle int
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		if idle = h.shimPSS(); idle < maxShimBytes {
			break
		}
	}
	t.Logf("proportional memory: %d KiB empty, %d KiB with %d containers", empty>>10, idle>>10, many)
	if idle > maxShimBytes {
		t.Errorf("the shim takes %d bytes", idle)
	}
}

func (h *host) shimPSS() int {
	h.t.Helper()
	pid, err := h.ShimPID(h.ctx)
	if err != nil {
		h.t.Fatal(err)
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		h.t.Fatal(err)
	}
	for _, line := range strings.Split(string(data), "\n") {
		var kib int
		if n, _ := fmt.Sscanf(line, "Pss: %d kB", &kib); n == 1 {
			return kib << 10
		}
	}
	h.t.Fatal("no Pss")
	return 0
}
