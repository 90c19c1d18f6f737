package apiserver

import (
	"encoding/hex"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"

	"knarr/api"
	"knarr/apiserver/h2"
)

// fastReads answers the commonest request of all, a GET of one stored object over HTTP/2, on the goroutine that reads the
// connection: who asks was learned from the connection's certificate or a token that was verified a moment ago, whether they may is remembered
// (decisions), and the bytes are there. Everything else, refusals included, goes through the filters (chain.go); an answer of this path is the
// one that they would give, which TestFastReads holds.
type fastReads struct {
	reader    *reader
	authn     func(*http.Request) (user.Info, bool)
	tokens    *tokenCache
	decisions *decisions
	inflight  *level
	attempts  *authenticationCounts
}

// peer is what is known of whoever is at the other end of a connection.
type peer struct {
	knownUser
	token   string // that told it; empty: the certificate
	subject string // of decisions; empty: may everything
	counts  *peerCounts
}

// target is what the path of a GET of one object names.
type target struct{ group, version, namespace, resource, name string }

// serve implements h2.Options.Fast.
func (f *fastReads) serve(e *h2.Exchange) bool {
	if e.Method != http.MethodGet || f.inflight.now.Load() >= calmReads {
		return false
	}
	t, ok := parseTarget(e.Path)
	if !ok {
		return false
	}
	accept, token, ok := plainFields(e)
	if !ok {
		return false
	}
	now := time.Now()
	p := f.peerOf(e, token, now)
	if p == nil || !f.allowed(p, &t) {
		return false
	}
	return f.answer(e, p, &t, accept, now)
}

// plainFields gives the Accept field and a bearer's token, and whether the others are among those that change nothing.
func plainFields(e *h2.Exchange) (accept, token string, ok bool) {
	for i := range e.Fields {
		switch f := &e.Fields[i]; f.Name {
		case "accept":
			if accept != "" {
				return "", "", false
			}
			accept = f.Value
		case "authorization":
			if t := bearer(f.Value); t == "" || token != "" {
				return "", "", false
			} else {
				token = t
			}
		case "accept-encoding", "user-agent", "kubectl-command", "kubectl-session":
		default:
			return "", "", false
		}
	}
	return accept, token, true
}

// parseTarget understands /api/VERSION/... and /apis/GROUP/VERSION/... down to one object; not what is escaped or has a query.
func parseTarget(path string) (t target, ok bool) {
	if strings.ContainsAny(path, "%?#\\") || strings.HasSuffix(path, "/") {
		return t, false
	}
	rest, core := strings.CutPrefix(path, "/api/")
	if !core {
		if rest, ok = strings.CutPrefix(path, "/apis/"); !ok {
			return t, false
		}
		t.group, rest, _ = strings.Cut(rest, "/")
	}
	t.version, rest, _ = strings.Cut(rest, "/")
	first, rest, _ := strings.Cut(rest, "/")
	second, rest, deeper := strings.Cut(rest, "/")
	if !deeper {
		t.resource, t.name = first, second
		if core && first == "namespaces" {
			t.namespace = second // as RequestInfo has it
		}
		return t, t.isWhole()
	}
	t.namespace = second
	t.resource, t.name, ok = strings.Cut(rest, "/")
	return t, ok && first == "namespaces" && t.namespace != "" && t.isWhole()
}

func (t *target) isWhole() bool {
	return t.version != "" && t.resource != "" && t.resource != "watch" && t.resource != "proxy" && t.name != "" && t.name != "." && t.name != ".." &&
		!strings.Contains(t.name, "/") && t.namespace != "." && t.namespace != ".."
}

// peerOf learns who is at the other end: once a connection who its client certificate names, each few seconds who a token is from; nil where that is nobody, or not
// known.
func (f *fastReads) peerOf(e *h2.Exchange, token string, now time.Time) *peer {
	if p, ok := e.Peer.(*peer); ok && p.token == token && (token == "" || now.Before(p.until) && f.tokens.holds(p.knownUser)) {
		if p.user == nil || !now.Before(p.until) {
			return nil
		}
		return p
	}
	if token != "" {
		u, ok := f.tokens.find(token, now)
		if !ok || e.TLS == nil || len(e.TLS.PeerCertificates) > 0 {
			return nil
		}
		p := f.peer(u)
		p.token = token
		e.Peer = p
		return p
	}
	e.Peer = &peer{}
	if e.TLS == nil || len(e.TLS.PeerCertificates) == 0 {
		return nil
	}
	u, ok := f.authn(&http.Request{Method: http.MethodGet, Header: http.Header{}, TLS: e.TLS, RemoteAddr: e.Remote})
	if !ok {
		return nil
	}
	p := f.peer(knownUser{user: u, until: e.TLS.PeerCertificates[0].NotAfter})
	e.Peer = p
	return p
}

func (f *fastReads) peer(u knownUser) *peer {
	return &peer{knownUser: u, subject: f.decisions.subject(u.user), counts: f.attempts.of(u.user.GetName())}
}

// allowed reports what is known without asking anybody: system:masters may everything, others what they were allowed before.
func (f *fastReads) allowed(p *peer, t *target) bool {
	if slices.Contains(p.user.GetGroups(), user.SystemPrivilegedGroup) {
		return true
	}
	return p.subject != "" && f.decisions.known(decisionKey{
		subject: p.subject, verb: "get", group: t.group, version: t.version, resource: t.resource, namespace: t.namespace, name: t.name,
	}) == authorizer.DecisionAllow
}

// find gives the kind of a target and how to write its objects; nil where the filters must find out.
func (f *fastReads) find(t *target, accept string) (*api.Kind, format) {
	kind := f.reader.registry.Kind(schema.GroupResource{Group: t.group, Resource: t.resource})
	if kind == nil {
		return nil, nil
	}
	if !kind.Plain() {
		s := f.reader.custom.remembered(t.group, t.version, t.resource)
		if s == nil || s.namespaced != (t.namespace != "") {
			return nil, nil
		}
		return s.kind, s.formatFor(accept)
	}
	form := formatFor(accept)
	if _, ok := form.(protoFormat); ok && isJSONOnly(t.group) || !f.reader.knows(kind, t.group, t.version) {
		return nil, nil
	}
	return kind, form
}

// answer sends the object; false when there is none, or not in the wanted form.
func (f *fastReads) answer(e *h2.Exchange, p *peer, t *target, accept string, now time.Time) bool {
	kind, form := f.find(t, accept)
	if kind == nil || form == nil || kind.Shared() {
		return false // where other servers write too, a read may have to wait for them
	}
	namespace := t.namespace
	if t.group == "" && t.resource == "namespaces" {
		namespace = ""
	}
	rec := kind.Table.Get(kind.Key(namespace, t.name))
	if rec == nil {
		return false
	}
	var scratch [128]byte
	head, body, tail, err := form.parts(scratch[:0], rec, kind.Stored)
	size := len(head) + len(body) + len(tail)
	if err != nil || size >= compressFrom {
		return false
	}
	f.inflight.enter()
	defer f.inflight.leave()
	var buf [256]byte
	if !e.Answer(readBlock(buf[:0], form.contentType(), size, now), now, head, body, tail) {
		return false
	}
	p.counts.add()
	info := apirequest.RequestInfo{Verb: "get", Namespace: t.namespace, Name: t.name, Resource: t.resource}
	f.reader.metrics.count(kind, &info, p.user.GetName() == user.APIServerUser, now, size)
	return true
}

// readBlock is the header of an answer from memory, as the filters write it.
func readBlock(block []byte, contentType string, size int, now time.Time) []byte {
	block = h2.AppendStatus(block, http.StatusOK)
	block = h2.AppendField(block, "audit-id", auditID())
	block = h2.AppendField(block, "cache-control", "no-cache, private")
	block = h2.AppendField(block, "content-type", contentType)
	block = h2.AppendField(block, "content-length", strconv.Itoa(size))
	return h2.AppendField(block, "date", h2.Date(now))
}

// auditID is a random UUID (RFC 9562, version 4). It names a request and protects nothing.
func auditID() string {
	var raw [16]byte
	for i, v := range [2]uint64{rand.Uint64(), rand.Uint64()} {
		for j := range 8 {
			raw[8*i+j] = byte(v >> (8 * j))
		}
	}
	raw[6], raw[8] = raw[6]&0x0f|0x40, raw[8]&0x3f|0x80
	var out [36]byte
	hex.Encode(out[:8], raw[:4])
	hex.Encode(out[9:13], raw[4:6])
	hex.Encode(out[14:18], raw[6:8])
	hex.Encode(out[19:23], raw[8:10])
	hex.Encode(out[24:], raw[10:])
	out[8], out[13], out[18], out[23] = '-', '-', '-', '-'
	return string(out[:])
}
