package pod

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// ErrNoAddress says that every address of the node's pod range is taken.
var ErrNoAddress = errors.New("pod network: no free address in the node's pod range")

// record is what a sandbox holds, one JSON file per sandbox: <StateDir>/<sandboxID>.json.
type record struct {
	SandboxID string        `json:"sandboxID"`
	Namespace string        `json:"namespace"`
	Name      string        `json:"name"`
	UID       string        `json:"uid"`
	HostLink  string        `json:"hostLink"`
	IPs       []netip.Addr  `json:"ips"` // one per range, in the order of the ranges
	Ports     []PortMapping `json:"ports,omitempty"`
}

// ipam hands out the addresses of the node's ranges. The files are the truth: they are read once at the start, and an address counts as free only
// after its file is gone. They are written without fsync: they need to outlive the process, and after a power loss no sandbox is left either.
// Safe for concurrent use.
type ipam struct {
	dir string

	mu     sync.Mutex
	ranges []netip.Prefix
	taken  map[netip.Addr]string // address -> sandbox
	byID   map[string]record
	next   []netip.Addr // per range: where the search for a free address goes on, so that an address rests before it is used again
}

// openIPAM reads the records in dir, which it makes where it is missing. A file that cannot be read as a record is an error that names it.
func openIPAM(dir string) (*ipam, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("pod network: %w", err)
	}
	p := &ipam{dir: dir, taken: map[netip.Addr]string{}, byID: map[string]record{}}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("pod network: %w", err)
	}
	newest := time.Time{}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if e.Name() == rangesFile {
			continue
		}
		if !strings.HasSuffix(e.Name(), ".json") {
			_ = os.Remove(path) // a write that a crash cut short
			continue
		}
		rec, at, err := readRecord(path)
		if err != nil {
			return nil, err
		}
		p.byID[rec.SandboxID] = rec
		for _, ip := range rec.IPs {
			p.taken[ip] = rec.SandboxID
		}
		if at.After(newest) {
			newest, p.next = at, slices.Clone(rec.IPs)
		}
	}
	return p, nil
}

func readRecord(path string) (rec record, at time.Time, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return rec, at, fmt.Errorf("pod network: %w", err)
	}
	if err := json.Unmarshal(b, &rec); err != nil {
		return rec, at, fmt.Errorf("pod network: %s is damaged (delete it when its pod is gone): %w", path, err)
	}
	if st, err := os.Stat(path); err == nil {
		at = st.ModTime()
	}
	return rec, at, nil
}

// setRanges gives the node's ranges. Records of addresses outside of them stay until their sandboxes go.
func (p *ipam) setRanges(ranges []netip.Prefix) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ranges = ranges
	next := make([]netip.Addr, len(ranges))
	for i, r := range ranges {
		next[i] = r.Addr()
		for _, last := range p.next {
			if r.Contains(last) {
				next[i] = last
			}
		}
	}
	p.next = next
}

// allocate finds an address in each range and writes the record. A sandbox that has one keeps it.
func (p *ipam) allocate(rec record) (record, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if old, ok := p.byID[rec.SandboxID]; ok {
		return old, nil
	}
	rec.IPs = nil
	for i := range p.ranges {
		ip, err := p.freeLocked(i)
		if err != nil {
			return rec, err
		}
		rec.IPs = append(rec.IPs, ip)
	}
	if err := p.write(rec); err != nil {
		return rec, err
	}
	for i, ip := range rec.IPs {
		p.taken[ip] = rec.SandboxID
		p.next[i] = ip
	}
	p.byID[rec.SandboxID] = rec
	return rec, nil
}

// freeLocked searches range i from the last address given out, once around.
func (p *ipam) freeLocked(i int) (netip.Addr, error) {
	r := p.ranges[i]
	ip := p.next[i]
	for range usable(r) + 3 { // 3: the network, the node's own and the broadcast address are passed on the way
		ip = ip.Next()
		if !r.Contains(ip) {
			ip = r.Addr().Next()
		}
		if _, used := p.taken[ip]; !used && !reserved(r, ip) {
			return ip, nil
		}
	}
	return netip.Addr{}, fmt.Errorf("%w (%s, %d pods)", ErrNoAddress, r, len(p.byID))
}

// maxSearch bounds the walk through a range; a node has far fewer pods.
const maxSearch = 1 << 16

// usable is the number of addresses of r that pods can have, at most maxSearch.
func usable(r netip.Prefix) int {
	n := new(big.Int).Lsh(big.NewInt(1), uint(r.Addr().BitLen()-r.Bits()))
	if n.Cmp(big.NewInt(maxSearch)) > 0 {
		return maxSearch
	}
	return int(n.Int64())
}

// NodeAddress is the address of range r that the node itself has: the first after the network address.
func NodeAddress(r netip.Prefix) netip.Addr { return r.Masked().Addr().Next() }

// reserved addresses are the network address, the node's own, and the broadcast address of an IPv4 range.
func reserved(r netip.Prefix, ip netip.Addr) bool {
	if ip == r.Masked().Addr() || ip == NodeAddress(r) {
		return true
	}
	return ip.Is4() && !r.Contains(ip.Next())
}

func (p *ipam) write(rec record) error {
	b, err := json.Marshal(rec)
	if err != nil {
		return fmt.Errorf("pod network: %w", err)
	}
	tmp := filepath.Join(p.dir, rec.SandboxID+".tmp")
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("pod network: keep the address of sandbox %s: %w", rec.SandboxID, err)
	}
	if err := os.Rename(tmp, filepath.Join(p.dir, rec.SandboxID+".json")); err != nil {
		return fmt.Errorf("pod network: keep the address of sandbox %s: %w", rec.SandboxID, err)
	}
	return nil
}

// release gives the addresses of the sandbox back. A sandbox that has none is no error.
func (p *ipam) release(sandboxID string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	rec, ok := p.byID[sandboxID]
	if !ok {
		return nil
	}
	err := os.Remove(filepath.Join(p.dir, sandboxID+".json"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("pod network: free the address of sandbox %s: %w", sandboxID, err)
	}
	for _, ip := range rec.IPs {
		delete(p.taken, ip)
	}
	delete(p.byID, sandboxID)
	return nil
}

func (p *ipam) get(sandboxID string) (record, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	rec, ok := p.byID[sandboxID]
	return rec, ok
}

// all returns every record, in no order.
func (p *ipam) all() []record {
	p.mu.Lock()
	defer p.mu.Unlock()
	recs := make([]record, 0, len(p.byID))
	for _, r := range p.byID {
		recs = append(recs, r)
	}
	return recs
}
