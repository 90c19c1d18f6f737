package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"time"

	"knarr/bench/load"
)

// row is one quantity, measured on both sides.
type row struct {
	name string
	// more says that more is better, as with a throughput.
	more   bool
	values map[string][]float64 // by side
}

// results are all rows in the order of their first value.
type results struct{ rows []*row }

func (out *results) add(name string, more bool, side string, v float64) {
	i := slices.IndexFunc(out.rows, func(r *row) bool { return r.name == name })
	if i < 0 {
		i = len(out.rows)
		out.rows = append(out.rows, &row{name: name, more: more, values: map[string][]float64{}})
	}
	r := out.rows[i]
	r.values[side] = append(r.values[side], v)
}

func (out *results) cost(name, side string, v float64)       { out.add(name, false, side, v) }
func (out *results) throughput(name, side string, v float64) { out.add(name, true, side, v) }

func (out *results) memory(when, side string, m load.Memory) {
	out.cost("memory "+when+": proportional set size of all processes (MB)", side, float64(m.Proportional)/1e6)
	out.cost("memory "+when+": anonymous, of all processes (MB)", side, float64(m.Anonymous)/1e6)
}

// spread is the median, the least and the most of some values.
type spread struct {
	median, least, most float64
	n                   int
}

func spreadOf(values []float64) spread {
	v := slices.Clone(values)
	slices.Sort(v)
	n := len(v)
	if n == 0 {
		return spread{}
	}
	return spread{median: (v[(n-1)/2] + v[n/2]) / 2, least: v[0], most: v[n-1], n: n}
}

// ratio says how much better knarr is; zero where a side has no value.
func (r *row) ratio() float64 {
	u, k := spreadOf(r.values["upstream"]).median, spreadOf(r.values["knarr"]).median
	if r.more {
		u, k = k, u
	}
	if k == 0 {
		return 0
	}
	return u / k
}

// tsv is the table: medians and their ratio, and then the spreads.
func (out *results) tsv() string {
	var b strings.Builder
	b.WriteString("name\tupstream\tknarr\tratio\tupstream min\tupstream max\tknarr min\tknarr max\truns\n")
	for _, r := range out.rows {
		u, k := spreadOf(r.values["upstream"]), spreadOf(r.values["knarr"])
		ratio := "-"
		if x := r.ratio(); x > 0 {
			ratio = fmt.Sprintf("%.2f", x)
		}
		fmt.Fprintf(&b, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%d\n", r.name, u.number(u.median), k.number(k.median), ratio,
			u.number(u.least), u.number(u.most), k.number(k.least), k.number(k.most), max(u.n, k.n))
	}
	return b.String()
}

// number has as many digits as mean something.
func (s spread) number(v float64) string {
	switch {
	case s.n == 0:
		return "-"
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	case v >= 1:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.3f", v)
}

// The markers between which the page's table lies.
const (
	beginMark = "<!-- bench-compare: what follows is written by `make bench-compare` -->"
	endMark   = "<!-- bench-compare: end -->"
)

// write puts the table into a page, in place of the one that is there.
func (out *results) write(file, about string) error {
	page, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	before, rest, ok := bytes.Cut(page, []byte(beginMark))
	_, after, ok2 := bytes.Cut(rest, []byte(endMark))
	if !ok || !ok2 {
		return fmt.Errorf("%s has no place for the table: the lines %s and %s", file, beginMark, endMark)
	}
	block := fmt.Sprintf("%s\n%s\n```\n%s```\n%s", beginMark, about, out.tsv(), endMark)
	return os.WriteFile(file, slices.Concat(before, []byte(block), after), 0o644)
}

// about tells where and how the table came to be.
func (c config) about(begin time.Time) string {
	first := func(program string, args ...string) string {
		out, _ := exec.Command(program, args...).Output()
		line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
		return line
	}
	commit := first("git", "-C", c.top, "rev-parse", "--short=12", "HEAD")
	if first("git", "-C", c.top, "status", "--porcelain", "-uno") != "" {
		commit += " with changes"
	}
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return fmt.Sprintf(`
| | |
|---|---|
| command | %s |
| commit | %s |
| date | %s, %s long |
| machine | %d cores (%s), %s of memory, Linux %s |
| load of the machine before, by others | %s |
| programs | Kubernetes %s, etcd %s, %s, %s, %s |
`, "`"+c.command()+"`", commit, begin.UTC().Format("2006-01-02 15:04 UTC"), time.Since(begin).Round(time.Second),
		runtime.NumCPU(), field("/proc/cpuinfo", "model name"), field("/proc/meminfo", "MemTotal"), strings.TrimSpace(string(kernel)), c.loadBefore, version, etcdVersion,
		strings.Join(strings.Fields(first("containerd", "--version"))[:3], " "), first("runc", "--version"), runtime.Version())
}

// field is the value of the first line of a file that begins so.
func field(file, name string) string {
	b, _ := os.ReadFile(file)
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == name {
			return strings.TrimSpace(v)
		}
	}
	return "unknown"
}
