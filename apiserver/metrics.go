package apiserver

import (
	"errors"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/apiserver/pkg/authentication/user"
	handlersmetrics "k8s.io/apiserver/pkg/endpoints/handlers/metrics"
	endpointmetrics "k8s.io/apiserver/pkg/endpoints/metrics"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	flowcontrolmetrics "k8s.io/apiserver/pkg/util/flowcontrol/metrics"
	proxymetrics "k8s.io/apiserver/pkg/util/proxy/metrics"
	"k8s.io/component-base/metrics"
	"k8s.io/component-base/metrics/legacyregistry"
	"k8s.io/component-base/metrics/prometheus/slis"
	_ "k8s.io/component-base/metrics/prometheus/version" // kubernetes_build_info

	"knarr/api"
)

// registerMetrics makes upstream's instrumentation of handlers and filters count. It may be called many times.
func registerMetrics() {
	endpointmetrics.Register()
	handlersmetrics.Register()
	flowcontrolmetrics.Register()
	proxymetrics.Register()
	registerSLIs()
}

// registerSLIs adds the results of the health checks, once per process: their registration would panic the second time.
var registerSLIs = sync.OnceFunc(func() { slis.Register(legacyregistry.DefaultGatherer.(metrics.KubeRegistry)) })

// metricsPage serves /metrics: what the process counts, and what is measured only when somebody asks, so that nothing
// ticks in an idle server.
type metricsPage struct {
	registry *api.Registry
	inflight *inflight
	reads    *readMetrics
	admit    *plugins
	attempts *authenticationCounts
	own      metrics.KubeRegistry
	counts   *metrics.GaugeVec
	objects  *metrics.GaugeVec
	pages    http.Handler
}

func newMetricsPage(registry *api.Registry, inflight *inflight, reads *readMetrics, admit *plugins, attempts *authenticationCounts) *metricsPage {
	p := &metricsPage{registry: registry, inflight: inflight, reads: reads, admit: admit, attempts: attempts, own: metrics.NewKubeRegistry()}
	p.counts = metrics.NewGaugeVec(&metrics.GaugeOpts{
		Name: "apiserver_storage_objects", StabilityLevel: metrics.STABLE,
		Help: "[DEPRECATED, consider using apiserver_resource_objects instead] Number of stored objects at the time of last check split by kind. In case of a fetching error, the value will be -1.",
	}, []string{"resource"})
	p.objects = metrics.NewGaugeVec(&metrics.GaugeOpts{
		Name: "apiserver_resource_objects", StabilityLevel: metrics.ALPHA,
		Help: "Number of stored objects at the time of last check split by kind. In case of a fetching error, the value will be -1.",
	}, []string{"group", "resource"})
	p.own.MustRegister(p.counts, p.objects)
	p.pages = metrics.HandlerFor(prometheus.Gatherers{legacyregistry.DefaultGatherer, p.own}, metrics.HandlerOpts{})
	return p
}

// ServeHTTP implements http.Handler; a DELETE sets the counters back, as upstream's.
func (p *metricsPage) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if req.Method == http.MethodDelete {
		legacyregistry.Reset()
		p.reads.forget()
		p.admit.forget()
		p.attempts.forget()
		_, _ = io.WriteString(w, "metrics reset\n")
		return
	}
	p.counts.Reset()
	p.objects.Reset()
	for _, kind := range p.registry.Kinds() {
		n := float64(kind.Table.Snapshot().Len())
		p.counts.WithLabelValues(kind.Resource.String()).Set(n)
		p.objects.WithLabelValues(kind.Resource.Group, kind.Resource.Resource).Set(n)
	}
	p.inflight.report()
	p.pages.ServeHTTP(w, req)
}

// requestVectors are upstream's own series of requests, which its package keeps to itself. Asking for the registration of
// a twin is how Prometheus hands out what is registered already: with them, a request is counted on children looked up
// once, where upstream's MonitorRequest looks up five sets of labels each time.
type requestVectors struct {
	total, self                 *metrics.CounterVec
	running                     *metrics.GaugeVec
	duration, sli, responseSize *metrics.HistogramVec
}

// Labels of upstream's series. Source: k8s.io/apiserver/pkg/endpoints/metrics/metrics.go.
var (
	resourceLabels = []string{"verb", "group", "version", "resource", "subresource", "scope", "component"}
	requestLabels  = []string{"verb", "dry_run", "group", "version", "resource", "subresource", "scope", "component"}
)

// findRequestVectors gives nil where this version of upstream's package has other series than we know; a test tells.
func findRequestVectors() *requestVectors {
	histogram := func(name, help string, level metrics.StabilityLevel, labels []string) *metrics.HistogramVec {
		return registered(metrics.NewHistogramVec(&metrics.HistogramOpts{Subsystem: "apiserver", Name: name, Help: help, StabilityLevel: level}, labels))
	}
	v := &requestVectors{
		total: registered(metrics.NewCounterVec(&metrics.CounterOpts{Subsystem: "apiserver", Name: "request_total", StabilityLevel: metrics.STABLE,
			Help: "Counter of apiserver requests broken out for each verb, dry run value, group, version, resource, scope, component, and HTTP response code."},
			append(requestLabels[:len(requestLabels):len(requestLabels)], "code"))),
		self: registered(metrics.NewCounterVec(&metrics.CounterOpts{Subsystem: "apiserver", Name: "selfrequest_total", StabilityLevel: metrics.ALPHA,
			Help: "Counter of apiserver self-requests broken out for each verb, API resource and subresource."},
			[]string{"verb", "group", "resource", "subresource"})),
		running: registered(metrics.NewGaugeVec(&metrics.GaugeOpts{Subsystem: "apiserver", Name: "longrunning_requests", StabilityLevel: metrics.STABLE,
			Help: "Gauge of all active long-running apiserver requests broken out by verb, group, version, resource, scope and component. Not all requests are tracked this way."},
			resourceLabels)),
		duration: histogram("request_duration_seconds", "Response latency distribution in seconds for each verb, dry run value, group, version, resource, subresource, scope and component.",
			metrics.STABLE, requestLabels),
		sli: histogram("request_sli_duration_seconds", "Response latency distribution (not counting webhook duration and priority & fairness queue wait times) in seconds for each verb, group, version, resource, subresource, scope and component.",
			metrics.ALPHA, resourceLabels),
		responseSize: histogram("response_sizes", "Response size distribution in bytes for each group, version, verb, resource, subresource, scope and component.",
			metrics.STABLE, resourceLabels),
	}
	if v.total == nil || v.self == nil || v.running == nil || v.duration == nil || v.sli == nil || v.responseSize == nil {
		return nil
	}
	return v
}

// registered gives the collector that is registered under the twin's name, nil if there is none of the same form.
func registered[T metrics.Registerable](twin T) T {
	var none T
	err := legacyregistry.Register(twin)
	if err == nil {
		legacyregistry.DefaultGatherer.(metrics.KubeRegistry).Unregister(twin)
		return none
	}
	var already prometheus.AlreadyRegisteredError
	if !errors.As(err, &already) {
		return none
	}
	existing, _ := already.ExistingCollector.(T)
	return existing
}

// readMetrics counts the requests that our own read path answers, in upstream's series.
type readMetrics struct {
	vectors *requestVectors

	mu     sync.RWMutex
	series map[seriesKey]*readSeries // guarded by mu
}

type seriesKey struct {
	kind                     *api.Kind
	verb, subresource, scope string
}

// readSeries are the children of one verb on one kind.
type readSeries struct {
	labels        []string // of request_total, without the code
	success       int      // the code that succeeded counts
	succeeded     metrics.CounterMetric
	self          metrics.CounterMetric
	running       metrics.GaugeMetric   // nil unless a watch
	events        metrics.CounterMetric // nil unless a watch
	duration, sli metrics.ObserverMetric
	size          metrics.ObserverMetric // nil for a watch
	body          metrics.ObserverMetric // nil for a read
}

// newReadMetrics needs the registered metrics.
func newReadMetrics() *readMetrics {
	return &readMetrics{vectors: findRequestVectors(), series: map[seriesKey]*readSeries{}}
}

// forget drops the children that a reset of the vectors has cut off.
func (m *readMetrics) forget() {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.series)
}

// drop forgets the series of a kind that is no more in use.
func (m *readMetrics) drop(kind *api.Kind) {
	m.mu.Lock()
	defer m.mu.Unlock()
	maps.DeleteFunc(m.series, func(k seriesKey, _ *readSeries) bool { return k.kind == kind })
}

// find gives the series of a request.
func (m *readMetrics) find(kind *api.Kind, info *apirequest.RequestInfo) *readSeries {
	key := seriesKey{kind, info.Verb, info.Subresource, endpointmetrics.CleanScope(info)}
	m.mu.RLock()
	s := m.series[key]
	m.mu.RUnlock()
	if s != nil {
		return s
	}
	s = m.vectors.series(key)
	m.mu.Lock()
	m.series[key] = s
	m.mu.Unlock()
	return s
}

func (v *requestVectors) series(key seriesKey) *readSeries {
	verb := map[string]string{"get": "GET", "list": "LIST", "watch": "WATCH", "create": "POST", "patch": "PATCH", "delete": "DELETE"}[key.verb]
	success := http.StatusOK
	if verb == "POST" {
		success = http.StatusCreated
	}
	group, version, resource := key.kind.Stored.Group, key.kind.Stored.Version, key.kind.Resource.Resource
	plain := []string{verb, group, version, resource, key.subresource, key.scope, endpointmetrics.APIServerComponent}
	full := []string{verb, "", group, version, resource, key.subresource, key.scope, endpointmetrics.APIServerComponent}
	s := &readSeries{
		labels:    full,
		success:   success,
		succeeded: v.total.WithLabelValues(append(full[:len(full):len(full)], strconv.Itoa(success))...),
		self:      v.self.WithLabelValues(verb, group, resource, key.subresource),
		duration:  v.duration.WithLabelValues(full...),
		sli:       v.sli.WithLabelValues(plain...),
	}
	if verb == "WATCH" {
		s.running = v.running.WithLabelValues(plain...)
		s.events = endpointmetrics.WatchEvents.WithLabelValues(group, version, resource)
	} else {
		s.size = v.responseSize.WithLabelValues(plain...)
	}
	if verb := bodyVerbs[key.verb]; verb != "" {
		s.body = handlersmetrics.RequestBodySizes.WithLabelValues(key.kind.Resource.Group, resource, string(verb))
	}
	return s
}

// bodyVerbs are what upstream counts the sizes of bodies under.
var bodyVerbs = map[string]handlersmetrics.RequestBodyVerb{"create": handlersmetrics.Create, "patch": handlersmetrics.Patch, "delete": handlersmetrics.Delete}

// measured is the response writer of one counted request; it forwards what it does not count by Unwrap.
type measured struct {
	http.ResponseWriter
	vectors *requestVectors
	series  *readSeries
	began   time.Time
	status  int
	size    int64
	self    bool
}

// begin starts to count a request; the caller ends it with done. Nil metrics count nothing.
func (m *readMetrics) begin(w http.ResponseWriter, req *http.Request, kind *api.Kind, info *apirequest.RequestInfo) *measured {
	out := &measured{ResponseWriter: w, status: http.StatusOK}
	if m == nil || m.vectors == nil {
		return out
	}
	out.vectors, out.series = m.vectors, m.find(kind, info)
	var ok bool
	if out.began, ok = apirequest.ReceivedTimestampFrom(req.Context()); !ok {
		out.began = time.Now()
	}
	if u, ok := apirequest.UserFrom(req.Context()); ok {
		out.self = u.GetName() == user.APIServerUser
	}
	if out.series.running != nil {
		out.series.running.Inc()
	}
	return out
}

// Unwrap lets http.ResponseController reach the connection.
func (m *measured) Unwrap() http.ResponseWriter { return m.ResponseWriter }

// WriteHeader implements http.ResponseWriter.
func (m *measured) WriteHeader(code int) {
	m.status = code
	m.ResponseWriter.WriteHeader(code)
}

// Write implements http.ResponseWriter.
func (m *measured) Write(data []byte) (int, error) {
	n, err := m.ResponseWriter.Write(data)
	m.size += int64(n)
	return n, err
}

// eventCounter counts what a watch sends; nil where it is not measured.
func eventCounter(w http.ResponseWriter) metrics.CounterMetric {
	if m, ok := w.(*measured); ok && m.series != nil {
		return m.series.events
	}
	return nil
}

// took counts the size of a write's body.
func (m *measured) took(size int) {
	if s := m.series; s != nil && s.body != nil {
		s.body.Observe(float64(size))
	}
}

// done counts the request.
func (m *measured) done() {
	s := m.series
	if s == nil {
		return
	}
	if m.status == s.success {
		s.succeeded.Inc()
	} else {
		m.vectors.total.WithLabelValues(append(s.labels[:len(s.labels):len(s.labels)], strconv.Itoa(m.status))...).Inc()
	}
	seconds := time.Since(m.began).Seconds()
	s.duration.Observe(seconds)
	s.sli.Observe(seconds)
	if s.size != nil {
		s.size.Observe(float64(m.size))
	}
	if s.running != nil {
		s.running.Dec()
	}
	if m.self {
		s.self.Inc()
	}
}

// count counts a whole request that was answered 200.
func (m *readMetrics) count(kind *api.Kind, info *apirequest.RequestInfo, self bool, began time.Time, size int) {
	if m == nil || m.vectors == nil {
		return
	}
	done := measured{vectors: m.vectors, series: m.find(kind, info), began: began, status: http.StatusOK, size: int64(size), self: self}
	done.done()
}

// authenticationCounts are upstream's series of who was authenticated and authorized, which its filters keep to themselves. Nil counts nothing.
type authenticationCounts struct {
	users, attempts, allowed *metrics.CounterVec
	byLabel                  map[string]*peerCounts // of all labels
}

// peerCounts counts the requests of users of one label. Nil counts nothing.
type peerCounts struct {
	of    *authenticationCounts
	label string
	known atomic.Pointer[peerChildren] // nil before the first request, and when the series were set back
}

// peerChildren are looked up once.
type peerChildren struct{ user, attempts, allowed metrics.CounterMetric }

// findAuthenticationCounts gives nil where this version of upstream's package has other series than we know; a test tells.
func findAuthenticationCounts() *authenticationCounts {
	vector := func(name, help, label string) *metrics.CounterVec {
		return registered(metrics.NewCounterVec(&metrics.CounterOpts{Name: name, Help: help, StabilityLevel: metrics.ALPHA}, []string{label}))
	}
	c := &authenticationCounts{
		users:    vector("authenticated_user_requests", "Counter of authenticated requests broken out by username.", "username"),
		attempts: vector("authentication_attempts", "Counter of authenticated attempts.", "result"),
		allowed: vector("authorization_attempts_total",
			"Counter of authorization attempts broken down by result. It can be either 'allowed', 'denied', 'no-opinion' or 'error'.", "result"),
		byLabel: map[string]*peerCounts{},
	}
	if c.users == nil || c.attempts == nil || c.allowed == nil {
		return nil
	}
	for _, label := range append([]string{labelEmail, labelOther}, namedUsers...) {
		c.byLabel[label] = &peerCounts{of: c, label: label}
	}
	return c
}

// of gives what counts the requests of a user.
func (c *authenticationCounts) of(name string) *peerCounts {
	if c == nil {
		return nil
	}
	return c.byLabel[userLabel(name)]
}

// forget lets children be looked up again, when the series were set back.
func (c *authenticationCounts) forget() {
	if c == nil {
		return
	}
	for _, p := range c.byLabel {
		p.known.Store(nil)
	}
}

func (p *peerCounts) add() {
	if p == nil {
		return
	}
	children := p.known.Load()
	if children == nil {
		children = &peerChildren{p.of.users.WithLabelValues(p.label), p.of.attempts.WithLabelValues("success"), p.of.allowed.WithLabelValues("allowed")}
		p.known.Store(children)
	}
	children.user.Inc()
	children.attempts.Inc()
	children.allowed.Inc()
}

// Labels of users, who may be any number.
const labelEmail, labelOther = "email_id", "other"

// namedUsers are those that upstream counts by their names.
var namedUsers = []string{"admin", "client", "kube_proxy", "kubelet", "system:serviceaccount:kube-system:default"}

// userLabel is how upstream groups users.
func userLabel(name string) string {
	switch {
	case slices.Contains(namedUsers, name):
		return name
	case strings.Contains(name, "@"):
		return labelEmail
	}
	return labelOther
}
