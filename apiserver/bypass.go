package apiserver

import (
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	flowcontrolv1 "k8s.io/api/flowcontrol/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/audit"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/endpoints/filters"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	genericfilters "k8s.io/apiserver/pkg/server/filters"
	"k8s.io/apiserver/pkg/warning"

	"knarr/api"
	"knarr/apiserver/h2"
	"knarr/store"
)

// bypass hands requests to the handlers at once where the filters would let them pass: writes, lists and gets of stored objects, by who is known by a
// certificate or a token that was verified a moment ago, and may do what they ask for. Members of system:masters may do everything and are exempt from priority and fairness, which
// all others are subject to here too. What the filters leave in the answer stands in it all the same. The request stays on its goroutine, since such
// handlers end by a deadline of their own. Everything else goes through the filters (chain.go), refusals included, and its answers are the same, which
// TestBypass holds.
type bypass struct {
	next   http.Handler // the filters
	inner  http.Handler // what is behind them
	writer *writer
	// authn learns who asks from the connection's certificate, token from a known token, inProcess from the context of who has no connection.
	authn, token func(*http.Request) (user.Info, bool)
	inProcess    func(context.Context) (user.Info, bool)
	authorizer   authorizer.Authorizer
	// free answers a bypassed request, limited one that is under priority and fairness.
	free, limited http.Handler
	resolver      apirequest.RequestInfoResolver
	flow          *flowControl
	exempt        *exempting
	end           *shutdown
	attempts      *authenticationCounts
}

// Header fields by which priority and fairness tells what a request was taken for.
var (
	matchedLevel  = http.CanonicalHeaderKey(flowcontrolv1.ResponseHeaderMatchedPriorityLevelConfigurationUID)
	matchedSchema = http.CanonicalHeaderKey(flowcontrolv1.ResponseHeaderMatchedFlowSchemaUID)
)

// newBypass completes one whose other parts are there.
func newBypass(f bypass) *bypass {
	f.resolver = requestInfoResolver()
	f.free = genericfilters.WithPanicRecovery(http.HandlerFunc(serveBypassed), f.resolver)
	f.limited = genericfilters.WithPanicRecovery(f.flow.limit(http.HandlerFunc(serveBypassed)), f.resolver)
	return &f
}

// ServeHTTP implements http.Handler.
func (f *bypass) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	b := f.accept(w, req)
	if b == nil {
		f.next.ServeHTTP(w, req)
		return
	}
	f.serve(b, w)
	if b.done {
		return
	}
	if b.body != nil {
		req.Body = b.body
	}
	if b.late {
		ctx, cancel := context.WithDeadline(req.Context(), time.Now())
		defer cancel()
		req = req.WithContext(ctx)
	}
	f.next.ServeHTTP(w, req)
}

// accept gives the request as the filters would hand it on, but for an audit context; nil when it has to pass them. It reads no body.
func (f *bypass) accept(w http.ResponseWriter, req *http.Request) *bypassed {
	now := time.Now()
	if req.ProtoMajor != 2 || f.writer.audited || !f.onlyPlain(req.Header) || mayBeTimed(req.URL.RawQuery) {
		return nil
	}
	info, err := f.resolver.NewRequestInfo(req)
	if err != nil || !f.isBounded(info) {
		return nil
	}
	u, ok := f.who(req)
	if !ok {
		return nil
	}
	ctx := apirequest.WithUser(apirequest.WithRequestInfo(apirequest.WithReceivedTimestamp(req.Context(), now), info), u)
	if !isOfMasters(u) && !f.allowed(ctx) {
		return nil
	}
	b := &bypassed{all: f, user: u, done: true, warnings: warnings{writer: w}}
	b.request = req.WithContext(context.WithValue(warning.WithWarningRecorder(ctx, &b.warnings), bypassKey{}, b))
	if inner := b.request; inner.Header["Authorization"] != nil { // nobody behind the filters sees it, as upstream
		inner.Header = maps.Clone(inner.Header)
		delete(inner.Header, "Authorization")
	}
	return b
}

// who gives the user where that is known without asking upstream's authenticators.
func (f *bypass) who(req *http.Request) (user.Info, bool) {
	if u, ok := f.inProcess(req.Context()); ok {
		return u, true
	}
	if req.Header["Authorization"] != nil {
		return f.token(req)
	}
	return f.authn(req)
}

// allowed asks the authorizers, for whom upstream's filter would ask again if they do not allow it.
func (f *bypass) allowed(ctx context.Context) bool {
	attributes, err := filters.GetAuthorizerAttributes(ctx)
	if err != nil {
		return false
	}
	decision, _, err := f.authorizer.Authorize(ctx, attributes)
	return err == nil && decision == authorizer.DecisionAllow
}

// mayBeTimed reports whether a query sets a timeout, which is the filters' business, or a parameter whose name is spelt so oddly that it may.
func mayBeTimed(query string) bool {
	for query != "" {
		var parameter string
		parameter, query, _ = strings.Cut(query, "&")
		if name, _, _ := strings.Cut(parameter, "="); name == "timeout" || strings.ContainsAny(name, "%+") {
			return true
		}
	}
	return false
}

// isBounded tells requests whose handlers end by themselves: upstream's give up a write of an object after 34 seconds, a list is sent as fast as the client takes it.
func (f *bypass) isBounded(info *apirequest.RequestInfo) bool {
	if !info.IsResourceRequest || info.Subresource != "" && info.Subresource != "status" && info.Subresource != "binding" {
		return false
	}
	kind := f.flow.registry.Kind(schema.GroupResource{Group: info.APIGroup, Resource: info.Resource})
	if kind == nil {
		return false // another server's, or nothing that is stored
	}
	switch info.Verb {
	case "create", "update", "patch", "delete", "get", "list":
		return true
	}
	return false
}

// onlyPlain reports whether no field of the header means anything to the filters.
func (f *bypass) onlyPlain(h http.Header) bool {
	for name := range h {
		switch name {
		case "Accept", "Accept-Encoding", "Authorization", "Content-Length", "Content-Type", "User-Agent", "Kubectl-Command", "Kubectl-Session":
		default:
			return false
		}
	}
	return true
}

// setDeadlines bounds how long the client may take to send the request and to take the answer: in one go where the writer can, as package h2's.
func setDeadlines(w http.ResponseWriter, read, write time.Time) {
	if both, ok := w.(interface{ SetDeadlines(read, write time.Time) }); ok {
		both.SetDeadlines(read, write)
		return
	}
	limits := http.NewResponseController(w) // which looks into writers of others around it
	_ = limits.SetWriteDeadline(write)
	_ = limits.SetReadDeadline(read)
}

// serve does what the filters do around a handler.
func (f *bypass) serve(b *bypassed, w http.ResponseWriter) {
	req := b.request
	if req.Method == http.MethodGet {
		h2.ReserveStack() // for others it is there
	}
	h := w.Header()
	handler := f.free
	calm := f.flow.isCalmRead(req) // and not classified
	if !calm && !isOfMasters(b.user) {
		handler = f.limited
	}
	if _, inProcess := f.inProcess(req.Context()); !inProcess {
		if !calm && isOfMasters(b.user) && !f.markExempt(h) {
			b.done = false
			return
		}
		began := time.Now()
		setDeadlines(w, began.Add(RequestTimeout), began.Add(RequestTimeout+answerGrace))
	}
	h["Audit-Id"], h["Cache-Control"] = []string{auditID()}, notCached
	f.attempts.of(b.user.GetName()).add()
	f.end.running.enter()
	defer f.end.running.leave()
	handler.ServeHTTP(w, req)
}

// notCached are the values of Cache-Control in answers. Nobody may change them.
var notCached = []string{"no-cache, private"}

// markExempt says in the answer what priority and fairness would say; false where that is not known.
func (f *bypass) markExempt(h http.Header) bool {
	schemaUID, levelUID, ok := f.exempt.uids()
	if ok {
		h[matchedLevel], h[matchedSchema] = levelUID, schemaUID
	}
	return ok
}

// bypassKey is what the context of a request has its bypassed request by, below priority and fairness.
type bypassKey struct{}

// serveBypassed answers a request that priority and fairness lets in, or has nothing to say about.
func serveBypassed(w http.ResponseWriter, req *http.Request) {
	req.Context().Value(bypassKey{}).(*bypassed).serve(w, req)
}

// bypassed is one request on that way.
type bypassed struct {
	all     *bypass
	request *http.Request
	user    user.Info
	// done says that the request is answered; false leaves it to the filters.
	done bool
	// body is what the filters are to read then, nil for the request's own; late says that it did not come in time.
	body io.ReadCloser
	late bool
	warnings
}

// serve is the innermost handler.
func (b *bypassed) serve(w http.ResponseWriter, req *http.Request) {
	level := &b.all.flow.inflight.writes
	if req.Method == http.MethodGet {
		level = &b.all.flow.inflight.reads
	}
	level.enter()
	defer level.leave()
	data, err := readBody(req)
	if err != nil {
		b.done, b.late, b.body = false, errors.Is(err, os.ErrDeadlineExceeded), req.Body
		return
	}
	next := b.all.inner
	if wr := b.all.writer.accept(req); wr != nil {
		wr.body = data
		if wr.serve(w, req) {
			return
		}
		next = b.all.writer.next
	}
	req.Body = io.NopCloser(bytes.NewReader(data))
	ctx, cancel := context.WithTimeout(audit.WithAuditContext(req.Context()), RequestTimeout) // upstream's handlers write to an audit context
	defer cancel()
	next.ServeHTTP(w, req.WithContext(ctx))
}

// warnings records those of a request. Most have none: upstream's recorder is made for the first.
type warnings struct {
	writer http.ResponseWriter
	once   sync.Once
	ctx    context.Context // has upstream's recorder
}

// AddWarning implements warning.Recorder.
func (r *warnings) AddWarning(agent, text string) {
	r.once.Do(func() {
		keep := http.HandlerFunc(func(_ http.ResponseWriter, req *http.Request) { r.ctx = req.Context() })
		filters.WithWarningRecorder(keep).ServeHTTP(r.writer, &http.Request{})
	})
	warning.AddWarning(r.ctx, agent, text)
}

// exempting finds the identities of the flow schema and the priority level that upstream's classification finds for members of system:masters:
// no other may come before it.
type exempting struct {
	registry *api.Registry
	known    atomic.Pointer[exemptObjects]
}

// exemptObjects are the two objects at a state of their tables, and their identities.
type exemptObjects struct {
	schemas, levels     *store.Table
	schemasAt, levelsAt int64
	schema, level       []string
}

// uids gives both identities, each as the values of a header field that nobody may change; false before the objects are made.
func (e *exempting) uids() (schemaUID, levelUID []string, ok bool) {
	if o := e.known.Load(); o != nil && o.schemas.Revision() == o.schemasAt && o.levels.Revision() == o.levelsAt {
		return o.schema, o.level, true
	}
	o := &exemptObjects{}
	o.schemas, o.schemasAt, o.schema = e.find("flowschemas", flowcontrolv1.FlowSchemaNameExempt)
	o.levels, o.levelsAt, o.level = e.find("prioritylevelconfigurations", flowcontrolv1.PriorityLevelConfigurationNameExempt)
	if o.schema == nil || o.level == nil {
		return nil, nil, false
	}
	e.known.Store(o)
	return o.schema, o.level, true
}

func (e *exempting) find(resource, name string) (table *store.Table, at int64, uid []string) {
	kind := e.registry.Kind(schema.GroupResource{Group: flowcontrolv1.GroupName, Resource: resource})
	if kind == nil {
		return nil, 0, nil
	}
	at = kind.Table.Revision() // before the look: what changes meanwhile is looked for again
	rec := kind.Table.Get(kind.Key("", name))
	if rec == nil {
		return nil, 0, nil
	}
	acc, err := meta.Accessor(rec.Object)
	if err != nil || acc.GetUID() == "" {
		return nil, 0, nil
	}
	return kind.Table, at, []string{string(acc.GetUID())}
}
