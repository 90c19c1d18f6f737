package apiserver

import (
	"io"
	"log"
	"net"
	"net/http"
	"net/http/pprof"
	"runtime"
	"strconv"

	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
	"k8s.io/apiserver/pkg/server/mux"
	"k8s.io/apiserver/pkg/util/proxy"
	"k8s.io/kubernetes/pkg/serviceaccount"

	"k8s.io/apiserver/pkg/endpoints/discovery"
	discoveryendpoint "k8s.io/apiserver/pkg/endpoints/discovery/aggregated"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	"k8s.io/kubernetes/pkg/routes"

	"knarr/apiserver/options"
)

// newRouter joins the parts below the filters.
func (s *Server) newRouter(in *installer) *router {
	core := discovery.NewLegacyRootAPIHandler(discovery.DefaultAddresses{}, legacyscheme.Codecs, "/api")
	return &router{
		builtin:    in.versions,
		groups:     in.groups,
		missing:    restfulHandler(),
		coreRoot:   discoveryendpoint.WrapAggregatedDiscoveryToHandler(restfulHandler(core.WebService()), in.discovery.legacy, in.discovery.legacy),
		namedRoot:  discoveryendpoint.WrapAggregatedDiscoveryToHandler(in.discovery.root, in.discovery.named, in.discovery.named),
		custom:     s.custom,
		aggregator: s.aggregator,
		other:      s.newOther(in),
	}
}

// newOther serves what is no API group.
func (s *Server) newOther(in *installer) http.Handler {
	m := mux.NewPathRecorderMux(serverID)
	m.NotFoundHandler(http.NotFoundHandler())
	s.installHealth(m)
	docs := &openAPI{builtin: in.versions, definitions: s.custom.lister}
	m.HandleFunc("/openapi/v2", docs.serveV2)
	m.HandleFunc("/openapi/v3", docs.serveRoot)
	m.HandlePrefix("/openapi/v3/", http.HandlerFunc(docs.serveVersion))
	m.HandleFunc("/version", serveVersion)
	m.Handle("/metrics", newMetricsPage(s.config.Registry, s.flow.inflight, s.reads, s.admit, s.attempts))
	installProfiles(m, s.config.options())
	s.installIssuer(m)
	for path, h := range s.config.Extra {
		m.Handle(path, h)
	}
	m.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		responsewriters.WriteRawJSON(http.StatusOK, map[string][]string{"paths": append([]string{"/api", "/apis"}, m.ListedPaths()...)}, w)
	})
	return m
}

// installProfiles serves the runtime's profiles.
// Source: the flags --profiling and --contention-profiling of kube-apiserver.
func installProfiles(m *mux.PathRecorderMux, o *options.Options) {
	if !o.Profiling {
		return
	}
	m.HandleFunc("/debug/pprof/profile", pprof.Profile)
	m.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	m.HandleFunc("/debug/pprof/trace", pprof.Trace)
	m.HandlePrefix("/debug/pprof/", http.HandlerFunc(pprof.Index))
	if o.ContentionProfiling {
		runtime.SetBlockProfileRate(1)
	}
}

func serveVersion(w http.ResponseWriter, _ *http.Request) {
	responsewriters.WriteRawJSON(http.StatusOK, effectiveVersion().Info(), w)
}

// installIssuer serves the keys that verify service-account tokens, for parties outside the cluster.
func (s *Server) installIssuer(m *mux.PathRecorderMux) {
	address := net.JoinHostPort(s.config.AdvertiseAddress.String(), strconv.Itoa(s.config.Port))
	md, err := serviceaccount.NewOpenIDMetadataProvider(ServiceAccountIssuer, "", address, s.id.keys)
	if err != nil {
		return
	}
	c := newContainer()
	routes.NewOpenIDMetadataServer(md).Install(c)
	serve := http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) { c.Dispatch(w, req) })
	m.Handle(serviceaccount.OpenIDConfigPath, serve)
	m.Handle(serviceaccount.JWKSPath, serve)
}

// endpointSlices lets service names be resolved to endpoints, for webhooks and aggregated servers.
func endpointSlices(c *Config) proxy.EndpointSliceGetter {
	i := c.Informers.Discovery().V1().EndpointSlices()
	getter, err := proxy.NewEndpointSliceIndexerGetter(i)
	if err != nil {
		return nil
	}
	return getter
}

func noTracing() trace.TracerProvider { return noop.NewTracerProvider() }

// quietLog drops net/http's own log: what it says (a client that broke off a handshake) is no concern of the operator.
func quietLog() *log.Logger { return log.New(io.Discard, "", 0) }
