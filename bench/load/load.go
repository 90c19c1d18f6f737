// Package load measures work: how fast it went, how long each piece took, what the measured processes spent on it.
package load

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Result is what a phase came to. As JSON it is one object with the fields below.
type Result struct {
	Name    string        `json:"name"`
	Ops     int           `json:"ops"`
	Elapsed time.Duration `json:"elapsedNs"`
	// P50, P99 and Max are how long one operation took.
	P50 time.Duration `json:"p50Ns"`
	P99 time.Duration `json:"p99Ns"`
	Max time.Duration `json:"maxNs"`
	// CPU is what each watched group spent on the phase, Memory what it held afterwards.
	CPU    map[string]time.Duration `json:"cpuNs,omitempty"`
	Memory map[string]Memory        `json:"memory,omitempty"`
	Errors int                      `json:"errors,omitempty"`
	First  string                   `json:"firstError,omitempty"`
}

// Set gives the result its latencies; it sorts took.
func (r *Result) Set(took []time.Duration) {
	r.P50, r.P99, r.Max = Percentile(took, 50), Percentile(took, 99), Percentile(took, 100)
}

// String is one line of a report.
func (r Result) String() string {
	var b strings.Builder
	if r.Ops == 0 {
		fmt.Fprintf(&b, "%-24s", r.Name)
		for _, name := range sortedKeys(r.Memory) {
			fmt.Fprintf(&b, "   %s %.1f MB, of it anonymous %.1f MB", name, float64(r.Memory[name].Proportional)/1e6, float64(r.Memory[name].Anonymous)/1e6)
		}
		return b.String()
	}
	fmt.Fprintf(&b, "%-24s %7d ops %8.1f /s   p50 %9v   p99 %9v   max %9v", r.Name, r.Ops, float64(r.Ops)/r.Elapsed.Seconds(),
		r.P50.Round(10*time.Microsecond), r.P99.Round(10*time.Microsecond), r.Max.Round(10*time.Microsecond))
	for _, name := range sortedKeys(r.CPU) {
		fmt.Fprintf(&b, "   %s %.1f us/op, %.1f MB", name, float64(r.CPU[name].Nanoseconds())/1e3/float64(max(r.Ops, 1)), float64(r.Memory[name].Proportional)/1e6)
	}
	if r.Errors > 0 {
		fmt.Fprintf(&b, "   %d FAILED: %s", r.Errors, r.First)
	}
	return b.String()
}

func sortedKeys[V any](m map[string]V) []string {
	var out []string
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// Print writes the result as one line, of JSON or for people.
func (r Result) Print(w io.Writer, asJSON bool) error {
	if !asJSON {
		_, err := fmt.Fprintln(w, r)
		return err
	}
	return json.NewEncoder(w).Encode(r)
}

// Run calls f for 0 to ops-1, from workers goroutines, and measures. It stops early when ctx ends.
func Run(ctx context.Context, name string, watched Groups, ops, workers int, f func(ctx context.Context, i int) error) Result {
	took := make([]time.Duration, ops)
	var next, errs atomic.Int64
	var first atomic.Pointer[error]
	cpu, begin := watched.CPU(), time.Now()
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
	r := Result{Name: name, Ops: ops, Elapsed: time.Since(begin), CPU: watched.Since(cpu), Errors: int(errs.Load()), Memory: watched.Memory()}
	if e := first.Load(); e != nil {
		r.First = (*e).Error()
	}
	r.Set(took)
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
