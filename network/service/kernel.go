package service

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	mnl "github.com/mdlayher/netlink"
	vns "github.com/vishvananda/netns"

	"knarr/network/netns"
)

// kernel writes the table of one namespace. It is used by one goroutine.
type kernel struct {
	ns       vns.NsHandle
	conn     *nftables.Conn
	table    *nftables.Table
	loopback bool

	gen    string               // suffix of what is live; "" before the first rebuild
	chains map[string]chainSpec // spread chains of the live generation
}

func openKernel(nsPath string, loopback bool) (*kernel, error) {
	ns, err := netns.Open(nsPath)
	if err != nil {
		return nil, err
	}
	conn, err := nftables.New(nftables.AsLasting(), nftables.WithNetNSFd(int(ns)), nftables.WithSockOptions(func(c *mnl.Conn) error {
		return errors.Join(c.SetReadBuffer(socketBuffer), c.SetWriteBuffer(socketBuffer))
	}))
	if err != nil {
		ns.Close()
		return nil, fmt.Errorf("services: open an nftables socket: %w", err)
	}
	return &kernel{ns: ns, conn: conn, loopback: loopback, table: &nftables.Table{Name: TableName, Family: nftables.TableFamilyINet}}, nil
}

func (k *kernel) close() {
	_ = k.conn.CloseLasting()
	k.ns.Close()
}

// content is everything that a generation holds.
type content struct {
	elements []elements // one per plan, so that no second copy is made
	ranges   map[setRef][]netip.Prefix
	chains   map[string]chainSpec
}

// rebuild makes a new generation from c and puts it in the place of whatever the table holds. Until its last transaction the old rules work.
func (k *kernel) rebuild(c content) error {
	chains, sets, err := k.existing()
	if err != nil {
		return err
	}
	r := &ruleset{conn: k.conn, table: k.table, gen: nextGeneration(chains, sets), loopback: k.loopback}
	k.conn.AddTable(k.table)
	if err := r.declareSets(); err != nil {
		return err
	}
	r.declareRefusals()
	for _, spec := range c.chains {
		r.addSpread(spec)
	}
	if err := k.commit("declare the sets"); err != nil {
		return err
	}
	if err := k.fill(r, c); err != nil {
		return err
	}
	r.addRules()
	k.discard(chains, sets)
	if err := k.commit("make the new rules live"); err != nil {
		return err
	}
	k.gen, k.chains = r.gen, c.chains
	return nil
}

// fill puts the elements into the sets of a generation that no rule uses yet, in transactions of elementsPerTx.
func (k *kernel) fill(r *ruleset, c content) error {
	pending := 0
	for _, els := range c.elements {
		k.queue(r, els, k.conn.SetAddElements)
		if pending += len(els); pending >= elementsPerTx {
			if err := k.commit("fill the sets"); err != nil {
				return err
			}
			pending = 0
		}
	}
	for ref, prefixes := range c.ranges {
		if err := k.addRanges(r, ref, prefixes); err != nil {
			return err
		}
	}
	return k.commit("fill the sets")
}

// change replaces elements of the live generation, in one transaction. New spread chains come with it.
func (k *kernel) change(del, add elements, chains map[string]chainSpec, ranges map[setRef][]netip.Prefix) error {
	r := &ruleset{conn: k.conn, table: k.table, gen: k.gen, loopback: k.loopback}
	for name, spec := range chains {
		if _, ok := k.chains[name]; !ok {
			r.addSpread(spec)
		}
	}
	k.queue(r, del, k.conn.SetDeleteElements)
	k.queue(r, add, k.conn.SetAddElements)
	for ref, prefixes := range ranges {
		k.conn.FlushSet(r.set(ref))
		if err := k.addRanges(r, ref, prefixes); err != nil {
			return err
		}
	}
	if err := k.commit("change the rules"); err != nil {
		return err
	}
	for name, spec := range chains {
		k.chains[name] = spec
	}
	return nil
}

// queue puts elements into the batch, set by set, elementsPerMsg at a time.
func (k *kernel) queue(r *ruleset, els elements, op func(*nftables.Set, []nftables.SetElement) error) {
	bySet := map[setRef][]nftables.SetElement{}
	send := func(ref setRef) {
		// The only error is that of anonymous sets and of lengths that cannot occur here; a wrong message makes the commit fail.
		_ = op(r.set(ref), bySet[ref])
		bySet[ref] = bySet[ref][:0]
	}
	for key, v := range els {
		e := nftables.SetElement{Key: []byte(key.key)}
		if key.end != "" {
			e.KeyEnd = []byte(key.end)
		}
		if v.chain != "" {
			e.VerdictData = &expr.Verdict{Kind: expr.VerdictGoto, Chain: v.chain + r.gen}
		} else if v.data != "" {
			e.Val = []byte(v.data)
		}
		if bySet[key.set] = append(bySet[key.set], e); len(bySet[key.set]) == elementsPerMsg {
			send(key.set)
		}
	}
	for ref, rest := range bySet {
		if len(rest) > 0 {
			send(ref)
		}
	}
}

// addRanges fills an interval set; its ends are exclusive.
func (k *kernel) addRanges(r *ruleset, ref setRef, prefixes []netip.Prefix) error {
	var els []nftables.SetElement
	for _, p := range merge(prefixes) {
		els = append(els, nftables.SetElement{Key: p.Addr().AsSlice()})
		if end := lastOf(p).Next(); end.IsValid() {
			els = append(els, nftables.SetElement{Key: end.AsSlice(), IntervalEnd: true})
		}
	}
	if len(els) == 0 {
		return nil
	}
	return k.conn.SetAddElements(r.set(ref), els)
}

func (k *kernel) commit(what string) error {
	if err := k.conn.Flush(); err != nil {
		return fmt.Errorf("services: %s: %w", what, err)
	}
	return nil
}

// existing lists what the table holds.
func (k *kernel) existing() (chains []string, sets []string, err error) {
	all, err := k.conn.ListChainsOfTableFamily(k.table.Family)
	if err != nil {
		return nil, nil, fmt.Errorf("services: list chains: %w", err)
	}
	for _, c := range all {
		if c.Table.Name == TableName {
			chains = append(chains, c.Name)
		}
	}
	if len(chains) == 0 { // asking for the sets of a table that is not there is an error
		tables, err := k.conn.ListTablesOfFamily(k.table.Family)
		if err != nil {
			return nil, nil, fmt.Errorf("services: list tables: %w", err)
		}
		found := false
		for _, t := range tables {
			found = found || t.Name == TableName
		}
		if !found {
			return nil, nil, nil
		}
	}
	have, err := k.conn.GetSets(k.table)
	if err != nil {
		return nil, nil, fmt.Errorf("services: list sets: %w", err)
	}
	for _, s := range have {
		sets = append(sets, s.Name)
	}
	return chains, sets, nil
}

// intact says whether the live generation is still there.
func (k *kernel) intact() (bool, error) {
	chains, sets, err := k.existing()
	return err == nil && slices.Contains(chains, "nat-prerouting"+k.gen) && slices.Contains(sets, setRef{setSvc, true}.name()+k.gen), err
}

// discard queues the deletion of chains and sets: rules first, because they hold the sets, then sets, because they hold the chains.
func (k *kernel) discard(chains, sets []string) {
	for _, name := range chains {
		k.conn.FlushChain(&nftables.Chain{Table: k.table, Name: name})
	}
	for _, name := range sets {
		k.conn.DelSet(&nftables.Set{Table: k.table, Name: name})
	}
	for _, name := range chains {
		k.conn.DelChain(&nftables.Chain{Table: k.table, Name: name})
	}
}

// nextGeneration is a suffix that none of the names has.
func nextGeneration(names ...[]string) string {
	highest := 0
	for _, list := range names {
		for _, name := range list {
			if i := strings.LastIndex(name, ".g"); i >= 0 {
				if n, err := strconv.Atoi(name[i+2:]); err == nil {
					highest = max(highest, n)
				}
			}
		}
	}
	return fmt.Sprintf(".g%d", highest+1)
}

// foreignDrops finds chains of others that drop what is forwarded: docker and ufw set them up. Pods behind them cannot reach each other.
func (k *kernel) foreignDrops() ([]string, error) {
	chains, err := k.conn.ListChains()
	if err != nil {
		return nil, fmt.Errorf("services: list chains: %w", err)
	}
	var out []string
	for _, c := range chains {
		if c.Table.Name == TableName || c.Hooknum == nil || *c.Hooknum != *nftables.ChainHookForward || c.Policy == nil || *c.Policy != nftables.ChainPolicyDrop {
			continue
		}
		out = append(out, fmt.Sprintf("table %s, chain %s drops forwarded packets by default: allow the pod ranges there, for example: nft insert rule %s %s %s accept",
			c.Table.Name, c.Name, familyName(c.Table.Family), c.Table.Name, c.Name))
	}
	return out, nil
}

func familyName(f nftables.TableFamily) string {
	switch f {
	case nftables.TableFamilyIPv4:
		return "ip"
	case nftables.TableFamilyIPv6:
		return "ip6"
	case nftables.TableFamilyINet:
		return "inet"
	}
	return "bridge"
}
