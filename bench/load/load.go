// Package load measures work: how fast it went, how long each piece took, what the measured processes spent on it.
package load

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// ticksPerSecond is the kernel's USER_HZ, which is 100 on every architecture that Go runs on under Linux.
const ticksPerSecond = 100

// PIDs are the processes that a measurement watches; none is allowed.
type PIDs []int

// ParsePIDs reads a comma-separated list.
func ParsePIDs(s string) (PIDs, error) {
	var out PIDs
	for f := range strings.SplitSeq(s, ",") {
		if f == "" {
			continue
		}
		pid, err := strconv.Atoi(f)
		if err != nil {
			return nil, fmt.Errorf("%q is no process id", f)
		}
		out = append(out, pid)
	}
	return out, nil
}

// CPU is the processor time that the processes have used, user and system. Processes that have ended count as none.
func (p PIDs) CPU() time.Duration {
	var ticks int64
	for _, pid := range p {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue
		}
		f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		if len(f) < 13 {
			continue
		}
		for _, s := range f[11:13] {
			n, _ := strconv.ParseInt(s, 10, 64)
			ticks += n
		}
	}
	return time.Duration(ticks) * time.Second / ticksPerSecond
}

// PSS is the memory of the processes in bytes, shared pages counted in proportion.
func (p PIDs) PSS() int64 {
	var sum int64
	for _, pid := range p {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) > 1 && f[0] == "Pss:" {
				n, _ := strconv.ParseInt(f[1], 10, 64)
				sum += n << 10
			}
		}
	}
	return sum
}

// Result is what a phase came to.
type Result struct {
	Name     string
	Ops      int
	Elapsed  time.Duration
	P50, P99 time.Duration
	CPU      time.Duration // of the watched processes
	Memory   int64         // of the watched processes after the phase, in bytes
	Errors   int
	First    error // the first failure
}

// String is one line of a report.
func (r Result) String() string {
	s := fmt.Sprintf("%-24s %7d ops %8.0f /s   p50 %9v   p99 %9v   server %7.1f us/op   %6.1f MB",
		r.Name, r.Ops, float64(r.Ops)/r.Elapsed.Seconds(), r.P50.Round(10*time.Microsecond), r.P99.Round(10*time.Microsecond),
		float64(r.CPU.Microseconds())/float64(max(r.Ops, 1)), float64(r.Memory)/1e6)
	if r.Errors > 0 {
		s += fmt.Sprintf("   %d FAILED: %v", r.Errors, r.First)
	}
	return s
}

// Run calls f for 0 to ops-1, from workers goroutines, and measures. It stops early when ctx ends.
func Run(ctx context.Context, name string, pids PIDs, ops, workers int, f func(ctx context.Context, i int) error) Result {
	took := make([]time.Duration, ops)
	var next, errs atomic.Int64
	var first atomic.Pointer[error]
	cpu, begin := pids.CPU(), time.Now()
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < ops && ctx.Err() == nil; i = int(next.Add(1)) - 1 {
				start := time.Now()
				if err := f(ctx, i); err != nil {
					errs.Add(1)
					first.CompareAndSwap(nil, &err)
				}
				took[i] = time.Since(start)
			}
		})
	}
	wg.Wait()
	r := Result{Name: name, Ops: ops, Elapsed: time.Since(begin), CPU: pids.CPU() - cpu, Errors: int(errs.Load()), Memory: pids.PSS()}
	if e := first.Load(); e != nil {
		r.First = *e
	}
	r.P50, r.P99 = Percentile(took, 50), Percentile(took, 99)
	return r
}

// Percentile of durations, which it sorts; zero of none.
func Percentile(d []time.Duration, percent int) time.Duration {
	if len(d) == 0 {
		return 0
	}
	slices.Sort(d)
	return d[min(len(d)*percent/100, len(d)-1)]
}
