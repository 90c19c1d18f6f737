package dns

import (
	"context"
	"math/rand/v2"
	"net/netip"
	"strings"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/pkg/dnsutil"
	"github.com/coredns/coredns/plugin/pkg/upstream"
	"github.com/coredns/coredns/request"
	"github.com/miekg/dns"
)

// cluster is the CoreDNS handler for the cluster's zone and for reverse names of its ranges. What is neither goes to next.
type cluster struct {
	zone    string // with the final dot, in lower case
	ranges  []netip.Prefix
	servers []netip.Addr // addresses of ns.dns.<zone>
	records *records
	synced  func() bool
	next    plugin.Handler
}

// Name implements plugin.Handler.
func (c *cluster) Name() string { return "knarr" }

// chainKey counts, in a context, how many ExternalName services led to this question.
type chainKey struct{}

// ServeDNS implements plugin.Handler.
func (c *cluster) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	state := request.Request{W: w, Req: r}
	name := state.Name() // lower case
	inZone := dns.IsSubDomain(c.zone, name)
	ip, isReverse := c.reverseAddress(name)
	if !inZone && !isReverse {
		return c.next.ServeDNS(ctx, w, r)
	}
	if !c.synced() {
		return dns.RcodeServerFailure, nil // clients ask again; a "no such name" would be remembered
	}
	m := new(dns.Msg)
	m.SetReply(r)
	m.Authoritative = true
	exists := true
	switch {
	case isReverse:
		exists = c.answerReverse(m, &state, ip)
	case !c.answerFixed(m, &state, name):
		labels := dns.SplitDomainName(strings.TrimSuffix(name, c.zone))
		exists = c.answer(ctx, m, &state, c.records.lookup(labels, state.QType() == dns.TypeSRV))
	}
	if !exists {
		m.Rcode = dns.RcodeNameError
	}
	if len(m.Answer) == 0 {
		m.Ns = []dns.RR{c.soa()}
	}
	if err := w.WriteMsg(m); err != nil {
		return dns.RcodeServerFailure, err
	}
	return dns.RcodeSuccess, nil
}

// reverseAddress reads the address of a reverse name; ok says that it lies in our ranges.
func (c *cluster) reverseAddress(name string) (ip netip.Addr, ok bool) {
	s := dnsutil.ExtractAddressFromReverse(name)
	if s == "" {
		return ip, false
	}
	ip, err := netip.ParseAddr(s)
	if err != nil {
		return ip, false
	}
	for _, r := range c.ranges {
		if r.Contains(ip) {
			return ip, true
		}
	}
	return ip, false
}

func (c *cluster) answerReverse(m *dns.Msg, state *request.Request, ip netip.Addr) (exists bool) {
	names := c.records.reverse(ip)
	if state.QType() == dns.TypePTR {
		for _, n := range names {
			m.Answer = append(m.Answer, &dns.PTR{Hdr: header(state.QName(), dns.TypePTR), Ptr: n + "." + c.zone})
		}
	}
	return len(names) > 0
}

// answerFixed answers for the names that do not depend on objects; false says that name is none of them.
func (c *cluster) answerFixed(m *dns.Msg, state *request.Request, name string) bool {
	switch name {
	case c.zone:
		switch state.QType() {
		case dns.TypeSOA:
			m.Answer = []dns.RR{c.soa()}
		case dns.TypeNS:
			m.Answer = []dns.RR{&dns.NS{Hdr: header(state.QName(), dns.TypeNS), Ns: "ns.dns." + c.zone}}
			m.Extra = c.serverRecords("ns.dns."+c.zone, dns.TypeA, dns.TypeAAAA)
		}
	case "dns." + c.zone:
	case "ns.dns." + c.zone:
		m.Answer = c.serverRecords(state.QName(), state.QType())
	case "dns-version." + c.zone:
		if state.QType() == dns.TypeTXT {
			m.Answer = []dns.RR{&dns.TXT{Hdr: header(state.QName(), dns.TypeTXT), Txt: []string{specVersion}}}
		}
	default:
		return false
	}
	return true
}

func (c *cluster) serverRecords(name string, types ...uint16) (out []dns.RR) {
	for _, ip := range c.servers {
		for _, t := range types {
			if rr := address(name, ip); rr.Header().Rrtype == t {
				out = append(out, rr)
			}
		}
	}
	return out
}

// answer turns what the objects say into records. exists is false for a name that is not there.
func (c *cluster) answer(ctx context.Context, m *dns.Msg, state *request.Request, res result) (exists bool) {
	if res.cname != "" {
		c.follow(ctx, m, state, res.cname)
		return true
	}
	rand.Shuffle(len(res.hosts), func(i, j int) { res.hosts[i], res.hosts[j] = res.hosts[j], res.hosts[i] })
	switch qtype := state.QType(); qtype {
	case dns.TypeA, dns.TypeAAAA:
		for _, h := range res.hosts {
			if rr := address(state.QName(), h.ip); h.port == 0 && rr.Header().Rrtype == qtype {
				m.Answer = append(m.Answer, rr)
			}
		}
	case dns.TypeSRV:
		c.services(m, state, res.hosts)
	}
	return res.exists
}

// services writes SRV records with equal weights, and the addresses of their targets.
func (c *cluster) services(m *dns.Msg, state *request.Request, hosts []host) {
	type target struct {
		name string
		port uint16
	}
	seen := map[target]bool{}
	named := map[host]bool{}
	weight := uint16(max(1, 100/max(1, len(hosts))))
	for _, h := range hosts {
		if h.port == 0 {
			continue
		}
		name := h.name + "." + c.zone
		if t := (target{name, h.port}); !seen[t] {
			seen[t] = true
			m.Answer = append(m.Answer, &dns.SRV{Hdr: header(state.QName(), dns.TypeSRV), Weight: weight, Port: h.port, Target: name})
		}
		if at := (host{name: name, ip: h.ip}); !named[at] {
			named[at] = true
			m.Extra = append(m.Extra, address(name, h.ip))
		}
	}
}

// follow answers for an ExternalName service: the alias, and what the name it stands for has, asked the same way as any question.
func (c *cluster) follow(ctx context.Context, m *dns.Msg, state *request.Request, target string) {
	m.Answer = []dns.RR{&dns.CNAME{Hdr: header(state.QName(), dns.TypeCNAME), Target: target}}
	depth, _ := ctx.Value(chainKey{}).(int)
	if t := state.QType(); depth >= maxCNAME || t != dns.TypeA && t != dns.TypeAAAA {
		return
	}
	found, err := upstream.New().Lookup(context.WithValue(ctx, chainKey{}, depth+1), *state, target, state.QType())
	if err == nil && found != nil {
		m.Answer = append(m.Answer, found.Answer...)
	}
}

func (c *cluster) soa() dns.RR {
	return &dns.SOA{
		Hdr: header(c.zone, dns.TypeSOA), Ns: "ns.dns." + c.zone, Mbox: "hostmaster." + c.zone,
		Serial: 1, Refresh: 7200, Retry: 1800, Expire: 86400, Minttl: answerTTL,
	}
}

func address(name string, ip netip.Addr) dns.RR {
	if ip.Is4() {
		return &dns.A{Hdr: header(name, dns.TypeA), A: ip.AsSlice()}
	}
	return &dns.AAAA{Hdr: header(name, dns.TypeAAAA), AAAA: ip.AsSlice()}
}

func header(name string, t uint16) dns.RR_Header {
	return dns.RR_Header{Name: name, Rrtype: t, Class: dns.ClassINET, Ttl: answerTTL}
}

// nowhere is the end of the chain on a node without upstream servers.
func nowhere(context.Context, dns.ResponseWriter, *dns.Msg) (int, error) {
	return dns.RcodeServerFailure, nil
}
