package service

import (
	"encoding/binary"
	"fmt"
	"net/netip"
)

// setKind is one set or map of the table; each exists once per family.
type setKind uint8

const (
	setSvc      setKind = iota // front -> chain, for everybody whom setISvc does not catch
	setSID                     // front -> list id
	setISvc                    // front -> chain, for internal clients where they differ
	setISID                    // front -> list id, likewise
	setEP                      // list id . slot -> target
	setReject                  // front -> chain that rejects or drops
	setMember                  // list id . target: which remembered endpoints are still good
	setGuarded                 // front with source ranges
	setAllowed                 // front . source range
	setHairpin                 // address . address of endpoints on this node
	setSticky                  // client . list id -> target; filled by packets, with a timeout
	setServices                // service ranges
	setCluster                 // pod ranges of the cluster
	setOwnPods                 // pod ranges of this node
	setHosted                  // those and Options.MasqueradeSources
	setInside                  // destinations that are never masqueraded: pods, services, nodes
	setKinds
)

// setNames are the names in the table, before the family's digit.
var setNames = [setKinds]string{"svc", "sid", "isvc", "isid", "ep", "reject", "member", "guarded", "allowed", "hairpin", "sticky", "services", "cluster", "ownpods", "hosted", "inside"}

// setRef names one set of the table without its generation.
type setRef struct {
	kind setKind
	ipv4 bool
}

func (s setRef) name() string { return setNames[s.kind] + digit(s.ipv4) }

func digit(ipv4 bool) string {
	if ipv4 {
		return "4"
	}
	return "6"
}

// elemKey identifies an element.
type elemKey struct {
	set setRef
	key string // bytes of the key, or of the start of an interval
	end string // bytes of the end of an interval in a concatenation, inclusive; else ""
}

// elemValue is what a map holds for it.
type elemValue struct {
	data  string // bytes of the value
	chain string // chain of a verdict, without generation; "" for values
}

type elements map[elemKey]elemValue

// chainSpec describes a chain that spreads connections over a list. All services with equal specs share it.
type chainSpec struct {
	ipv4     bool
	node     bool // the front has the unspecified address
	internal bool // lists come from setISID
	n        int  // endpoints
	affinity uint32
}

func (c chainSpec) name() string {
	kind := "a"
	if c.node {
		kind = "n"
	}
	if c.internal {
		kind = "i" + kind
	}
	name := fmt.Sprintf("lb%s-%s%d", digit(c.ipv4), kind, c.n)
	if c.affinity > 0 {
		name += fmt.Sprintf("-t%d", c.affinity)
	}
	return name
}

const (
	chainReject = "refuse" // TCP reset, or ICMP port unreachable
	chainDrop   = "discard"
)

// render turns a plan into elements, and names the chains that they lead to. It is a pure function: rendering an old plan again tells what to delete.
func render(p *plan, chains map[string]chainSpec) elements {
	out := elements{}
	if p == nil {
		return out
	}
	for _, l := range p.lists {
		renderList(out, l)
	}
	for _, b := range p.bindings {
		renderBinding(out, chains, p, b)
	}
	return out
}

func renderList(out elements, l list) {
	ipv4 := l.key.ipv4
	for slot, t := range l.targets {
		out[elemKey{set: setRef{setEP, ipv4}, key: word(l.id) + word(uint32(slot))}] = elemValue{data: targetBytes(t)}
		if l.affinity > 0 {
			out[elemKey{set: setRef{setMember, ipv4}, key: word(l.id) + targetBytes(t)}] = elemValue{}
		}
	}
}

func renderBinding(out elements, chains map[string]chainSpec, p *plan, b binding) {
	ipv4 := b.front.addr.Is4()
	key := frontBytes(b.front)
	lead := func(verdicts, ids setKind, index int) {
		l := p.lists[index]
		spec := chainSpec{ipv4: ipv4, node: b.front.addr.IsUnspecified(), internal: verdicts == setISvc, n: len(l.targets), affinity: l.affinity}
		chains[spec.name()] = spec
		out[elemKey{set: setRef{verdicts, ipv4}, key: key}] = elemValue{chain: spec.name()}
		out[elemKey{set: setRef{ids, ipv4}, key: key}] = elemValue{data: word(l.id)}
	}
	if b.internal >= 0 && b.internal != b.external {
		lead(setISvc, setISID, b.internal)
	}
	switch b.external {
	case toReject:
		out[elemKey{set: setRef{setReject, ipv4}, key: key}] = elemValue{chain: chainReject}
	case toDrop:
		out[elemKey{set: setRef{setReject, ipv4}, key: key}] = elemValue{chain: chainDrop}
	default:
		lead(setSvc, setSID, b.external)
	}
	if b.allow == nil {
		return
	}
	out[elemKey{set: setRef{setGuarded, ipv4}, key: key}] = elemValue{}
	for _, r := range merge(b.allow) {
		out[elemKey{set: setRef{setAllowed, ipv4}, key: key + string(r.Addr().AsSlice()), end: key + string(lastOf(r).AsSlice())}] = elemValue{}
	}
}

// diff says what to delete and what to add to get from old to new; a changed value is both.
func diff(old, new elements) (del, add elements) {
	del, add = elements{}, elements{}
	for k, v := range old {
		if n, ok := new[k]; !ok || n != v {
			del[k] = v
		}
	}
	for k, v := range new {
		if o, ok := old[k]; !ok || o != v {
			add[k] = v
		}
	}
	return del, add
}

// word is a number as registers hold it.
func word(n uint32) string {
	var b [4]byte
	binary.NativeEndian.PutUint32(b[:], n)
	return string(b[:])
}

// portBytes is a port in network order, padded to a register.
func portBytes(p uint16) string { return string([]byte{byte(p >> 8), byte(p), 0, 0}) }

func frontBytes(f front) string {
	return string(f.addr.AsSlice()) + string([]byte{f.proto, 0, 0, 0}) + portBytes(f.port)
}

func targetBytes(t netip.AddrPort) string {
	return string(t.Addr().AsSlice()) + portBytes(t.Port())
}

// hairpinKey is the element for an endpoint that may reach itself through a service.
func hairpinKey(ip netip.Addr) elemKey {
	b := string(ip.AsSlice())
	return elemKey{set: setRef{setHairpin, ip.Is4()}, key: b + b}
}

// lastOf is the last address of a prefix.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	ip, _ := netip.AddrFromSlice(b)
	return ip
}

// merge drops prefixes that lie within others: interval sets refuse overlaps.
func merge(in []netip.Prefix) (out []netip.Prefix) {
	for i, p := range in {
		p = p.Masked()
		covered := false
		for j, q := range in {
			q = q.Masked()
			if i != j && q.Contains(p.Addr()) && (q.Bits() < p.Bits() || q.Bits() == p.Bits() && j < i) {
				covered = true
			}
		}
		if !covered {
			out = append(out, p)
		}
	}
	return out
}
