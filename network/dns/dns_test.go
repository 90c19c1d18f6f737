package dns_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	mdns "github.com/miekg/dns"
	"github.com/stretchr/testify/require"
	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"

	"knarr/network/dns"
	"knarr/network/nettest"
)

var serviceIP = netip.MustParseAddr("10.43.0.10")

func ptr[T any](v T) *T { return &v }

func meta(ns, name string) metav1.ObjectMeta { return metav1.ObjectMeta{Namespace: ns, Name: name} }

// objects are a small cluster: a service, a dual-stack one, headless ones, an ExternalName.
func objects() *fake.Clientset {
	web := &v1.Service{ObjectMeta: meta("default", "whoami"), Spec: v1.ServiceSpec{ClusterIP: "10.43.0.7", ClusterIPs: []string{"10.43.0.7"}, Ports: []v1.ServicePort{
		{Name: "http", Protocol: v1.ProtocolTCP, Port: 80}, {Name: "metrics", Protocol: v1.ProtocolTCP, Port: 9090},
	}}}
	dual := &v1.Service{ObjectMeta: meta("default", "dual"), Spec: v1.ServiceSpec{ClusterIP: "10.43.0.8", ClusterIPs: []string{"10.43.0.8", "fd43::8"}}}
	db := &v1.Service{ObjectMeta: meta("prod", "db"), Spec: v1.ServiceSpec{ClusterIP: v1.ClusterIPNone, ClusterIPs: []string{v1.ClusterIPNone}, Ports: []v1.ServicePort{{Name: "sql", Port: 5432}}}}
	empty := &v1.Service{ObjectMeta: meta("prod", "empty"), Spec: v1.ServiceSpec{ClusterIP: v1.ClusterIPNone}}
	outside := &v1.Service{ObjectMeta: meta("prod", "outside"), Spec: v1.ServiceSpec{Type: v1.ServiceTypeExternalName, ExternalName: "www.example.org"}}
	inside := &v1.Service{ObjectMeta: meta("prod", "inside"), Spec: v1.ServiceSpec{Type: v1.ServiceTypeExternalName, ExternalName: "whoami.default.svc.cluster.local"}}
	loop := &v1.Service{ObjectMeta: meta("prod", "loop"), Spec: v1.ServiceSpec{Type: v1.ServiceTypeExternalName, ExternalName: "loop.prod.svc.cluster.local"}}
	slice := &discovery.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "prod", Name: "db-1", Labels: map[string]string{discovery.LabelServiceName: "db"}},
		AddressType: discovery.AddressTypeIPv4,
		Ports:       []discovery.EndpointPort{{Name: ptr("sql"), Protocol: ptr(v1.ProtocolTCP), Port: ptr(int32(15432))}},
		Endpoints: []discovery.Endpoint{
			{Addresses: []string{"10.42.0.5"}, Hostname: ptr("db-0"), Conditions: discovery.EndpointConditions{Ready: ptr(true)}},
			{Addresses: []string{"10.42.1.6"}},
			{Addresses: []string{"10.42.1.7"}, Hostname: ptr("db-2"), Conditions: discovery.EndpointConditions{Ready: ptr(false)}},
		},
	}
	return fake.NewClientset(web, dual, db, empty, outside, inside, loop, slice,
		&v1.Namespace{ObjectMeta: meta("", "default")}, &v1.Namespace{ObjectMeta: meta("", "prod")})
}

// upstream answers A 192.0.2.<last> for every name, counts questions, and runs on the loopback address.
func upstream(t *testing.T) (addr string, asked *atomic.Int64) {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	asked = &atomic.Int64{}
	srv := &mdns.Server{PacketConn: pc, Handler: mdns.HandlerFunc(func(w mdns.ResponseWriter, r *mdns.Msg) {
		asked.Add(1)
		m := new(mdns.Msg)
		m.SetReply(r)
		rr, _ := mdns.NewRR(r.Question[0].Name + " 60 IN A 192.0.2.80")
		m.Answer = []mdns.RR{rr}
		_ = w.WriteMsg(m)
	})}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.ActivateAndServe() }()
	t.Cleanup(func() { pc.Close(); <-done })
	return pc.LocalAddr().String(), asked
}

func start(t testing.TB, change func(*dns.Options)) (ns string) {
	t.Helper()
	client := objects()
	ns = nettest.NewNS(t, "node")
	opt := dns.Options{
		Addresses: []netip.Addr{serviceIP}, NetNS: ns, Informers: informers.NewSharedInformerFactory(client, 0),
		Ranges:     []netip.Prefix{nettest.ServiceCIDR, nettest.ClusterCIDR, netip.MustParsePrefix("fd43::/112")},
		ResolvConf: filepath.Join(t.TempDir(), "resolv.conf"),
	}
	if change != nil {
		change(&opt)
	}
	s, err := dns.New(opt)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	opt.Informers.Start(ctx.Done())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		require.NoError(t, <-ended)
		opt.Informers.Shutdown()
		require.NoError(t, dns.Purge(opt))
	})
	nettest.Eventually(t, 5*time.Second, func() error {
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("the server ended: %v", err)
		default:
		}
		if !s.Synced() {
			return fmt.Errorf("not synced")
		}
		return nil
	})
	return ns
}

func ask(t testing.TB, ns, proto, name string, qtype uint16) *mdns.Msg {
	t.Helper()
	c, err := nettest.Dial(ns, proto, netip.AddrPortFrom(serviceIP, 53).String())
	require.NoError(t, err)
	defer c.Close()
	m := new(mdns.Msg)
	m.SetQuestion(name, qtype)
	client := mdns.Client{Net: proto, Timeout: 2 * time.Second}
	r, _, err := client.ExchangeWithConn(m, &mdns.Conn{Conn: c})
	require.NoError(t, err, "%s %s", proto, name)
	return r
}

// texts are the data of records, sorted.
func texts(rrs []mdns.RR) []string {
	out := []string{}
	for _, rr := range rrs {
		f := strings.Fields(rr.String())
		out = append(out, strings.Join(f[3:], " "))
	}
	slices.Sort(out)
	return out
}

// TestAnswers is the table of names over UDP and TCP.
func TestAnswers(t *testing.T) {
	up, _ := upstream(t)
	ns := start(t, func(o *dns.Options) { o.Upstreams = []string{up} })
	nx, ok := mdns.RcodeNameError, mdns.RcodeSuccess
	for _, tc := range []struct {
		name  string
		qtype uint16
		rcode int
		want  []string
	}{
		{"whoami.default.svc.cluster.local.", mdns.TypeA, ok, []string{"A 10.43.0.7"}},
		{"WhoAmI.Default.svc.CLUSTER.local.", mdns.TypeA, ok, []string{"A 10.43.0.7"}},
		{"whoami.default.svc.cluster.local.", mdns.TypeAAAA, ok, nil},
		{"whoami.default.svc.cluster.local.", mdns.TypeTXT, ok, nil},
		{"dual.default.svc.cluster.local.", mdns.TypeAAAA, ok, []string{"AAAA fd43::8"}},
		{"nobody.default.svc.cluster.local.", mdns.TypeA, nx, nil},
		{"whoami.nowhere.svc.cluster.local.", mdns.TypeA, nx, nil},
		{"x.whoami.default.svc.cluster.local.", mdns.TypeA, nx, nil},
		{"whoami.default.svc.cluster.local.default.svc.cluster.local.", mdns.TypeA, nx, nil},
		{"default.svc.cluster.local.", mdns.TypeA, ok, nil},
		{"nowhere.svc.cluster.local.", mdns.TypeA, nx, nil},
		{"svc.cluster.local.", mdns.TypeA, ok, nil},
		{"foo.cluster.local.", mdns.TypeA, nx, nil},
		{"_http._tcp.whoami.default.svc.cluster.local.", mdns.TypeSRV, ok, []string{"SRV 0 100 80 whoami.default.svc.cluster.local."}},
		{"_http._udp.whoami.default.svc.cluster.local.", mdns.TypeSRV, nx, nil},
		{"_none._tcp.whoami.default.svc.cluster.local.", mdns.TypeSRV, nx, nil},
		{"_tcp.whoami.default.svc.cluster.local.", mdns.TypeA, ok, nil},
		{"whoami.default.svc.cluster.local.", mdns.TypeSRV, ok, []string{"SRV 0 50 80 whoami.default.svc.cluster.local.", "SRV 0 50 9090 whoami.default.svc.cluster.local."}},
		{"db.prod.svc.cluster.local.", mdns.TypeA, ok, []string{"A 10.42.0.5", "A 10.42.1.6"}},
		{"db-0.db.prod.svc.cluster.local.", mdns.TypeA, ok, []string{"A 10.42.0.5"}},
		{"10-42-1-6.db.prod.svc.cluster.local.", mdns.TypeA, ok, []string{"A 10.42.1.6"}},
		{"db-2.db.prod.svc.cluster.local.", mdns.TypeA, nx, nil},
		{"_sql._tcp.db.prod.svc.cluster.local.", mdns.TypeSRV, ok, []string{"SRV 0 50 15432 10-42-1-6.db.prod.svc.cluster.local.", "SRV 0 50 15432 db-0.db.prod.svc.cluster.local."}},
		{"empty.prod.svc.cluster.local.", mdns.TypeA, ok, nil},
		{"10-42-0-5.prod.pod.cluster.local.", mdns.TypeA, ok, []string{"A 10.42.0.5"}},
		{"10-42-0-5.nowhere.pod.cluster.local.", mdns.TypeA, nx, nil},
		{"word.prod.pod.cluster.local.", mdns.TypeA, nx, nil},
		{"7.0.43.10.in-addr.arpa.", mdns.TypePTR, ok, []string{"PTR whoami.default.svc.cluster.local."}},
		{"5.0.42.10.in-addr.arpa.", mdns.TypePTR, ok, []string{"PTR db-0.db.prod.svc.cluster.local."}},
		{"99.0.42.10.in-addr.arpa.", mdns.TypePTR, nx, nil},
		{"8.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.3.4.d.f.ip6.arpa.", mdns.TypePTR, ok, []string{"PTR dual.default.svc.cluster.local."}},
		{"outside.prod.svc.cluster.local.", mdns.TypeA, ok, []string{"A 192.0.2.80", "CNAME www.example.org."}},
		{"inside.prod.svc.cluster.local.", mdns.TypeA, ok, []string{"A 10.43.0.7", "CNAME whoami.default.svc.cluster.local."}},
		{"dns-version.cluster.local.", mdns.TypeTXT, ok, []string{`TXT "1.1.0"`}},
		{"ns.dns.cluster.local.", mdns.TypeA, ok, []string{"A 10.43.0.10"}},
		{"cluster.local.", mdns.TypeNS, ok, []string{"NS ns.dns.cluster.local."}},
		{"www.example.org.", mdns.TypeA, ok, []string{"A 192.0.2.80"}},
	} {
		for _, proto := range []string{"udp", "tcp"} {
			r := ask(t, ns, proto, tc.name, tc.qtype)
			require.Equal(t, tc.rcode, r.Rcode, "%s %s", proto, tc.name)
			if tc.want == nil {
				tc.want = []string{}
			}
			require.Equal(t, tc.want, texts(r.Answer), "%s %s", proto, tc.name)
			if len(r.Answer) == 0 {
				require.Len(t, r.Ns, 1, "%s: negative answers carry the SOA", tc.name)
			}
			if strings.HasSuffix(strings.ToLower(tc.name), "cluster.local.") {
				require.True(t, r.Authoritative, tc.name)
			}
		}
	}
	r := ask(t, ns, "udp", "loop.prod.svc.cluster.local.", mdns.TypeA)
	require.LessOrEqual(t, len(r.Answer), 10, "an alias of itself ends")
}

// TestForward asks upstream once for a name that is asked twice, never for the cluster's names, and reads the servers from resolv.conf.
func TestForward(t *testing.T) {
	up, asked := upstream(t)
	ns := start(t, func(o *dns.Options) { o.Upstreams = []string{netip.AddrPortFrom(serviceIP, 53).String(), up} })
	for range 3 {
		require.Len(t, ask(t, ns, "udp", "www.example.org.", mdns.TypeA).Answer, 1)
	}
	require.EqualValues(t, 1, asked.Load())
	ask(t, ns, "udp", "nobody.default.svc.cluster.local.", mdns.TypeA)
	ask(t, ns, "udp", "9.9.43.10.in-addr.arpa.", mdns.TypePTR)
	require.EqualValues(t, 1, asked.Load())
}

// TestNoUpstream answers the cluster's names and fails others at once.
func TestNoUpstream(t *testing.T) {
	ns := start(t, func(o *dns.Options) {
		require.NoError(t, os.WriteFile(o.ResolvConf, []byte("search lan\nnameserver 10.43.0.10\n"), 0o600)) // itself: left out
	})
	require.Len(t, ask(t, ns, "udp", "whoami.default.svc.cluster.local.", mdns.TypeA).Answer, 1)
	started := time.Now()
	require.Equal(t, mdns.RcodeServerFailure, ask(t, ns, "udp", "www.example.org.", mdns.TypeA).Rcode)
	require.Less(t, time.Since(started), time.Second)
}

// TestPortTaken says that somebody else has the port.
func TestPortTaken(t *testing.T) {
	ns := start(t, nil)
	s, err := dns.New(dns.Options{Addresses: []netip.Addr{serviceIP}, NetNS: ns, Informers: informers.NewSharedInformerFactory(objects(), 0)})
	require.NoError(t, err)
	require.ErrorContains(t, s.Run(t.Context()), "address already in use")
}

// TestEnsureService creates the Service once and notices another address.
func TestEnsureService(t *testing.T) {
	c := fake.NewClientset()
	require.NoError(t, dns.EnsureService(t.Context(), c, serviceIP))
	require.NoError(t, dns.EnsureService(t.Context(), c, serviceIP))
	svc, err := c.CoreV1().Services("kube-system").Get(t.Context(), "kube-dns", metav1.GetOptions{})
	require.NoError(t, err)
	require.Equal(t, "10.43.0.10", svc.Spec.ClusterIP)
	require.ErrorContains(t, dns.EnsureService(t.Context(), c, netip.MustParseAddr("10.43.0.11")), "10.43.0.10")
}

// TestMemory bounds the heap of a server with its caches.
func TestMemory(t *testing.T) {
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	up, _ := upstream(t)
	ns := start(t, func(o *dns.Options) { o.Upstreams = []string{up} })
	for i := range 300 {
		ask(t, ns, "udp", fmt.Sprintf("host%d.example.org.", i), mdns.TypeA)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	used := int64(after.HeapAlloc) - int64(before.HeapAlloc)
	t.Logf("heap: %d KiB", used/1024)
	require.Less(t, used, int64(5<<20))
}

// BenchmarkQuery measures a question over UDP, socket and all.
func BenchmarkQuery(b *testing.B) {
	ns := start(b, nil)
	c, err := nettest.Dial(ns, "udp", netip.AddrPortFrom(serviceIP, 53).String())
	require.NoError(b, err)
	defer c.Close()
	conn := &mdns.Conn{Conn: c}
	client := mdns.Client{}
	for b.Loop() {
		m := new(mdns.Msg)
		m.SetQuestion("whoami.default.svc.cluster.local.", mdns.TypeA)
		r, _, err := client.ExchangeWithConn(m, conn)
		require.NoError(b, err)
		require.Len(b, r.Answer, 1)
	}
}
