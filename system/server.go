package system

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	apiextensionsinformers "k8s.io/apiextensions-apiserver/pkg/client/informers/externalversions"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	aggregatorinformers "k8s.io/kube-aggregator/pkg/client/informers/externalversions"

	"knarr/api"
	"knarr/apiserver"
	"knarr/apiserver/options"
	"knarr/cli"
	"knarr/client"
	"knarr/control"
	"knarr/network/loadbalancer"
	"knarr/node/image"
	"knarr/scheduler"
	"knarr/store"
	"knarr/store/etcd"
	"knarr/store/pebble"
	"knarr/system/pki"
	"knarr/system/tunnel"
)

const (
	// databaseDir is the store's directory below the server's.
	databaseDir = "db"
	// debugEnv turns the store's mutation detector on.
	debugEnv = "KNARR_DEBUG"
	// dialTimeout bounds connecting to agents, pods and services.
	dialTimeout = 10 * time.Second
	// A connection to the API that is silent for readIdleTimeout is asked for a sign of life, and given up after pingTimeout.
	readIdleTimeout, pingTimeout = 30 * time.Second, 15 * time.Second
	// Service node ports, as upstream's default.
	firstNodePort, lastNodePort = 30000, 32767
	// Leases by which several servers agree who runs the controllers and who the scheduler, and who may write the first: upstream's names.
	managerLease   = "kube-controller-manager"
	schedulerLease = "kube-scheduler"
	managerUser    = "system:kube-controller-manager"
)

// System implements cli.System.
type System struct{}

// New gives the parts to the command line.
func New() *System {
	image.QuietLibraries()
	return &System{}
}

var _ cli.System = (*System)(nil)

// controlPlane is the server role's parts, in the order in which they are made.
type controlPlane struct {
	config    cli.ServerConfig
	authority *pki.Authority
	store     *store.Store
	sharing   *sharing // nil with the embedded store

	encryption *encryption
	registry   *api.Registry
	tables     *api.Tables
	handler    lateHandler
	tunnels    *tunnel.Hub

	informers    informers.SharedInformerFactory
	pods         informers.SharedInformerFactory // those of the own node; nil without an agent
	extensions   apiextensionsinformers.SharedInformerFactory
	aggregations aggregatorinformers.SharedInformerFactory
	api          *apiserver.Server
	node         *node // nil without an agent
	log          *slog.Logger
}

// lateHandler is the API pipeline for in-process callers, which are made before it.
type lateHandler struct{ handler atomic.Pointer[http.Handler] }

// ServeHTTP implements http.Handler.
func (l *lateHandler) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if h := l.handler.Load(); h != nil {
		(*h).ServeHTTP(w, req)
		return
	}
	http.Error(w, "the API is starting", http.StatusServiceUnavailable)
}

// RunServer implements cli.System.
func (s *System) RunServer(ctx context.Context, config cli.ServerConfig) error {
	if err := config.Validate(); err != nil {
		return err
	}
	listener, err := listen(ctx, config)
	if err != nil {
		return err
	}
	defer listener.Close()
	g := newGroup(ctx)
	defer g.cancel(nil)
	p, err := newControlPlane(g.ctx, config)
	if err != nil {
		return err
	}
	p.start(g, listener)
	err = g.wait()
	if p.node != nil {
		err = errors.Join(err, p.node.close(ctx))
	}
	return errors.Join(err, p.store.Close())
}

// listen takes the API's port, first of all: whoever has it is the running server.
func listen(ctx context.Context, config cli.ServerConfig) (net.Listener, error) {
	address := net.JoinHostPort(config.BindAddress.String(), strconv.Itoa(config.Port))
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("port %d is already in use: stop what listens there, or choose another with --port", config.Port)
	}
	return l, err
}

// newControlPlane makes the store, the API and its in-process clients.
func newControlPlane(ctx context.Context, config cli.ServerConfig) (*controlPlane, error) {
	p := &controlPlane{config: config, log: slog.Default()}
	dir := cli.ServerDir(config.Dir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("the data directory is not usable: %w", err)
	}
	if err := p.openStore(ctx, dir); err != nil {
		return nil, err
	}
	var err error
	if p.registry, err = api.NewRegistry(p.store, p.encryption.transformer); err != nil {
		return nil, errors.Join(err, p.store.Close())
	}
	p.tables = p.registry.Tables()
	o := client.Options{Tables: p.tables, Convert: api.Convert}
	p.informers, p.extensions, p.aggregations = client.NewFactory(o), client.NewExtensionsFactory(o), client.NewAggregatorFactory(o)
	if p.tunnels, err = p.newTunnels(); err != nil {
		return nil, errors.Join(err, p.store.Close())
	}
	if err := p.makeParts(ctx); err != nil {
		return nil, errors.Join(err, p.store.Close())
	}
	return p, nil
}

// makeParts makes the API and the node's parts side by side: until they run, they need nothing of each other.
func (p *controlPlane) makeParts(ctx context.Context) error {
	var g errgroup.Group
	if !p.config.NoAgent {
		g.Go(func() (err error) { p.node, err = p.newNode(ctx); return err })
	}
	g.Go(func() (err error) { p.api, err = apiserver.New(ctx, p.apiConfig()); return err })
	if err := g.Wait(); err != nil {
		if p.node != nil {
			err = errors.Join(err, p.node.close(ctx))
		}
		return err
	}
	h := p.api.Handler()
	p.handler.handler.Store(&h)
	return nil
}

// openStore opens the store on its engine, and the keys that belong to it.
func (p *controlPlane) openStore(ctx context.Context, dir string) error {
	engine, err := p.openEngine(ctx, dir)
	if err != nil {
		return err
	}
	if err = p.loadKeys(ctx, dir); err == nil {
		p.store, err = store.Open(ctx, store.Options{Engine: engine, Debug: os.Getenv(debugEnv) != ""})
	}
	if err != nil {
		return errors.Join(err, engine.Close())
	}
	return nil
}

// openEngine opens the embedded engine of this machine, or an external etcd.
func (p *controlPlane) openEngine(ctx context.Context, dir string) (store.Engine, error) {
	d := p.config.Datastore
	if len(d.Endpoints) == 0 {
		return pebble.Open(ctx, pebble.Options{Dir: filepath.Join(dir, databaseDir), Logger: p.log})
	}
	e, err := etcd.Open(ctx, etcd.Options{Endpoints: d.Endpoints, CAFile: d.CAFile, CertFile: d.CertFile, KeyFile: d.KeyFile, Logger: p.log})
	if err != nil {
		return nil, err
	}
	p.sharing = &sharing{engine: e, config: &p.config}
	return e, nil
}

// loadKeys reads the authorities and the encryption keys, which several servers have in common.
func (p *controlPlane) loadKeys(ctx context.Context, dir string) error {
	found := false
	var err error
	if p.sharing != nil {
		if found, err = p.sharing.fetch(ctx); err != nil {
			return err
		}
	}
	p.authority, err = pki.Load(cli.TLSDir(p.config.Dir), pki.Options{
		Domain: p.config.Domain, ServiceAddress: firstAddress(p.config.ServiceCIDR).String(), ServerNames: p.names(),
	})
	if err != nil {
		return err
	}
	var o options.Encryption
	if p.config.API != nil {
		o = p.config.API.Encryption
	}
	p.encryption, err = loadEncryption(ctx, dir, o)
	if err == nil && p.sharing != nil && !found {
		err = p.sharing.publish(ctx)
	}
	return err
}

// names are what the API's certificate must cover besides the usual ones.
func (p *controlPlane) names() []string {
	names := append([]string(nil), p.config.ServerNames...)
	if host, err := os.Hostname(); err == nil {
		names = append(names, host)
	}
	return append(names, p.advertised().String())
}

// advertised is the address that pods and nodes reach the API at.
func (p *controlPlane) advertised() netip.Addr {
	switch {
	case p.config.AdvertiseAddress.IsValid():
		return p.config.AdvertiseAddress
	case p.config.NodeIP.IsValid():
		return p.config.NodeIP
	}
	return hostAddress()
}

func (p *controlPlane) apiConfig() apiserver.Config {
	front := p.authority.FrontProxySource()
	rotation := &rotation{encryption: p.encryption, registry: p.registry, sharing: p.sharing, servers: p.registry.Servers}
	agents := &tls.Config{
		RootCAs: p.authority.ServerCAPool(), GetClientCertificate: p.authority.KubeletClientSource().GetClientCertificate, MinVersion: tls.VersionTLS12,
	}
	return apiserver.Config{
		Registry:             p.registry,
		Loopback:             client.Config(&p.handler, client.User("system:apiserver", "system:masters", "system:authenticated")),
		InProcessUser:        client.UserFrom,
		Informers:            p.informers,
		ExtensionInformers:   p.extensions,
		AggregationInformers: p.aggregations,
		ClientCA:             p.authority.ClientCAPEM(),
		RequestHeaderCA:      p.authority.FrontProxyCAPEM(),
		ProxyClientName:      pki.FrontProxyUser,
		ProxyClientCert:      front.GetClientCertificate,
		ServiceAccountKey:    p.authority.ServiceAccountKey(),
		KubeletTransport:     &http.Transport{DialContext: p.tunnels.DialContext, TLSClientConfig: agents, IdleConnTimeout: time.Minute},
		ProxyTransport: &http.Transport{
			DialContext:     p.tunnels.DialContext,
			TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // pods have no certificates that anybody could verify
			IdleConnTimeout: time.Minute,
		},
		Front:            p.front,
		Tunnels:          p.tunnels,
		AdvertiseAddress: p.advertised().AsSlice(),
		Port:             p.config.Port,
		ServiceCIDR:      net.IPNet{IP: p.config.ServiceCIDR.Masked().Addr().AsSlice(), Mask: net.CIDRMask(p.config.ServiceCIDR.Bits(), p.config.ServiceCIDR.Addr().BitLen())},
		NodePorts:        apiserver.PortRange{First: firstNodePort, Last: lastNodePort},
		ClusterDNS:       p.config.ClusterDNS.AsSlice(),
		StoreCheck:       p.store.Check,
		Options:          p.config.API,
		Extra:            map[string]http.Handler{cli.EncryptionPath: rotation.handler()},
	}
}

// start starts every part of the server role, in this order: informers, API, bootstrap, controllers, scheduler.
func (p *controlPlane) start(g *group, listener net.Listener) {
	if p.node != nil {
		if err := p.node.start(g); err != nil {
			g.fail(err)
		}
		p.pods.Start(g.ctx.Done())
	}
	if p.encryption.follow != nil {
		g.background(p.encryption.follow)
	}
	p.informers.Start(g.ctx.Done())
	p.extensions.Start(g.ctx.Done())
	p.aggregations.Start(g.ctx.Done())
	g.run("API server", func(ctx context.Context) error { return p.api.Serve(ctx, listener, p.authority.ServerTLS()) })
	g.background(func(ctx context.Context) {
		if err := p.bootstrap(ctx, g); err != nil && ctx.Err() == nil {
			g.fail(err)
		}
	})
}

// bootstrap brings the cluster's own objects and everything that works on objects.
func (p *controlPlane) bootstrap(ctx context.Context, g *group) error {
	url := "https://" + net.JoinHostPort(localAddress(p.config.BindAddress), strconv.Itoa(p.config.Port))
	if err := p.authority.WriteAdminKubeconfig(cli.AdminKubeconfig(p.config.Dir), p.config.Name, url); err != nil {
		return err
	}
	if err := p.api.Start(ctx, g.background); err != nil {
		return err
	}
	g.run("certificates", func(ctx context.Context) error {
		return p.authority.Maintain(ctx, cli.AdminKubeconfig(p.config.Dir), p.config.Name, url)
	})
	if err := p.runOnce(g, "controllers", managerLease, managerUser, p.runControllers); err != nil {
		return err
	}
	if err := p.runOnce(g, "scheduler", schedulerLease, scheduler.UserName, func(ctx context.Context) error {
		return scheduler.Run(ctx, p.schedulerOptions())
	}); err != nil {
		return err
	}
	p.config.Ready()
	g.background(func(ctx context.Context) { lighten(ctx, pace{workHeap: workHeap(), busy: p.api.Busy}) })
	return nil
}

// runOnce runs a part in one server of the cluster: in this one, or, where several share a store, in the one that holds the lease.
func (p *controlPlane) runOnce(g *group, name, lease, user string, run func(context.Context) error) error {
	if !p.store.Shared() {
		g.run(name, run)
		return nil
	}
	e, err := newElection(lease, client.Config(&p.handler, client.User(user, "system:authenticated")), run)
	if err != nil {
		return err
	}
	g.run(name, e.stand)
	return nil
}

func (p *controlPlane) runControllers(ctx context.Context) error {
	o, err := p.controlOptions()
	if err != nil {
		return err
	}
	return control.Run(ctx, o)
}

// readers are the options of an informer factory of its own.
func (p *controlPlane) readers() client.Options {
	return client.Options{Tables: p.tables, Convert: api.Convert}
}

func (p *controlPlane) controlOptions() (control.Options, error) {
	as := func(u user.Info) *rest.Config { return client.Config(&p.handler, u) }
	o := control.Options{
		Config:            as,
		Informers:         client.NewFactory(p.readers()),
		Metadata:          client.NewMetadataFactory(p.readers(), nil),
		Changed:           p.tables.Changed,
		PodCIDR:           p.config.PodCIDR,
		ServiceCIDR:       p.config.ServiceCIDR,
		RootCA:            p.authority.ServerCAPEM(),
		ClientSigner:      signer(p.authority.ClientCAFile()),
		ServingSigner:     signer(p.authority.ServerCAFile()),
		ServiceAccountKey: p.authority.ServiceAccountKey(),
	}
	// Upstream's bootstrap policy gives this account the rights of a cloud's service controller, whose part this is.
	balancers, err := kubernetes.NewForConfig(as(client.ServiceAccount("service-controller")))
	if err != nil {
		return o, err
	}
	lb, err := loadbalancer.New(balancers, o.Informers, loadbalancer.Options{
		ReservedPorts: []int32{int32(p.config.Port), int32(p.config.KubeletPort)}, Log: p.log,
	})
	if err != nil {
		return o, err
	}
	o.Extra = []control.Controller{{Name: "load-balancer", Run: lb.Run}}
	return o, nil
}

// signer is one of the authorities' files, which hold certificate and key.
func signer(path string) control.KeyPair {
	return control.KeyPair{CertFile: path, KeyFile: path}
}

func (p *controlPlane) schedulerOptions() scheduler.Options {
	return scheduler.Options{
		Config:    client.Config(&p.handler, client.User(scheduler.UserName, "system:authenticated")),
		Informers: func() informers.SharedInformerFactory { return client.NewFactory(p.readers()) },
		Dynamic:   func() dynamicinformer.DynamicSharedInformerFactory { return client.NewDynamicFactory(p.readers()) },
	}
}

// newNode makes the server's own node, whose agent reads from the store itself.
func (p *controlPlane) newNode(ctx context.Context) (*node, error) {
	c := &p.config
	name, ip := c.NodeName, p.advertised()
	mine := p.readers()
	mine.Tweak = func(o *metav1.ListOptions) { o.FieldSelector = "spec.nodeName=" + name }
	p.pods = client.NewFactory(mine)
	return newNode(ctx, nodeConfig{
		cluster: p.clusterInfo(), clusterName: c.Name, dir: c.Dir, name: name, ip: ip, port: c.KubeletPort, shim: c.ShimPath, registries: c.RegistryConfigPath,
		client:    client.Config(&p.handler, client.User(pki.NodeUserPrefix+name, pki.NodeGroup, "system:authenticated")),
		informers: p.informers, pods: p.pods.Core().V1().Pods().Informer(),
		serving:    p.authority.NodeServingTLS(name, func() []string { return []string{ip.String()} }),
		registered: func() {}, log: p.log,
	})
}

func (p *controlPlane) clusterInfo() clusterInfo {
	c := &p.config
	return clusterInfo{PodCIDR: c.PodCIDR, ServiceCIDR: c.ServiceCIDR, NodeCIDR: c.NodeCIDR, ClusterDNS: c.ClusterDNS, Domain: c.Domain}
}

// front answers what comes before authentication: nodes that join.
func (p *controlPlane) front(next http.Handler) http.Handler {
	join, err := p.authority.JoinHandler(p.clusterInfo())
	if err != nil {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		switch req.URL.Path {
		case pki.CAPath, pki.JoinPath:
			join.ServeHTTP(w, req)
		default:
			next.ServeHTTP(w, req)
		}
	})
}

func localAddress(bind netip.Addr) string {
	if !bind.IsValid() || bind.IsUnspecified() {
		return "127.0.0.1"
	}
	return bind.String()
}

func firstAddress(p netip.Prefix) netip.Addr { return p.Masked().Addr().Next() }
