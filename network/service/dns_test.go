package service_test

import (
	"context"
	"net/netip"
	"testing"
	"time"

	mdns "github.com/miekg/dns"
	"github.com/stretchr/testify/require"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"knarr/network/dns"
	"knarr/network/nettest"
	"knarr/network/service"
)

// TestByName has pods of two nodes, and the nodes, look a service up at the DNS service address and then connect to it, while the Service kube-dns is one
// of the services of the data path.
func TestByName(t *testing.T) {
	address := netip.MustParseAddr("10.43.0.10")
	var servers []*dns.Server
	l := newLabWith(t, 1, func(l *lab, o *service.Options) {
		o.LocalAddresses = []netip.Addr{address}
		s, err := dns.New(dns.Options{
			Addresses: o.LocalAddresses, NetNS: o.NetNS, Informers: o.Informers, Upstreams: []string{},
			Ranges: []netip.Prefix{nettest.ClusterCIDR, nettest.ServiceCIDR},
		})
		require.NoError(t, err)
		servers = append(servers, s)
	})
	for _, s := range servers {
		l.Go(s.Run)
	}
	a, c := l.NewPod(0, "a"), l.NewPod(1, "c")
	require.NoError(t, dns.EnsureService(t.Context(), l.Client, address))
	_, err := l.Client.CoreV1().Namespaces().Create(t.Context(), &v1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	l.create(newService("whoami", "10.43.0.7"), slice("whoami", backend{a, "node-0", ""}))
	for _, ns := range []string{a.NetNS, c.NetNS, l.Machine, l.Nodes[1].NetNS} {
		for _, proto := range []string{"udp", "tcp"} {
			var ip string
			nettest.Eventually(t, 5*time.Second, func() (err error) {
				ip, err = resolve(ns, proto, address, "whoami.default.svc.cluster.local.")
				return err
			})
			require.Equal(t, "10.43.0.7", ip)
		}
		require.Equal(t, "a", l.flow(ns, "tcp", "10.43.0.7:80").Name)
	}
}

func resolve(ns, proto string, server netip.Addr, name string) (string, error) {
	conn, err := nettest.Dial(ns, proto, netip.AddrPortFrom(server, 53).String())
	if err != nil {
		return "", err
	}
	defer conn.Close()
	m := new(mdns.Msg)
	m.SetQuestion(name, mdns.TypeA)
	r, _, err := (&mdns.Client{Net: proto, Timeout: time.Second}).ExchangeWithConn(m, &mdns.Conn{Conn: conn})
	if err != nil {
		return "", err
	}
	if len(r.Answer) == 0 {
		return "", context.DeadlineExceeded
	}
	return r.Answer[0].(*mdns.A).A.String(), nil
}
