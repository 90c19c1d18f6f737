package apiserver

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	corev1 "k8s.io/api/core/v1"
	crdclient "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/managedfields"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/endpoints/discovery"
	"k8s.io/apiserver/pkg/endpoints/discovery/aggregated"
	utilflowcontrol "k8s.io/apiserver/pkg/util/flowcontrol"
	"k8s.io/apiserver/pkg/util/webhook"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/restmapper"
	aggregatorapiserver "k8s.io/kube-aggregator/pkg/apiserver"
	aggregatorclient "k8s.io/kube-aggregator/pkg/client/clientset_generated/clientset"
	"k8s.io/kubernetes/pkg/api/legacyscheme"

	"knarr/api"
	"knarr/apiserver/h2"
	"knarr/apiserver/pieces"
)

const (
	// drainTimeout bounds how long a stopping server waits for the requests under way.
	drainTimeout = 30 * time.Second
	// Limits of a connection, as upstream's.
	readHeaderTimeout    = 32 * time.Second
	idleTimeout          = 90 * time.Second
	maxStreams           = 100
	maxHeaderBytes       = 1 << 20
	http2UploadPerStream = 256 << 10
	// maxPatchCopyBytes bounds what the copy operations of a JSON patch add to an object, as upstream's: each may double
	// what is there.
	maxPatchCopyBytes = 3 << 20
)

// limitPatches sets the bound of JSON patches, which their library keeps for the whole process.
var limitPatches = sync.OnceFunc(func() { jsonpatch.AccumulatedCopySizeLimit = maxPatchCopyBytes })

// Server is the API server. Make it with New, call Start once its informers may run, then Serve.
type Server struct {
	config  *Config
	client  kubernetes.Interface
	groups  *api.Groups
	handler http.Handler
	id      *identity

	custom     *customResources
	aggregator *aggregator
	mapper     *restmapper.DeferredDiscoveryRESTMapper
	flow       *flowControl
	auditing   auditing
	reads      *readMetrics
	admit      *plugins
	attempts   *authenticationCounts
	types      schemas
	// shortcut answers what needs no filter; see fastReads.
	shortcut func(*h2.Exchange) bool
	hooks    *hooks
	end      *shutdown
	stopping atomic.Bool
}

// New builds the pipeline. Nothing runs yet, but Handler answers from now on; informers of the config have been asked
// for and may be started.
func New(ctx context.Context, config Config) (*Server, error) {
	if err := config.validate(); err != nil {
		return nil, err
	}
	c := &config
	c.Options = c.options()
	client, err := kubernetes.NewForConfig(c.Loopback)
	if err != nil {
		return nil, err
	}
	limitPatches()
	registerMetrics()
	s := &Server{config: c, client: client, reads: newReadMetrics(), attempts: findAuthenticationCounts(), hooks: newHooks(), end: newShutdown(), types: prepareSchemas()}
	s.flow = &flowControl{
		registry: c.Registry, inflight: &inflight{},
		upstream: utilflowcontrol.New(c.Informers, client.FlowcontrolV1(), MaxReadsInFlight+MaxWritesInFlight),
	}
	if s.auditing, err = newAuditing(c.options().Audit); err != nil {
		return nil, err
	}
	if s.id, err = newIdentity(ctx, c, client); err != nil {
		return nil, err
	}
	cached := memory.NewMemCacheClient(client.Discovery())
	s.mapper = restmapper.NewDeferredDiscoveryRESTMapper(cached)
	services := aggregatorapiserver.NewEndpointServiceResolver(c.Informers.Core().V1().Services().Lister(), endpointSlices(c))
	s.admit, err = newAdmission(ctx, c, client, s.id.authorizer, s.mapper, services)
	if err != nil {
		return nil, err
	}
	if s.groups, err = c.Registry.Groups(s.groupConfig()); err != nil {
		return nil, err
	}
	in := newInstaller(s.id, s.admit, s.types)
	if err := in.installAll(s.groups); err != nil {
		return nil, err
	}
	if err := s.extend(in, services, webhook.NewDefaultAuthenticationInfoResolverWrapper(c.ProxyTransport, nil, c.Loopback, noTracing())); err != nil {
		return nil, err
	}
	filters := &chain{config: c, id: s.id, flow: s.flow, auditing: s.auditing, end: s.end}
	writes, err := s.newWriter(in)
	if err != nil {
		return nil, err
	}
	reads := &reader{registry: c.Registry, custom: s.custom.served, next: soundPatches(writes), metrics: s.reads, zips: pieces.NewCache(zippedBytes),
		audited: s.auditing.backend != nil}
	s.handler = newBypass(bypass{next: filters.wrap(reads, legacyscheme.Codecs), inner: reads, writer: writes, authn: s.id.byCertificate, token: s.id.byKnownToken,
		inProcess: c.InProcessUser, authorizer: s.id.authorizer, exempt: &exempting{registry: c.Registry}, flow: s.flow, end: s.end, attempts: s.attempts})
	fast := &fastReads{reader: reads, authn: s.id.byCertificate, tokens: s.id.tokens, decisions: s.id.decisions, inflight: &s.flow.inflight.reads, attempts: s.attempts}
	s.shortcut = fast.serve
	return s, nil
}

// groupConfig is what the REST storage types need of this server.
func (s *Server) groupConfig() api.Config {
	c := s.config
	return api.Config{
		Loopback: c.Loopback, Informers: c.Informers,
		Authenticator: s.id.authenticator, Audiences: s.id.audiences, Authorizer: s.id.authorizer, RuleResolver: s.id.rules,
		TokenIssuer: s.id.issuer, KubeletTransport: c.KubeletTransport, ProxyTransport: c.ProxyTransport, ServiceCIDR: c.ServiceCIDR,
		NodePorts: utilnet.PortRange{Base: c.NodePorts.First, Size: c.NodePorts.Last - c.NodePorts.First + 1},
	}
}

// extend adds custom resources and aggregated servers.
func (s *Server) extend(in *installer, services webhook.ServiceResolver, webhooks webhook.AuthenticationInfoResolverWrapper) error {
	crds, err := crdclient.NewForConfig(s.config.Loopback)
	if err != nil {
		return err
	}
	if s.custom, err = newCustomResources(s.config, crds, in.admit, s.id.authorizer, services, webhooks, in.discovery, s.reads.drop); err != nil {
		return fmt.Errorf("make the handler of custom resources: %w", err)
	}
	registrations, err := aggregatorclient.NewForConfig(s.config.Loopback)
	if err != nil {
		return err
	}
	if s.aggregator, err = newAggregator(s.config, registrations, services, in.discovery); err != nil {
		return fmt.Errorf("make the aggregator: %w", err)
	}
	s.custom.served.elsewhere = s.aggregator.isRemote
	for gv := range in.versions {
		s.aggregator.builtin[gv] = true
	}
	s.aggregator.customList = func() map[schema.GroupVersion]bool {
		out := map[schema.GroupVersion]bool{}
		for gv := range customVersions(s.custom.lister()) {
			out[gv] = true
		}
		return out
	}
	return nil
}

func newInstaller(id *identity, admit admission.Interface, types schemas) *installer {
	return &installer{
		equivalents: runtime.NewEquivalentResourceRegistry(),
		admit:       admit,
		authorizer:  id.authorizer,
		schemas:     types,
		versions:    map[schema.GroupVersion]*version{},
		groups:      map[string]http.Handler{},
		discovery: &discoveries{
			root:   discovery.NewRootAPIsHandler(discovery.DefaultAddresses{}, legacyscheme.Codecs),
			named:  aggregated.NewResourceManager("apis"),
			legacy: aggregated.NewResourceManager("api"),
		},
	}
}

// schemas are what managed fields are made by: those of the built-in kinds, of APIServices and of definitions.
type schemas struct{ builtin, aggregation, extension *lazyTypes }

// prepareSchemas begins to build the schemas that a start needs, beside what else it has to do: the first write needs one.
func prepareSchemas() schemas {
	s := schemas{builtin: &lazyTypes{make: newTypeConverter}, aggregation: apiServiceKind.lazyTypes(), extension: definitionKind.lazyTypes()}
	go func() {
		for _, l := range []*lazyTypes{s.builtin, s.aggregation} {
			_, _ = l.get() // who uses it gets the error
		}
	}()
	return s
}

// lazyTypes is a schema, built once; who asks meanwhile waits.
type lazyTypes struct {
	make  func() (managedfields.TypeConverter, error)
	once  sync.Once
	types managedfields.TypeConverter
	err   error
}

// Handler is the whole pipeline; in-process callers use it without a socket.
func (s *Server) Handler() http.Handler { return s.handler }

// Start bootstraps the cluster's own objects and starts what keeps the API in order: custom resources, aggregation, the
// repair of service allocations. It returns when the bootstrap is done; the rest runs until ctx ends. The informers must run.
func (s *Server) Start(ctx context.Context, started func(func(context.Context))) error {
	if err := s.auditing.start(); err != nil {
		return err
	}
	started(func(ctx context.Context) { s.flow.run(ctx.Done()) })
	started(s.custom.run)
	started(s.aggregator.run)
	started(s.resetMapper)
	if s.id.reload != nil {
		started(s.id.reload.run)
	}
	s.hooks.done(hookInformers, hookFlowControl, hookFilter, hookCustomInformers, hookCustom, hookCustomSynced,
		hookAggregator, hookAvailability, hookRegistration, hookDiscovery)
	b := &bootstrap{config: s.config, client: s.client, hooks: s.hooks}
	g, within := errgroup.WithContext(ctx)
	g.Go(func() error { return s.registerAll(within) })
	if err := errors.Join(b.run(ctx), g.Wait()); err != nil {
		return err
	}
	s.hooks.done(hookRegistered)
	if s.config.Registry.Shared() {
		started(b.keepEndpoints)
	}
	if err := s.repair(ctx, started); err != nil {
		return err
	}
	s.hooks.done(hookRepair, hookComplete)
	started(s.preparePods)
	return nil
}

// preparePods reads the largest part of the schema, which the first pod would wait for.
func (s *Server) preparePods(context.Context) {
	pod := &corev1.Pod{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}}
	_, _ = s.types.builtin.ObjectToTyped(pod) // who uses it gets the error
}

// repair starts the checks of service addresses and ports and waits for the first to succeed: before it, no service can
// get a node port.
func (s *Server) repair(ctx context.Context, started func(func(context.Context))) error {
	var first sync.WaitGroup
	for _, run := range s.groups.Repairs {
		first.Add(1)
		started(func(ctx context.Context) {
			stop := make(chan struct{})
			context.AfterFunc(ctx, func() { close(stop) })
			run(sync.OnceFunc(first.Done), stop)
		})
	}
	done := make(chan struct{})
	go func() { first.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// registerAll writes the APIServices of everything that this server serves itself.
func (s *Server) registerAll(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(bootstrapWriters)
	for gv := range s.aggregator.builtin {
		if _, err := s.aggregator.lister.Get(gv.Version + "." + gv.Group); err == nil {
			continue
		}
		g.Go(func() error { return s.aggregator.register(ctx, gv) })
	}
	if err := g.Wait(); err != nil {
		return fmt.Errorf("register the built-in groups: %w", err)
	}
	return nil
}

// resetMapper forgets what kinds exist whenever that changes.
func (s *Server) resetMapper(ctx context.Context) {
	for {
		changed := s.config.Registry.Changed()
		s.mapper.Reset()
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
	}
}

// Serve answers on the listener until ctx ends, then drops no request that was accepted: see shutdown.
func (s *Server) Serve(ctx context.Context, listener net.Listener, config *tls.Config) error {
	config = config.Clone()
	config.ClientAuth = tls.RequestClientCert
	config.NextProtos = []string{"h2", "http/1.1"}
	config.DynamicRecordSizingDisabled = true // answers are written in one piece
	h2.TakeTurns(config, s.flow.inflight.isBusy)
	handler := s.handler
	if s.config.Front != nil {
		handler = s.config.Front(handler)
	}
	server := &http.Server{
		Handler:           handler,
		TLSConfig:         config,
		ReadHeaderTimeout: readHeaderTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          quietLog(),
		ConnState:         s.end.conns.state,
	}
	h2.Attach(server, s.http2Options())
	listener = h2.Listen(listener)
	done := make(chan error, 1)
	go func() { done <- server.ServeTLS(listener, "", "") }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	s.stopping.Store(true)
	defer s.auditing.close()
	ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
	defer cancel()
	err := s.end.run(ending, server, listener)
	if closed := server.Close(); !errors.Is(closed, net.ErrClosed) { // the listener was closed first of all
		err = errors.Join(err, closed)
	}
	if served := <-done; !errors.Is(served, http.ErrServerClosed) && !errors.Is(served, net.ErrClosed) {
		err = errors.Join(err, served)
	}
	return err
}

// http2Options are the bounds of an HTTP/2 connection, and its short cut, which knows no audit policy.
func (s *Server) http2Options() h2.Options {
	o := h2.Options{
		MaxStreams: maxStreams, MaxHeaderBytes: maxHeaderBytes, UploadPerStream: http2UploadPerStream,
		UploadPerConnection: http2UploadPerStream * maxStreams, IdleTimeout: idleTimeout, WriteTimeout: stalledWriteTimeout, ErrorLog: quietLog(),
	}
	if s.auditing.backend == nil {
		o.Fast = s.shortcut
	}
	return o
}
