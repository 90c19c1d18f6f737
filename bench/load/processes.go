package load

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cpuClock is what the kernel adds to a process's number to name its scheduler clock: see clock_getcpuclockid(3).
const cpuClock = 2

// PIDs are the processes that a measurement watches; none is allowed.
type PIDs []int

// CPU is the processor time that the processes have used, user and system, all threads, also those that have ended, to the
// nanosecond. Processes that have ended count as none.
func (p PIDs) CPU() time.Duration {
	var sum time.Duration
	for _, pid := range p {
		var t unix.Timespec
		if unix.ClockGettime(int32(^pid<<3|cpuClock), &t) == nil {
			sum += time.Duration(t.Nano())
		}
	}
	return sum
}

// Memory is what processes hold, in bytes.
type Memory struct {
	// Proportional counts shared pages in proportion (Pss); Anonymous is the part of no file.
	Proportional, Anonymous int64
}

// Memory of the processes. Processes that have ended count as none.
func (p PIDs) Memory() Memory {
	var m Memory
	for _, pid := range p {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if len(f) < 2 {
				continue
			}
			n, _ := strconv.ParseInt(f[1], 10, 64)
			switch f[0] {
			case "Pss:":
				m.Proportional += n << 10
			case "Anonymous:":
				m.Anonymous += n << 10
			}
		}
	}
	return m
}

// Wakeups is how often threads of the processes have gone to sleep of their own will; threads that have ended count as none.
func (p PIDs) Wakeups() int64 {
	var sum int64
	for _, pid := range p {
		threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
		for _, t := range threads {
			b, _ := os.ReadFile(t)
			if _, after, ok := strings.Cut(string(b), "\nvoluntary_ctxt_switches:"); ok {
				n, _ := strconv.ParseInt(strings.Fields(after)[0], 10, 64)
				sum += n
			}
		}
	}
	return sum
}

// Group is processes that are reported together: those of PIDs and all that are or were in a control group.
type Group struct {
	Name string
	PIDs PIDs
	// Cgroup is a directory of the cpuacct controller of cgroup v1 or of cgroup v2; empty: none. Its processor time includes that of
	// processes that have ended.
	Cgroup string
}

// Groups are what a load watches; none is allowed.
type Groups []Group

// ParseGroups reads "1,2" (one group, "server") or "server=1,2;all=/sys/fs/cgroup/cpuacct/x": processes and control groups.
func ParseGroups(s string) (Groups, error) {
	var out Groups
	for part := range strings.SplitSeq(s, ";") {
		if part == "" {
			continue
		}
		g := Group{Name: "server"}
		if name, rest, ok := strings.Cut(part, "="); ok {
			g.Name, part = name, rest
		}
		for f := range strings.SplitSeq(part, ",") {
			if strings.HasPrefix(f, "/") && g.Cgroup == "" {
				g.Cgroup = f
			} else if pid, err := strconv.Atoi(f); err == nil && pid > 0 {
				g.PIDs = append(g.PIDs, pid)
			} else {
				return nil, fmt.Errorf("%q is no process id and no (first) directory of a control group", f)
			}
		}
		out = append(out, g)
	}
	return out, nil
}

// CPU is the processor time of the group so far.
func (g Group) CPU() time.Duration {
	sum := g.PIDs.CPU()
	if g.Cgroup == "" {
		return sum
	}
	if b, err := os.ReadFile(filepath.Join(g.Cgroup, "cpuacct.usage")); err == nil {
		n, _ := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
		return sum + time.Duration(n)
	}
	b, _ := os.ReadFile(filepath.Join(g.Cgroup, "cpu.stat"))
	if _, after, ok := strings.Cut(string(b), "usage_usec "); ok {
		n, _ := strconv.ParseInt(strings.Fields(after)[0], 10, 64)
		sum += time.Duration(n) * time.Microsecond
	}
	return sum
}

// All are the processes of the group now.
func (g Group) All() PIDs {
	out := append(PIDs{}, g.PIDs...)
	if g.Cgroup == "" {
		return out
	}
	_ = filepath.WalkDir(g.Cgroup, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.Name() != "cgroup.procs" {
			return nil // a group that went away meanwhile
		}
		b, _ := os.ReadFile(path)
		for f := range strings.FieldsSeq(string(b)) {
			if pid, err := strconv.Atoi(f); err == nil {
				out = append(out, pid)
			}
		}
		return nil
	})
	return out
}

// CPU is the processor time of each group so far.
func (gs Groups) CPU() map[string]time.Duration {
	out := map[string]time.Duration{}
	for _, g := range gs {
		out[g.Name] = g.CPU()
	}
	return out
}

// Since is what each group has spent since CPU said before.
func (gs Groups) Since(before map[string]time.Duration) map[string]time.Duration {
	out := gs.CPU()
	for name := range out {
		out[name] -= before[name]
	}
	return out
}

// Memory of each group.
func (gs Groups) Memory() map[string]Memory {
	out := map[string]Memory{}
	for _, g := range gs {
		out[g.Name] = g.All().Memory()
	}
	return out
}
