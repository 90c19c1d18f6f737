package apiserver

import (
	"net/http"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/authentication/user"
	endpointmetrics "k8s.io/apiserver/pkg/endpoints/metrics"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/endpoints/responsewriter"
	genericfilters "k8s.io/apiserver/pkg/server/filters"
	"k8s.io/apiserver/pkg/storage"
	utilflowcontrol "k8s.io/apiserver/pkg/util/flowcontrol"
	flowcontrolrequest "k8s.io/apiserver/pkg/util/flowcontrol/request"

	"knarr/api"
	"knarr/apiserver/h2"
)

const (
	// stalledWriteTimeout is how long a client may take in no byte of a watch before it is cut off. It lists and watches
	// anew; the connection's other requests go on.
	stalledWriteTimeout = time.Minute
	// answerGrace is how long after a request's deadline its client may go on taking in the answer or sending the body.
	answerGrace = 30 * time.Second
	// calmReads is the number of reads in flight below which stored reads are not classified: a tenth of the limit.
	calmReads = MaxReadsInFlight / 10
)

// flowControl is API priority and fairness, upstream's own, over our informers.
//
// What differs: in-process callers of system:masters (this server itself) are let through before the classification, which
// would find them exempt; so are reads of stored built-in kinds while the server is calm, as classifying (13 us) costs half
// as much as the whole get (20 us, both CPU time of BenchmarkFlowControl). A watch counts until it is let in and not until
// its initial list is sent, as the list comes from memory; the number of watchers makes no write dearer, as one encoding
// serves them all. At idle it wakes every ten seconds to lend seats between levels.
type flowControl struct {
	upstream utilflowcontrol.Interface
	registry *api.Registry
	inflight *inflight
}

// wrap puts a handler under flow control.
func (f *flowControl) wrap(h http.Handler, inProcess func(*http.Request) bool) http.Handler {
	h = f.inflight.count(h)
	limited := f.limit(signalWatch(h))
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if inProcess(req) && isPrivileged(req) || f.isCalmRead(req) {
			h.ServeHTTP(w, req)
			return
		}
		limited.ServeHTTP(w, req)
	})
}

// limit puts a handler under upstream's flow control.
func (f *flowControl) limit(h http.Handler) http.Handler {
	estimate := flowcontrolrequest.NewWorkEstimator(f.stats, noWatchers, flowcontrolrequest.DefaultWorkEstimatorConfig(), f.upstream.GetMaxSeats)
	return genericfilters.WithPriorityAndFairness(h, longRunning, f.upstream, estimate, RequestTimeout/4)
}

// isCalmRead tells requests that can harm nobody: they come from memory, and few run.
func (f *flowControl) isCalmRead(req *http.Request) bool {
	info, ok := apirequest.RequestInfoFrom(req.Context())
	return ok && info.Verb != "watch" && f.inflight.reads.now.Load() < calmReads && isStoredRead(info, f.registry)
}

// run follows the configuration objects until ctx ends.
func (f *flowControl) run(stop <-chan struct{}) { _ = f.upstream.Run(stop) }

// stats says how many objects a list would cover.
func (f *flowControl) stats(resource string) (storage.Stats, error) {
	kind := f.registry.Kind(schema.ParseGroupResource(resource))
	if kind == nil {
		return storage.Stats{}, nil
	}
	return storage.Stats{ObjectCount: int64(kind.Table.Snapshot().Len())}, nil
}

func noWatchers(*apirequest.RequestInfo) int { return 0 }

// signalWatch gives a watch's seat back as soon as it runs.
func signalWatch(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		utilflowcontrol.WatchInitialized(req.Context())
		h.ServeHTTP(w, req)
	})
}

// isPrivileged tells callers that are exempt from every limit.
func isPrivileged(req *http.Request) bool {
	u, ok := apirequest.UserFrom(req.Context())
	return ok && isOfMasters(u)
}

func isOfMasters(u user.Info) bool { return slices.Contains(u.GetGroups(), user.SystemPrivilegedGroup) }

// inflight counts the requests that run now, long-running ones aside. The gauges of upstream tell the highest number of
// the last second and tick for it; ours tells the highest since it was last asked for.
type inflight struct {
	reads, writes level
}

// isBusy reports whether there are more requests than processors.
func (i *inflight) isBusy() bool {
	return i.reads.now.Load()+i.writes.now.Load() > int64(runtime.GOMAXPROCS(0))
}

// Busy reports whether the server has more requests under way than processors. It costs next to nothing.
func (s *Server) Busy() bool { return s.flow.inflight.isBusy() }

// level is a number and the highest value that it had since the last report.
type level struct{ now, peak atomic.Int64 }

func (l *level) enter() {
	n := l.now.Add(1)
	for p := l.peak.Load(); n > p && !l.peak.CompareAndSwap(p, n); p = l.peak.Load() {
	}
}

func (l *level) leave() { l.now.Add(-1) }

// take gives the peak and starts the next period.
func (l *level) take() int { return int(l.peak.Swap(l.now.Load())) }

func (i *inflight) count(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		info, ok := apirequest.RequestInfoFrom(req.Context())
		if !ok || longRunning(req, info) {
			h.ServeHTTP(w, req)
			return
		}
		l := &i.reads
		if isMutating(info) {
			l = &i.writes
		}
		l.enter()
		defer l.leave()
		h.ServeHTTP(w, req)
	})
}

// report sets upstream's gauges.
func (i *inflight) report() {
	endpointmetrics.UpdateInflightRequestMetrics(endpointmetrics.ExecutingPhase, i.reads.take(), i.writes.take())
}

// isMutating tells requests that count as writes, as upstream.
func isMutating(info *apirequest.RequestInfo) bool {
	switch info.Verb {
	case "get", "list", "watch", "head", "options":
		return false
	}
	return true
}

// withTimeout answers 504 when a handler has not begun to answer at its deadline. Upstream does so for all requests, each in
// one more goroutine; reads of stored built-in kinds come from memory, need no such guard, and go without.
func withTimeout(h http.Handler, registry *api.Registry) http.Handler {
	inner := http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.Method != http.MethodGet {
			h2.ReserveStack()
		}
		h.ServeHTTP(w, req)
	})
	timed := genericfilters.WithTimeoutForNonLongRunningRequests(inner, longRunning)
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if info, ok := apirequest.RequestInfoFrom(req.Context()); ok && isStoredRead(info, registry) {
			h.ServeHTTP(w, req)
			return
		}
		timed.ServeHTTP(w, req)
	})
}

func isStoredRead(info *apirequest.RequestInfo, registry *api.Registry) bool {
	if !info.IsResourceRequest || info.Subresource != "" || isMutating(info) {
		return false
	}
	kind := registry.Kind(schema.GroupResource{Group: info.APIGroup, Resource: info.Resource})
	return kind != nil && kind.Plain()
}

// connectionLimits are what a client of a connection may keep the server waiting.
type connectionLimits struct {
	bounded time.Duration // a request that is not long-running, from its first byte to the last of its answer
	stalled time.Duration // a watch whose client takes nothing
}

// withConnectionDeadlines frees what a client holds that neither sends nor takes: the body and the answer of a bounded
// request end some time after its deadline, and a watch whose client takes nothing is cut off. Requests without a
// connection have nothing to guard.
func withConnectionDeadlines(h http.Handler, limits connectionLimits, inProcess func(*http.Request) bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		info, ok := apirequest.RequestInfoFrom(req.Context())
		if !ok || inProcess(req) {
			h.ServeHTTP(w, req)
			return
		}
		control := http.NewResponseController(w)
		switch {
		case !longRunning(req, info):
			end := time.Now().Add(limits.bounded)
			_ = control.SetWriteDeadline(end)
			if req.ContentLength != 0 {
				_ = control.SetReadDeadline(end)
			}
		case req.ProtoMajor == 1:
			_ = control.SetWriteDeadline(time.Time{}) // an earlier request of the connection may have set one
		}
		if info.Verb == "watch" && !isUpgrade(req) {
			g := newStallGuard(w, control, limits.stalled, req.ProtoMajor == 2)
			defer g.stop()
			w = responsewriter.WrapForHTTP1Or2(g)
		}
		h.ServeHTTP(w, req)
	})
}

// stallGuard cuts off a client that takes in nothing for limit while there is something to write.
type stallGuard struct {
	http.ResponseWriter
	control *http.ResponseController
	limit   time.Duration
	timer   *time.Timer // nil in HTTP/2, where moving a stream's deadline costs no timer (package h2)
}

func newStallGuard(w http.ResponseWriter, control *http.ResponseController, limit time.Duration, http2 bool) *stallGuard {
	g := &stallGuard{ResponseWriter: w, control: control, limit: limit}
	if !http2 {
		g.timer = time.AfterFunc(g.limit, func() { _ = control.SetWriteDeadline(time.Unix(1, 0)) })
		g.timer.Stop()
	}
	return g
}

func (g *stallGuard) begin() {
	if g.timer != nil {
		g.timer.Reset(g.limit)
		return
	}
	_ = g.control.SetWriteDeadline(time.Now().Add(g.limit))
}

func (g *stallGuard) stop() {
	if g.timer != nil {
		g.timer.Stop()
		return
	}
	_ = g.control.SetWriteDeadline(time.Time{})
}

// Unwrap lets http.ResponseController reach the connection.
func (g *stallGuard) Unwrap() http.ResponseWriter { return g.ResponseWriter }

// Write implements http.ResponseWriter.
func (g *stallGuard) Write(data []byte) (int, error) {
	g.begin()
	defer g.stop()
	return g.ResponseWriter.Write(data)
}

// Flush implements http.Flusher. What it fails at, the next write fails at.
func (g *stallGuard) Flush() {
	g.begin()
	defer g.stop()
	_ = g.control.Flush()
}
