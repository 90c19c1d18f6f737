package service

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The registers of a rule. A register is 4 bytes; an address takes one (IPv4) or four (IPv6). A front lies in reg0 and on as
// address, protocol, port, just as the maps have it in their keys.
const reg0 = unix.NFT_REG32_00

// ruleset writes the rules of one generation into a connection's batch.
type ruleset struct {
	conn     *nftables.Conn
	table    *nftables.Table
	gen      string // suffix of all names
	loopback bool   // node ports answer on 127.0.0.1
}

func (r *ruleset) set(ref setRef) *nftables.Set {
	// The id is for references inside one transaction. Without one the library counts in a global that is not safe for two users.
	s := &nftables.Set{Table: r.table, Name: ref.name() + r.gen, ID: uint32(ref.kind)*2 + 1, KeyByteOrder: binaryutil.BigEndian}
	addr := nftables.TypeIPAddr
	if !ref.ipv4 {
		addr = nftables.TypeIP6Addr
		s.ID++
	}
	id := nftables.TypeMark
	proto, port := nftables.TypeInetProto, nftables.TypeInetService
	front := concat(addr, proto, port)
	target := concat(addr, port)
	switch ref.kind {
	case setSvc, setISvc, setReject:
		s.KeyType, s.IsMap, s.DataType = front, true, nftables.TypeVerdict
	case setSID, setISID:
		s.KeyType, s.IsMap, s.DataType = front, true, id
	case setEP:
		s.KeyType, s.IsMap, s.DataType = concat(id, id), true, target
	case setMember:
		s.KeyType = concat(id, addr, port)
	case setGuarded:
		s.KeyType = front
	case setAllowed:
		s.KeyType, s.Interval = concat(addr, proto, port, addr), true
	case setHairpin:
		s.KeyType = concat(addr, addr)
	case setSticky:
		s.KeyType, s.IsMap, s.DataType = concat(addr, id), true, target
		s.Dynamic, s.HasTimeout, s.Size = true, true, maxAffinity
	default:
		s.KeyType, s.Interval = addr, true
	}
	s.Concatenation = ref.kind < setServices
	return s
}

// concat is a key of several fields. At most five fields fit, and none here has more.
func concat(types ...nftables.SetDatatype) nftables.SetDatatype {
	t, err := nftables.ConcatSetType(types...)
	if err != nil {
		panic(err) // a programming error: the types are constants
	}
	return t
}

// declareSets adds all sets, empty.
func (r *ruleset) declareSets() error {
	for kind := range setKinds {
		for _, ipv4 := range []bool{true, false} {
			ref := setRef{kind, ipv4}
			if err := r.conn.AddSet(r.set(ref), nil); err != nil {
				return fmt.Errorf("services: declare set %s: %w", ref.name(), err)
			}
		}
	}
	return nil
}

func (r *ruleset) chain(name string) *nftables.Chain {
	return &nftables.Chain{Name: name + r.gen, Table: r.table}
}

func (r *ruleset) rule(c *nftables.Chain, parts ...[]expr.Any) {
	var all []expr.Any
	for _, p := range parts {
		all = append(all, p...)
	}
	r.conn.AddRule(&nftables.Rule{Table: r.table, Chain: c, Exprs: all})
}

// declareRefusals adds the chains that verdict maps name besides those of chainSpecs.
func (r *ruleset) declareRefusals() {
	refuse := r.conn.AddChain(r.chain(chainReject))
	r.rule(refuse, protocolIs(unix.IPPROTO_TCP), []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}})
	r.rule(refuse, []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_PORT_UNREACH}})
	discard := r.conn.AddChain(r.chain(chainDrop))
	r.rule(discard, verdict(expr.VerdictDrop, ""))
}

// addSpread adds the chain of one spec.
func (r *ruleset) addSpread(spec chainSpec) {
	c := r.conn.AddChain(r.chain(spec.name()))
	v := family{spec.ipv4}
	ids := setRef{setSID, spec.ipv4}
	if spec.internal {
		ids.kind = setISID
	}
	// The list's id goes to v.id(), behind the room for an address.
	find := join(v.front(spec.node), r.lookup(ids, reg0, v.id()))
	pick := join([]expr.Any{&expr.Numgen{Register: v.id() + 1, Modulus: uint32(spec.n), Type: unix.NFT_NG_RANDOM}},
		r.lookup(setRef{setEP, spec.ipv4}, v.id(), v.target()))
	translate := []expr.Any{&expr.NAT{Type: expr.NATTypeDestNAT, Family: v.nfproto(), RegAddrMin: v.target(), RegProtoMin: v.target() + v.words(), Specified: true}}
	if spec.affinity == 0 {
		r.rule(c, find, pick, translate)
		return
	}
	sticky := setRef{setSticky, spec.ipv4}
	find = join(find, v.source(reg0)) // now reg0 and on is the sticky map's key: client . id
	remembered := r.lookup(sticky, reg0, v.target())
	refresh := r.dynset(sticky, unix.NFT_DYNSET_OP_UPDATE, v, spec.affinity)
	r.rule(c, find, remembered, r.lookup(setRef{setMember, spec.ipv4}, v.id(), 0), refresh, translate)
	const opDelete = 2 // NFT_DYNSET_OP_DELETE: the endpoint is gone
	r.rule(c, find, remembered, r.dynset(sticky, opDelete, v, 0))
	r.rule(c, find, pick, refresh, translate)
}

// dynset changes the sticky map: key client . id in reg0, value target.
func (r *ruleset) dynset(ref setRef, op uint32, v family, seconds uint32) []expr.Any {
	return []expr.Any{&expr.Dynset{SrcRegKey: reg0, SrcRegData: v.target(), SetName: ref.name() + r.gen, Operation: op, Timeout: secondsOf(seconds)}}
}

// lookup ends the rule where the key at src is not in the set; dst 0 is for sets without values.
func (r *ruleset) lookup(ref setRef, src, dst uint32) []expr.Any {
	return []expr.Any{&expr.Lookup{SourceRegister: src, DestRegister: dst, IsDestRegSet: dst != 0, SetName: ref.name() + r.gen}}
}

// without ends the rule where the key at src is in the set.
func (r *ruleset) without(ref setRef, src uint32) []expr.Any {
	return []expr.Any{&expr.Lookup{SourceRegister: src, SetName: ref.name() + r.gen, Invert: true}}
}

// follow goes to the chain that the verdict map has for the key at reg0.
func (r *ruleset) follow(ref setRef) []expr.Any {
	return []expr.Any{&expr.Lookup{SourceRegister: reg0, DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetName: ref.name() + r.gen}}
}

// addRules adds everything besides the spread chains: once this is committed, packets go this generation's way.
func (r *ruleset) addRules() {
	inside, services := r.conn.AddChain(r.chain("internal")), r.conn.AddChain(r.chain("services"))
	refusals := r.conn.AddChain(r.chain("refusals"))
	for _, v := range []family{{true}, {false}} {
		r.rule(inside, v.match(), v.front(false), r.follow(setRef{setISvc, v.ipv4}))
		r.rule(services, v.match(), v.front(false), r.follow(setRef{setSvc, v.ipv4}))
		r.rule(refusals, v.match(), v.front(false), r.follow(setRef{setReject, v.ipv4}))
	}
	for _, v := range []family{{true}, {false}} {
		r.rule(inside, v.match(), toLocal(), v.front(true), r.follow(setRef{setISvc, v.ipv4}))
		r.rule(services, v.match(), toLocal(), v.front(true), r.follow(setRef{setSvc, v.ipv4}))
		r.rule(refusals, v.match(), toLocal(), v.front(true), r.follow(setRef{setReject, v.ipv4}))
	}
	r.unknownServices(refusals)
	r.guard()
	r.translate(inside, services)
	r.refuse(refusals)
	r.postrouting()
}

// unknownServices rejects what is left for the service ranges: other ports of a cluster address and addresses that nobody has. TCP gets a reset in any
// case: the news of an unreachable host is lost on a socket that is just being connected, as it often is when the answer comes from the same
// machine, and then the client waits a second or more.
func (r *ruleset) unknownServices(c *nftables.Chain) {
	for _, v := range []family{{true}, {false}} {
		r.rule(c, v.match(), v.destination(reg0), r.lookup(setRef{setServices, v.ipv4}, reg0, 0), notToLocal(), verdict(expr.VerdictGoto, chainReject+r.gen))
	}
}

func (r *ruleset) base(name string, kind nftables.ChainType, hook *nftables.ChainHook, priority int) *nftables.Chain {
	return r.conn.AddChain(&nftables.Chain{
		Name: name + r.gen, Table: r.table, Type: kind, Hooknum: hook, Priority: nftables.ChainPriorityRef(nftables.ChainPriority(priority)),
	})
}

// guard drops what may not come in at all: packets from outside for loopback addresses, which route_localnet would else let in (CVE-2020-8558), and clients
// outside of loadBalancerSourceRanges.
func (r *ruleset) guard() {
	if r.loopback {
		raw := r.base("raw-prerouting", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, -300)
		v := family{true}
		r.rule(raw, v.match(), notVia(expr.MetaKeyIIFNAME, "lo"), v.destination(reg0), loopbackNet(), verdict(expr.VerdictDrop, ""))
	}
	for name, hook := range map[string]*nftables.ChainHook{"guard-prerouting": nftables.ChainHookPrerouting, "guard-output": nftables.ChainHookOutput} {
		c := r.base(name, nftables.ChainTypeFilter, hook, -110)
		r.rule(c, established(), verdict(expr.VerdictAccept, ""))
		for _, v := range []family{{true}, {false}} {
			r.rule(c, v.match(), v.front(false), r.lookup(setRef{setGuarded, v.ipv4}, reg0, 0),
				v.source(reg0+v.words()+2), r.without(setRef{setAllowed, v.ipv4}, reg0), verdict(expr.VerdictDrop, ""))
		}
	}
}

// translate hooks the service chains in. The node itself and pods are internal clients.
func (r *ruleset) translate(inside, services *nftables.Chain) {
	pre := r.base("nat-prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, -100)
	for _, v := range []family{{true}, {false}} {
		r.rule(pre, v.match(), v.source(reg0), r.lookup(setRef{setCluster, v.ipv4}, reg0, 0), verdict(expr.VerdictJump, inside.Name))
	}
	r.rule(pre, verdict(expr.VerdictJump, services.Name))
	out := r.base("nat-output", nftables.ChainTypeNAT, nftables.ChainHookOutput, -100)
	r.rule(out, verdict(expr.VerdictJump, inside.Name))
	r.rule(out, verdict(expr.VerdictJump, services.Name))
}

// refuse hooks the refusals in, behind the translation. Packets of connections that exist pass at once.
func (r *ruleset) refuse(refusals *nftables.Chain) {
	for name, hook := range map[string]*nftables.ChainHook{"prerouting": nftables.ChainHookPrerouting, "output": nftables.ChainHookOutput} {
		priority := -90
		if name == "output" {
			priority = 0
		}
		c := r.base(name, nftables.ChainTypeFilter, hook, priority)
		r.rule(c, established(), verdict(expr.VerdictAccept, ""))
		r.rule(c, verdict(expr.VerdictJump, refusals.Name))
	}
}

// postrouting masquerades, decided by addresses and without packet marks:
//   - an endpoint that reached itself through a service, because it would answer itself directly;
//   - what a process of the node sent from a loopback address to a port that led elsewhere;
//   - a client from elsewhere whose connection to one of our fronts goes on to another node, because that node would answer the client directly.
//     Connections to endpoints on this node keep the client's address: the answer passes here anyway;
//   - what pods, and nodes that this machine hosts, send to the outside of the cluster.
func (r *ruleset) postrouting() {
	c := r.base("nat-postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, 100)
	masquerade := []expr.Any{&expr.Masq{FullyRandom: true}}
	loop := family{true}
	r.rule(c, loop.match(), notVia(expr.MetaKeyOIFNAME, "lo"), loop.source(reg0), loopbackNet(), masquerade)
	for _, v := range []family{{true}, {false}} {
		own := setRef{setOwnPods, v.ipv4}
		r.rule(c, v.match(), v.source(reg0), v.destination(reg0+v.words()), r.lookup(setRef{setHairpin, v.ipv4}, reg0, 0), masquerade)
		passing := join(v.match(), translated(), v.source(reg0), r.without(own, reg0), v.destination(reg0), r.without(own, reg0), notFromLocal())
		for _, node := range []bool{false, true} {
			for _, ids := range []setKind{setSID, setISID} {
				r.rule(c, passing, v.originalFront(node), r.lookup(setRef{ids, v.ipv4}, reg0, v.id()), masquerade)
			}
		}
		r.rule(c, v.match(), v.source(reg0), r.lookup(setRef{setHosted, v.ipv4}, reg0, 0), v.destination(reg0), r.without(setRef{setInside, v.ipv4}, reg0), masquerade)
	}
}

// family gives the expressions and the register layout of IPv4 or IPv6.
type family struct{ ipv4 bool }

// words is the number of registers of an address.
func (f family) words() uint32 {
	if f.ipv4 {
		return 1
	}
	return 4
}

// id is the register behind an address at reg0: of the protocol while a front is looked up, then of the list's id.
func (f family) id() uint32 { return reg0 + f.words() }

// target is where an endpoint's address goes, its port behind it.
func (f family) target() uint32 { return f.id() + 1 }

func (f family) nfproto() uint32 {
	if f.ipv4 {
		return unix.NFPROTO_IPV4
	}
	return unix.NFPROTO_IPV6
}

// match ends the rule for packets of the other family.
func (f family) match() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg0},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: []byte{byte(f.nfproto())}},
	}
}

func (f family) source(reg uint32) []expr.Any {
	if f.ipv4 {
		return []expr.Any{&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4}}
	}
	return []expr.Any{&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: 8, Len: 16}}
}

func (f family) destination(reg uint32) []expr.Any {
	if f.ipv4 {
		return []expr.Any{&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4}}
	}
	return []expr.Any{&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: 24, Len: 16}}
}

// front loads what the packet addresses; node puts the unspecified address in place of the destination.
func (f family) front(node bool) []expr.Any {
	addr := f.destination(reg0)
	if node {
		addr = f.nobody()
	}
	return join(addr, []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg0 + f.words()},
		&expr.Payload{DestRegister: reg0 + f.words() + 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
	})
}

func (f family) nobody() []expr.Any {
	return []expr.Any{&expr.Immediate{Register: reg0, Data: make([]byte, 4*f.words())}}
}

// originalFront loads what the client addressed, before the translation.
func (f family) originalFront(node bool) []expr.Any {
	// The key takes 16 bytes in a table of the inet family, of which IPv4 fills the first four; what follows is loaded over the rest.
	addr := []expr.Any{&expr.Ct{Key: expr.CtKeyDST, Register: reg0, Direction: 0}}
	if node {
		addr = f.nobody()
	}
	return join(addr, []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg0 + f.words()},
		&expr.Ct{Key: expr.CtKeyPROTODST, Register: reg0 + f.words() + 1, Direction: 0},
	})
}

func join(parts ...[]expr.Any) (out []expr.Any) {
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}

func verdict(kind expr.VerdictKind, chain string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: kind, Chain: chain}}
}

func protocolIs(proto byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg0},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: []byte{proto}},
	}
}

// scratch is a register that no address or front at reg0 reaches.
const scratch = reg0 + 12

func addressType(fib *expr.Fib, op expr.CmpOp) []expr.Any {
	fib.Register, fib.ResultADDRTYPE = scratch, true
	return []expr.Any{fib, &expr.Cmp{Op: op, Register: scratch, Data: native(unix.RTN_LOCAL)}}
}

func toLocal() []expr.Any    { return addressType(&expr.Fib{FlagDADDR: true}, expr.CmpOpEq) }
func notToLocal() []expr.Any { return addressType(&expr.Fib{FlagDADDR: true}, expr.CmpOpNeq) }

func notFromLocal() []expr.Any { return addressType(&expr.Fib{FlagSADDR: true}, expr.CmpOpNeq) }

// notVia ends the rule for packets of the link.
func notVia(key expr.MetaKey, link string) []expr.Any {
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, link)
	return []expr.Any{
		&expr.Meta{Key: key, Register: scratch - 8},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: scratch - 8, Data: name},
	}
}

// loopbackNet ends the rule unless the address at reg0 is in 127.0.0.0/8.
func loopbackNet() []expr.Any {
	return []expr.Any{
		&expr.Bitwise{SourceRegister: reg0, DestRegister: reg0, Len: 4, Mask: []byte{255, 0, 0, 0}, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: []byte{127, 0, 0, 0}},
	}
}

// ctBits ends the rule unless the connection has one of the bits.
func ctBits(key expr.CtKey, bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: key, Register: reg0},
		&expr.Bitwise{SourceRegister: reg0, DestRegister: reg0, Len: 4, Mask: native(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg0, Data: make([]byte, 4)},
	}
}

func established() []expr.Any {
	return ctBits(expr.CtKeySTATE, expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED)
}

func translated() []expr.Any {
	const dnat = 1 << 5 // IPS_DST_NAT
	return ctBits(expr.CtKeySTATUS, dnat)
}

func secondsOf(n uint32) time.Duration { return time.Duration(n) * time.Second }

func native(n uint32) []byte {
	b := make([]byte, 4)
	binary.NativeEndian.PutUint32(b, n)
	return b
}
