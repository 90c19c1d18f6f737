package apiserver_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"
	flowcontrolv1 "k8s.io/api/flowcontrol/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/storage/value"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"knarr/api"
	"knarr/apiserver"
	"knarr/client"
	"knarr/store"
	"knarr/store/pebble"
)

// cluster is a whole API over a store in memory.
type cluster struct {
	*kubernetes.Clientset
	dynamic dynamic.Interface
	handler late
	store   *store.Store
	fs      vfs.FS
	server  *apiserver.Server
	stop    func()
}

type late struct{ h atomic.Pointer[http.Handler] }

func (l *late) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if h := l.h.Load(); h != nil {
		(*h).ServeHTTP(w, r)
		return
	}
	http.Error(w, "starting", http.StatusServiceUnavailable)
}

// as is a client configuration of another identity.
func (c *cluster) as(name string, groups ...string) *kubernetes.Clientset {
	return kubernetes.NewForConfigOrDie(client.Config(&c.handler, client.User(name, append(groups, user.AllAuthenticated)...)))
}

var shared struct {
	once sync.Once
	c    *cluster
}

// theCluster is one that tests share; each test works in a namespace of its own.
func theCluster(t testing.TB) *cluster {
	t.Helper()
	shared.once.Do(func() { shared.c = startCluster(t, vfs.NewMem(), nil) })
	require.NotNil(t, shared.c)
	return shared.c
}

// startCluster runs an API on the file system; the caller stops it unless it is shared.
func startCluster(t testing.TB, fs vfs.FS, transformers map[schema.GroupResource]value.Transformer) *cluster {
	t.Helper()
	return startClusterWith(t, fs, transformers, func(*apiserver.Config) {})
}

// startClusterWith is startCluster with another configuration of the API.
func startClusterWith(t testing.TB, fs vfs.FS, transformers map[schema.GroupResource]value.Transformer, change func(*apiserver.Config)) *cluster {
	t.Helper()
	return startClusterOn(t, fs, transformers, change, true)
}

// startClusterOn is startClusterWith, whose store looks for objects that somebody changes only when told to: that costs readers much.
func startClusterOn(t testing.TB, fs vfs.FS, transformers map[schema.GroupResource]value.Transformer, change func(*apiserver.Config), detect bool) *cluster {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	engine, err := pebble.Open(ctx, pebble.Options{Dir: "db", FS: fs})
	require.NoError(t, err)
	s, err := store.Open(ctx, store.Options{Engine: engine, Debug: detect})
	require.NoError(t, err)
	registry, err := api.NewRegistry(s, func(r schema.GroupResource) value.Transformer { return transformers[r] })
	require.NoError(t, err)
	c := &cluster{store: s, fs: fs}
	readers := client.Options{Tables: registry.Tables(), Convert: api.Convert}
	config := client.Config(&c.handler, client.User("system:apiserver", user.SystemPrivilegedGroup, user.AllAuthenticated))
	key, ca := authority(t)
	_, cidr, err := net.ParseCIDR("10.43.0.0/16")
	require.NoError(t, err)
	informers, extensions, aggregations := client.NewFactory(readers), client.NewExtensionsFactory(readers), client.NewAggregatorFactory(readers)
	settings := apiserver.Config{
		Registry: registry, Loopback: config, InProcessUser: client.UserFrom,
		Informers: informers, ExtensionInformers: extensions, AggregationInformers: aggregations,
		ClientCA: ca, RequestHeaderCA: ca, ProxyClientName: "front",
		ProxyClientCert:   func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &tls.Certificate{}, nil },
		ServiceAccountKey: key, KubeletTransport: http.DefaultTransport, ProxyTransport: &http.Transport{},
		AdvertiseAddress: net.IPv4(192, 0, 2, 1), Port: 6443, ServiceCIDR: *cidr,
		NodePorts: apiserver.PortRange{First: 30000, Last: 30010}, ClusterDNS: net.IPv4(10, 43, 0, 10),
	}
	change(&settings)
	server, err := apiserver.New(ctx, settings)
	c.server = server
	require.NoError(t, err)
	h := server.Handler()
	c.handler.h.Store(&h)
	informers.Start(ctx.Done())
	extensions.Start(ctx.Done())
	aggregations.Start(ctx.Done())
	var wg sync.WaitGroup
	require.NoError(t, server.Start(ctx, func(f func(context.Context)) { wg.Go(func() { f(ctx) }) }))
	c.Clientset, c.dynamic = kubernetes.NewForConfigOrDie(config), dynamic.NewForConfigOrDie(config)
	c.settle(t)
	c.stop = func() {
		cancel()
		wg.Wait()
		informers.Shutdown()
		extensions.Shutdown()
		aggregations.Shutdown()
		require.NoError(t, s.Close())
	}
	return c
}

// settle waits for what a new server writes by itself after its start: the status of its flow schemas.
func (c *cluster) settle(t testing.TB) {
	t.Helper()
	require.Eventually(t, func() bool {
		list, err := c.FlowcontrolV1().FlowSchemas().List(context.Background(), metav1.ListOptions{})
		require.NoError(t, err)
		return !slices.ContainsFunc(list.Items, func(s flowcontrolv1.FlowSchema) bool { return len(s.Status.Conditions) == 0 })
	}, timeout, 5*time.Millisecond)
}

// authority makes a key and a certificate of it.
func authority(t testing.TB) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	return key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func restConfig(c *cluster) *rest.Config {
	return client.Config(&c.handler, client.User("system:apiserver", user.SystemPrivilegedGroup, user.AllAuthenticated))
}

func listOptions(label string) metav1.ListOptions { return metav1.ListOptions{LabelSelector: label} }
