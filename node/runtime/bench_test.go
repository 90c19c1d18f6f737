package runtime_test

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"knarr/node/runtime"
)

// shimTicks is the processor time of the shim and of its ended children, user
// and system, in clock ticks of 10 ms.
func (h *host) shimTicks() [4]int {
	pid, err := h.ShimPID(h.ctx)
	if err != nil {
		h.t.Fatal(err)
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		h.t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(data), ") ")
	var out [4]int
	for i, field := range strings.Fields(rest)[11:15] {
		if out[i], err = strconv.Atoi(field); err != nil {
			h.t.Fatal(err)
		}
	}
	return out
}

func quiet(o *runtime.Options) { o.Log = slog.New(slog.NewTextHandler(io.Discard, nil)) }

// cpu reports the processor time of the shim and its ended children per
// operation, which does not depend on what else the machine does.
func cpu(b *testing.B, h *host) func() {
	before := h.shimTicks()
	h.times = nil
	return func() {
		slices.Sort(h.times)
		b.ReportMetric(float64(h.times[0].Microseconds())/1000, "min-ms")
		b.ReportMetric(float64(h.times[len(h.times)/2].Microseconds())/1000, "median-ms")
		for i, name := range []string{"shim-user-ms/op", "shim-sys-ms/op", "init-user-ms/op", "init-sys-ms/op"} {
			b.ReportMetric(float64(h.shimTicks()[i]-before[i])*10/float64(b.N), name)
		}
	}
}

// BenchmarkSandbox measures a sandbox from nothing to nothing.
func BenchmarkSandbox(b *testing.B) {
	h := newHost(b, quiet)
	for b.Loop() {
		p := h.pod()
		if err := h.RemovePodSandbox(h.ctx, p.id); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkStart measures from CreateContainer to the container running, with
// the default system call filter; the removal is not counted.
func BenchmarkStart(b *testing.B) {
	h := newHost(b, quiet)
	p := h.pod()
	defer cpu(b, h)()
	for b.Loop() {
		begin := time.Now()
		id := p.run("exec sleep 1000")
		b.StopTimer()
		h.times = append(h.times, time.Since(begin))
		if st := h.status(id); st.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
			b.Fatalf("state %v", st.State)
		}
		if err := h.RemoveContainer(h.ctx, id); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// BenchmarkStartUnfiltered is BenchmarkStart without a system call filter.
func BenchmarkStartUnfiltered(b *testing.B) {
	h := newHost(b, quiet)
	p := h.pod()
	defer cpu(b, h)()
	for b.Loop() {
		begin := time.Now()
		id := p.run("exec sleep 1000", func(c *runtimeapi.ContainerConfig) { c.Linux.SecurityContext.Seccomp = nil })
		b.StopTimer()
		h.times = append(h.times, time.Since(begin))
		if err := h.RemoveContainer(h.ctx, id); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// BenchmarkExec measures a command in a running container.
func BenchmarkExec(b *testing.B) {
	h := newHost(b, quiet)
	id := h.pod().run("exec sleep 1000")
	defer cpu(b, h)()
	for b.Loop() {
		begin := time.Now()
		h.exec(id, "true")
		h.times = append(h.times, time.Since(begin))
	}
}
