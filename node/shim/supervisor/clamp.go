//go:build cgo

package supervisor

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/moby/sys/capability"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// limits is what this process itself may do, read once at start. Containers
// are asked for no more, because libcontainer fails where the kernel refuses.
type limits struct {
	capabilities map[string]bool
	// resource: CAP_SYS_RESOURCE, which allows to raise hard limits and to lower
	// oom_score_adj.
	resource bool
	// oomScoreAdj is our own value at start, and the floor without resource.
	oomScoreAdj int
}

func ownLimits() (*limits, error) {
	caps, err := capability.NewPid2(0)
	if err != nil {
		return nil, err
	}
	if err := caps.Load(); err != nil {
		return nil, fmt.Errorf("read own capabilities: %w", err)
	}
	l := &limits{capabilities: map[string]bool{}}
	for _, c := range capability.ListKnown() {
		if caps.Get(capability.PERMITTED, c) && caps.Get(capability.BOUNDING, c) {
			l.capabilities["CAP_"+strings.ToUpper(c.String())] = true
		}
	}
	l.resource = l.capabilities["CAP_SYS_RESOURCE"]
	data, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		return nil, err
	}
	l.oomScoreAdj, err = strconv.Atoi(strings.TrimSpace(string(data)))
	return l, err
}

// clamp lowers the wishes of spec to what we may grant. A container in a user
// namespace has every capability there, so its sets stay.
func (l *limits) clamp(spec *specs.Spec) {
	p := spec.Process
	if p == nil {
		return
	}
	if p.Capabilities != nil && !hasUserNamespace(spec) {
		c := *p.Capabilities
		for _, set := range []*[]string{&c.Bounding, &c.Effective, &c.Inheritable, &c.Permitted, &c.Ambient} {
			*set = l.known(*set)
		}
		p.Capabilities = &c
	}
	p.Rlimits = l.clampRlimits(p.Rlimits)
	adj := l.oomScoreAdj
	if p.OOMScoreAdj != nil {
		adj = *p.OOMScoreAdj
	}
	if !l.resource {
		adj = max(adj, l.oomScoreAdj)
	}
	p.OOMScoreAdj = &adj
}

func (l *limits) known(set []string) []string {
	out := make([]string, 0, len(set))
	for _, name := range set {
		if l.capabilities[name] {
			out = append(out, name)
		}
	}
	return out
}

func hasUserNamespace(spec *specs.Spec) bool {
	if spec.Linux == nil {
		return false
	}
	for _, ns := range spec.Linux.Namespaces {
		if ns.Type == specs.UserNamespace {
			return true
		}
	}
	return false
}

var rlimitNumbers = map[string]int{
	"RLIMIT_CPU": unix.RLIMIT_CPU, "RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_DATA": unix.RLIMIT_DATA,
	"RLIMIT_STACK": unix.RLIMIT_STACK, "RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_RSS": unix.RLIMIT_RSS,
	"RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_NOFILE": unix.RLIMIT_NOFILE, "RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK,
	"RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS, "RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING,
	"RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE, "RLIMIT_NICE": unix.RLIMIT_NICE, "RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO,
	"RLIMIT_RTTIME": unix.RLIMIT_RTTIME,
}

func (l *limits) clampRlimits(in []specs.POSIXRlimit) []specs.POSIXRlimit {
	if l.resource {
		return in
	}
	out := make([]specs.POSIXRlimit, 0, len(in))
	for _, r := range in {
		number, ok := rlimitNumbers[r.Type]
		var own unix.Rlimit
		if ok && unix.Getrlimit(number, &own) == nil {
			r.Hard = min(r.Hard, own.Max)
			r.Soft = min(r.Soft, r.Hard)
		}
		out = append(out, r)
	}
	return out
}
