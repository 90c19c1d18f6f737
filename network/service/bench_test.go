package service

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"
	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"

	"knarr/network/nettest"
)

const benchServices = 5000

// benchProxy is a data path with benchServices services of three endpoints, which are put into the caches directly.
func benchProxy(b *testing.B) *Proxy {
	b.Helper()
	f := informers.NewSharedInformerFactory(fake.NewClientset(), 0)
	p, err := New(Options{
		NodeName: "node-0", NetNS: nettest.NewNS(b, "node"), Informers: f,
		ClusterCIDRs: []netip.Prefix{nettest.ClusterCIDR}, ServiceCIDRs: []netip.Prefix{nettest.ServiceCIDR},
	})
	require.NoError(b, err)
	services := f.Core().V1().Services().Informer().GetStore()
	for i := range benchServices {
		svc, s := benchService(i)
		require.NoError(b, services.Add(svc))
		require.NoError(b, p.slices.Add(s))
	}
	p.kernel, err = openKernel(p.opt.NetNS, true)
	require.NoError(b, err)
	b.Cleanup(p.kernel.close)
	p.health = newHealthServers(p.opt, p.log)
	p.change(p.markAllLocked)
	return p
}

func benchService(i int) (*v1.Service, *discovery.EndpointSlice) {
	name := fmt.Sprint("svc", i)
	ip := fmt.Sprintf("10.43.%d.%d", i/250, i%250+1)
	port, tcp := int32(8080), v1.ProtocolTCP
	svc := &v1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}, Spec: v1.ServiceSpec{
		Type: v1.ServiceTypeClusterIP, ClusterIP: ip, ClusterIPs: []string{ip}, Ports: []v1.ServicePort{{Protocol: tcp, Port: 80}},
	}}
	s := &discovery.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: name, Labels: map[string]string{discovery.LabelServiceName: name}},
		AddressType: discovery.AddressTypeIPv4, Ports: []discovery.EndpointPort{{Protocol: &tcp, Port: &port}},
	}
	for e := range 3 {
		s.Endpoints = append(s.Endpoints, discovery.Endpoint{Addresses: []string{fmt.Sprintf("10.42.%d.%d", (i*3+e)/250, (i*3+e)%250+1)}})
	}
	return svc, s
}

// BenchmarkProgram5000 builds the whole table anew.
func BenchmarkProgram5000(b *testing.B) {
	p := benchProxy(b)
	for b.Loop() {
		p.broken = true
		p.change(p.markAllLocked)
		require.NoError(b, p.pass(b.Context()))
	}
	require.Len(b, p.plans, benchServices)
}

// BenchmarkChangeOneOf5000 takes one endpoint of one service away and puts it back.
func BenchmarkChangeOneOf5000(b *testing.B) {
	p := benchProxy(b)
	require.NoError(b, p.pass(b.Context()))
	_, full := benchService(77)
	_, less := benchService(77)
	less.Endpoints = less.Endpoints[:2]
	i := 0
	for b.Loop() {
		s := full
		if i++; i%2 == 1 {
			s = less
		}
		require.NoError(b, p.slices.Update(s))
		p.mark(source{"default", "svc77"})
		require.NoError(b, p.pass(b.Context()))
	}
	require.False(b, p.broken)
}
