package service_test

import (
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"knarr/network"
	"knarr/network/netns"
	"knarr/network/nettest"
	"knarr/network/nodens"
	"knarr/network/pod"
	"knarr/network/service"
	"knarr/network/sysctl"
)

// lab is a cluster with a data path on each node.
type lab struct {
	*nettest.Cluster
	t       *testing.T
	options []service.Options
	proxies []*service.Proxy
}

func newLab(t *testing.T, furtherNodes int) *lab {
	t.Helper()
	return newLabWith(t, furtherNodes, nil)
}

// newLabWith lets change see the options of each data path, and the nodes, before anything starts.
func newLabWith(t *testing.T, furtherNodes int, change func(*lab, *service.Options)) *lab {
	t.Helper()
	l := &lab{Cluster: nettest.NewCluster(t, furtherNodes), t: t}
	var hp []network.HostPorts
	for i, n := range l.Nodes {
		opt := service.Options{
			NodeName: n.Name, NodeIPs: []netip.Addr{n.IP}, NetNS: n.NetNS, Informers: l.Informers,
			ClusterCIDRs: []netip.Prefix{nettest.ClusterCIDR}, ServiceCIDRs: []netip.Prefix{nettest.ServiceCIDR},
			Sysctl: sysctl.Recorder{Dir: filepath.Join(t.TempDir(), "sysctl"), Owner: "test"},
		}
		if i == 0 {
			opt.MasqueradeSources = []netip.Prefix{nodens.DefaultRange}
		}
		if change != nil {
			change(l, &opt)
		}
		p, err := service.New(opt)
		require.NoError(t, err)
		l.options, l.proxies, hp = append(l.options, opt), append(l.proxies, p), append(hp, p)
	}
	l.Start(hp...)
	for _, p := range l.proxies {
		l.Go(p.Run)
	}
	l.settle()
	return l
}

// settle waits until all data paths have followed what is in the API so far: a host port marker goes through each.
func (l *lab) settle() {
	l.t.Helper()
	for _, p := range l.proxies {
		nettest.Eventually(l.t, 10*time.Second, func() error {
			if !p.Synced() {
				return fmt.Errorf("not synced")
			}
			return nil
		})
	}
}

// flow waits until an answer comes, so that the change before is through, and returns it.
func (l *lab) flow(ns, proto, addr string) nettest.Answer {
	l.t.Helper()
	var a nettest.Answer
	nettest.Eventually(l.t, 5*time.Second, func() (err error) {
		a, err = nettest.Ask(ns, proto, addr)
		return err
	})
	return a
}

// refused waits until addr refuses connections.
func (l *lab) refused(ns, addr string, want error) {
	l.t.Helper()
	nettest.Eventually(l.t, 5*time.Second, func() error {
		started := time.Now()
		_, err := nettest.Ask(ns, "tcp", addr)
		if err == nil {
			return fmt.Errorf("%s still answers", addr)
		}
		require.Less(l.t, time.Since(started), 1500*time.Millisecond, "from %s: refused, not dropped: %v", filepath.Base(ns), err)
		require.ErrorIs(l.t, err, want)
		return nil
	})
}

func newService(name, ip string, change ...func(*v1.Service)) *v1.Service {
	s := &v1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name},
		Spec: v1.ServiceSpec{Type: v1.ServiceTypeClusterIP, ClusterIP: ip, ClusterIPs: []string{ip}, Ports: []v1.ServicePort{
			{Name: "tcp", Protocol: v1.ProtocolTCP, Port: 80, TargetPort: intstr.FromInt32(8080)},
			{Name: "udp", Protocol: v1.ProtocolUDP, Port: 80, TargetPort: intstr.FromInt32(8080)},
		}},
	}
	for _, c := range change {
		c(s)
	}
	return s
}

func nodePort(port int32) func(*v1.Service) {
	return func(s *v1.Service) {
		s.Spec.Type = v1.ServiceTypeNodePort
		s.Spec.Ports[0].NodePort, s.Spec.Ports[1].NodePort = port, port
	}
}

func balanced(ips ...string) func(*v1.Service) {
	return func(s *v1.Service) {
		s.Spec.Type = v1.ServiceTypeLoadBalancer
		for _, ip := range ips {
			s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, v1.LoadBalancerIngress{IP: ip})
		}
	}
}

func externalLocal(s *v1.Service) {
	s.Spec.ExternalTrafficPolicy = v1.ServiceExternalTrafficPolicyLocal
}

// backend is one endpoint for slice.
type backend struct {
	pod   nettest.Pod
	node  string
	state string // "", "unready", "terminating"
}

func slice(svc string, backends ...backend) *discovery.EndpointSlice {
	p := func(s string) *string { return &s }
	port, tcp, udp := int32(8080), v1.ProtocolTCP, v1.ProtocolUDP
	s := &discovery.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: svc + "-1", Labels: map[string]string{discovery.LabelServiceName: svc}},
		AddressType: discovery.AddressTypeIPv4,
		Ports:       []discovery.EndpointPort{{Name: p("tcp"), Protocol: &tcp, Port: &port}, {Name: p("udp"), Protocol: &udp, Port: &port}},
	}
	for _, b := range backends {
		ready, terminating, serving := b.state == "", b.state == "terminating", b.state != "unready"
		s.Endpoints = append(s.Endpoints, discovery.Endpoint{
			Addresses: []string{b.pod.IP.String()}, NodeName: p(b.node),
			Conditions: discovery.EndpointConditions{Ready: &ready, Serving: &serving, Terminating: &terminating},
		})
	}
	return s
}

func (l *lab) create(svc *v1.Service, s *discovery.EndpointSlice) {
	l.t.Helper()
	_, err := l.Client.CoreV1().Services(svc.Namespace).Create(l.t.Context(), svc, metav1.CreateOptions{})
	require.NoError(l.t, err)
	_, err = l.Client.DiscoveryV1().EndpointSlices(s.Namespace).Create(l.t.Context(), s, metav1.CreateOptions{})
	require.NoError(l.t, err)
}

func (l *lab) update(s *discovery.EndpointSlice) {
	l.t.Helper()
	_, err := l.Client.DiscoveryV1().EndpointSlices(s.Namespace).Update(l.t.Context(), s, metav1.UpdateOptions{})
	require.NoError(l.t, err)
}

// TestClusterIP spreads over three endpoints on two nodes, for pods and nodes, over TCP and UDP, and follows readiness.
func TestClusterIP(t *testing.T) {
	l := newLab(t, 1)
	a, b, c := l.NewPod(0, "a"), l.NewPod(0, "b"), l.NewPod(1, "c")
	client := l.NewPod(1, "client")
	eps := slice("web", backend{a, "node-0", ""}, backend{b, "node-0", ""}, backend{c, "node-1", ""})
	l.create(newService("web", "10.43.0.7"), eps)
	for _, ns := range []string{client.NetNS, a.NetNS, l.Machine, l.Nodes[1].NetNS} {
		for _, proto := range []string{"tcp", "udp"} {
			l.flow(ns, proto, "10.43.0.7:80")
			got := nettest.Names(t, ns, proto, "10.43.0.7:80", 60)
			require.Len(t, got, 3, "%s from %s: %v", proto, filepath.Base(ns), got)
			for name, n := range got {
				require.Greater(t, n, 5, "%s got %d of 60", name, n)
			}
		}
	}
	require.Equal(t, client.IP.String(), nettest.MustAsk(t, client.NetNS, "tcp", "10.43.0.7:80").Client, "the client's address is kept")

	eps.Endpoints[0].Conditions.Ready = new(bool)
	l.update(eps)
	nettest.Eventually(t, 5*time.Second, func() error {
		if got := nettest.Names(t, client.NetNS, "tcp", "10.43.0.7:80", 30); got["a"] > 0 {
			return fmt.Errorf("the unready endpoint still gets connections: %v", got)
		}
		return nil
	})
	require.Len(t, nettest.Names(t, client.NetNS, "tcp", "10.43.0.7:80", 40), 2)
	l.update(slice("web", backend{a, "node-0", "unready"}))
	for _, ns := range []string{client.NetNS, l.Machine, l.Nodes[1].NetNS} {
		l.refused(ns, "10.43.0.7:80", errRefused)
		l.refused(ns, "10.43.0.7:81", errRefused)
	}
	l.update(slice("web", backend{a, "node-0", "terminating"}, backend{b, "node-0", "unready"}))
	require.Equal(t, "a", l.flow(client.NetNS, "tcp", "10.43.0.7:80").Name, "a terminating endpoint is better than none")
	require.NoError(t, l.Client.CoreV1().Services("default").Delete(t.Context(), "web", metav1.DeleteOptions{}))
	l.refused(client.NetNS, "10.43.0.7:80", errRefused)
}

// TestHairpin lets a pod reach itself through its service.
func TestHairpin(t *testing.T) {
	l := newLab(t, 0)
	a := l.NewPod(0, "a")
	l.create(newService("web", "10.43.0.7", nodePort(30080)), slice("web", backend{a, "node-0", ""}))
	require.Equal(t, "a", l.flow(a.NetNS, "tcp", "10.43.0.7:80").Name)
	require.Equal(t, "a", l.flow(a.NetNS, "udp", "10.43.0.7:80").Name)
	require.Equal(t, "a", l.flow(a.NetNS, "tcp", nettest.MachineIP+":30080").Name)
}

// TestNodePort reaches a node port from outside, from pods, from the nodes themselves and on the loopback address.
func TestNodePort(t *testing.T) {
	l := newLab(t, 1)
	a, c := l.NewPod(0, "a"), l.NewPod(1, "c")
	l.create(newService("web", "10.43.0.7", nodePort(30080)), slice("web", backend{a, "node-0", ""}, backend{c, "node-1", ""}))
	l.flow(l.Outside, "tcp", nettest.MachineIP+":30080")
	for from, ns := range map[string]string{"outside": l.Outside, "machine": l.Machine, "node-1": l.Nodes[1].NetNS, "pod": c.NetNS} {
		for _, addr := range []string{nettest.MachineIP, "127.0.0.1", l.Nodes[1].IP.String()} {
			if addr == "127.0.0.1" && (from == "outside" || from == "pod") || from == "outside" && addr != nettest.MachineIP {
				continue
			}
			for _, proto := range []string{"tcp", "udp"} {
				l.flow(ns, proto, addr+":30080")
				require.Len(t, nettest.Names(t, ns, proto, addr+":30080", 30), 2, "%s from %s to %s", proto, from, addr)
			}
		}
	}
	for range 10 { // an endpoint on the node that was asked sees the client, another one the node
		got := nettest.MustAsk(t, l.Outside, "tcp", nettest.MachineIP+":30080")
		if got.Name == "a" {
			require.Equal(t, nettest.OutsideIP, got.Client)
		} else {
			require.NotEqual(t, nettest.OutsideIP, got.Client)
		}
	}
}

// TestLoadBalancer asks for the ingress addresses, with source ranges and the external policy Local.
func TestLoadBalancer(t *testing.T) {
	l := newLab(t, 1)
	a, c := l.NewPod(0, "a"), l.NewPod(1, "c")
	far := "203.0.113.80" // an address that no node has, as an external balancer or MetalLB would route here
	nettest.Route(t, l.Outside, far+"/32", nettest.MachineIP)
	l.create(newService("web", "10.43.0.7", balanced(nettest.MachineIP, far)), slice("web", backend{a, "node-0", ""}, backend{c, "node-1", ""}))
	for _, n := range l.Nodes {
		l.flow(n.NetNS, "tcp", "10.43.0.7:80")
	}
	for _, addr := range []string{nettest.MachineIP + ":80", far + ":80"} {
		for _, ns := range []string{l.Outside, c.NetNS, l.Machine, l.Nodes[1].NetNS} {
			l.flow(ns, "tcp", addr)
			require.Len(t, nettest.Names(t, ns, "tcp", addr, 30), 2)
		}
	}
	local := newService("local", "10.43.0.8", balanced(far), externalLocal, func(s *v1.Service) {
		s.Spec.Ports[0].Port, s.Spec.Ports[1].Port, s.Spec.HealthCheckNodePort = 81, 81, 31000
	})
	eps := slice("local", backend{a, "node-0", ""}, backend{c, "node-1", ""})
	l.create(local, eps)
	l.flow(l.Machine, "tcp", "10.43.0.8:81") // all addresses of a service come in one transaction
	require.Equal(t, map[string]int{"a": 20}, nettest.Names(t, l.Outside, "tcp", far+":81", 20), "only the endpoint of this node")
	require.Equal(t, nettest.OutsideIP, nettest.MustAsk(t, l.Outside, "tcp", far+":81").Client, "the client's address is kept")
	l.flow(c.NetNS, "tcp", far+":81")
	require.Len(t, nettest.Names(t, c.NetNS, "tcp", far+":81", 30), 2, "internal clients reach all endpoints")
	answers := func(want int) {
		t.Helper()
		nettest.Eventually(t, 5*time.Second, func() error {
			if code := health(l.Outside, nettest.MachineIP+":31000"); code != want {
				return fmt.Errorf("health check says %d, not %d", code, want)
			}
			return nil
		})
	}
	answers(200)
	l.update(slice("local", backend{c, "node-1", ""}))
	answers(503)
	nettest.MustDrop(t, l.Outside, far+":81") // so that the balancer tries another node
	l.flow(l.Machine, "tcp", far+":81")

	guarded := newService("guarded", "10.43.0.9", balanced(far), func(s *v1.Service) {
		s.Spec.Ports[0].Port, s.Spec.Ports[1].Port = 82, 82
		s.Spec.LoadBalancerSourceRanges = []string{"203.0.113.0/24", "203.0.113.9/32", "10.42.0.0/16"}
	})
	l.create(guarded, slice("guarded", backend{a, "node-0", ""}))
	l.flow(l.Machine, "tcp", "10.43.0.9:82")
	l.flow(c.NetNS, "tcp", far+":82")
	nettest.MustDrop(t, l.Outside, far+":82") // 198.51.100.1 is not in the ranges
}

// TestAffinity keeps a client at its endpoint until that goes.
func TestAffinity(t *testing.T) {
	l := newLab(t, 1)
	pods := map[string]nettest.Pod{"a": l.NewPod(0, "a"), "b": l.NewPod(0, "b"), "c": l.NewPod(1, "c")}
	all := []backend{{pods["a"], "node-0", ""}, {pods["b"], "node-0", ""}, {pods["c"], "node-1", ""}}
	l.create(newService("web", "10.43.0.7", func(s *v1.Service) { s.Spec.SessionAffinity = v1.ServiceAffinityClientIP }), slice("web", all...))
	seen := map[string]bool{}
	for i := range 8 {
		client := l.NewPod(0, fmt.Sprint("client", i))
		first := l.flow(client.NetNS, "tcp", "10.43.0.7:80").Name
		seen[first] = true
		require.Equal(t, map[string]int{first: 20}, nettest.Names(t, client.NetNS, "tcp", "10.43.0.7:80", 20))
	}
	require.Greater(t, len(seen), 1, "clients differ")

	client := l.NewPod(0, "mover")
	first := l.flow(client.NetNS, "tcp", "10.43.0.7:80").Name
	var rest []backend
	for _, b := range all {
		if b.pod.IP != pods[first].IP {
			rest = append(rest, b)
		}
	}
	l.update(slice("web", rest...))
	var second string
	nettest.Eventually(t, 5*time.Second, func() error {
		if second = nettest.MustAsk(t, client.NetNS, "tcp", "10.43.0.7:80").Name; second == first {
			return fmt.Errorf("still at the endpoint that is gone")
		}
		return nil
	})
	require.Equal(t, map[string]int{second: 20}, nettest.Names(t, client.NetNS, "tcp", "10.43.0.7:80", 20))
}

// TestUDPFlush moves a UDP client that keeps its socket when its endpoint goes.
func TestUDPFlush(t *testing.T) {
	l := newLab(t, 0)
	a, b, client := l.NewPod(0, "a"), l.NewPod(0, "b"), l.NewPod(0, "client")
	l.create(newService("web", "10.43.0.7", nodePort(30080)), slice("web", backend{a, "node-0", ""}))
	for _, addr := range []string{"10.43.0.7:80", nettest.MachineIP + ":30080"} {
		l.update(slice("web", backend{a, "node-0", ""}))
		nettest.Eventually(t, 5*time.Second, func() error {
			if got, err := nettest.Ask(client.NetNS, "udp", addr); err != nil || got.Name != "a" {
				return fmt.Errorf("%v: %v", got, err)
			}
			return nil
		})
		conn, err := nettest.Dial(client.NetNS, "udp", addr)
		require.NoError(t, err)
		defer conn.Close()
		got, err := nettest.AskOn(conn)
		require.NoError(t, err)
		require.Equal(t, "a", got.Name)
		l.update(slice("web", backend{b, "node-0", ""}))
		nettest.Eventually(t, 5*time.Second, func() error {
			if got, err := nettest.AskOn(conn); err != nil || got.Name != "b" {
				return fmt.Errorf("%v: %v", got, err)
			}
			return nil
		})
	}
}

// TestUnknownServiceAddresses proves with a capture on the uplink that packets for service addresses that nobody has are rejected on the node.
func TestUnknownServiceAddresses(t *testing.T) {
	l := newLab(t, 1)
	a, c := l.NewPod(0, "a"), l.NewPod(1, "c")
	capture := nettest.Watch(t, l.Machine, nettest.UplinkName, func(dst netip.Addr) bool {
		return nettest.ServiceCIDR.Contains(dst) || nettest.ClusterCIDR.Contains(dst)
	})
	for _, ns := range []string{a.NetNS, c.NetNS, l.Machine, l.Nodes[1].NetNS} {
		l.refused(ns, "10.43.9.9:80", errRefused)
		l.refused(ns, "10.42.0.99:80", errUnreachable)
		l.refused(ns, "10.42.99.99:80", errUnreachable)
		conn, err := nettest.Dial(ns, "udp", "10.43.9.9:53")
		require.NoError(t, err)
		_, err = nettest.AskOn(conn)
		if ns == a.NetNS || ns == c.NetNS {
			require.ErrorIs(t, err, errRefused)
		} else {
			require.ErrorIs(t, err, syscall.EPERM, "what the kernel says to a process whose own packet is rejected")
		}
		conn.Close()
	}
	nettest.MustAsk(t, a.NetNS, "tcp", c.IP.String()+":8080")
	_, err := nettest.Ask(l.Machine, "tcp", nettest.FarIP+":9")
	require.ErrorIs(t, err, errRefused)
	hits, seen := capture.Stop()
	require.Zero(t, hits)
	require.NotZero(t, seen)
}

// TestOutbound masquerades what pods and nodes send to the outside, and nothing that stays in the cluster.
func TestOutbound(t *testing.T) {
	l := newLab(t, 2)
	a, c := l.NewPod(0, "a"), l.NewPod(1, "c")
	nettest.Serve(t, l.Outside, "outside", 9000)
	for _, ns := range []string{a.NetNS, c.NetNS, l.Nodes[2].NetNS, l.Machine} {
		require.Equal(t, nettest.Answer{Name: "outside", Client: nettest.MachineIP}, nettest.MustAsk(t, ns, "tcp", nettest.FarIP+":9000"))
	}
	nettest.Serve(t, l.Nodes[2].NetNS, "node-2", 9000)
	require.Equal(t, c.IP.String(), nettest.MustAsk(t, c.NetNS, "tcp", l.Nodes[2].IP.String()+":9000").Client)
}

// TestHostPort reaches a pod's host port from outside, from the node itself and from the pod.
func TestHostPort(t *testing.T) {
	l := newLab(t, 0)
	b := l.NewPod(0, "b")
	a := l.NewPod(0, "a", hostPort(8888, v1.ProtocolTCP), hostPort(8888, v1.ProtocolUDP))
	for _, proto := range []string{"tcp", "udp"} {
		for _, ns := range []string{l.Outside, l.Machine, b.NetNS, a.NetNS} {
			require.Equal(t, "a", nettest.MustAsk(t, ns, proto, nettest.MachineIP+":8888").Name)
		}
		require.Equal(t, "a", nettest.MustAsk(t, l.Machine, proto, "127.0.0.1:8888").Name)
	}
	require.Equal(t, nettest.OutsideIP, nettest.MustAsk(t, l.Outside, "tcp", nettest.MachineIP+":8888").Client)
	require.NoError(t, l.Nodes[0].Pods.TearDown(t.Context(), request(a)))
	_, err := nettest.Ask(l.Outside, "tcp", nettest.MachineIP+":8888")
	require.ErrorIs(t, err, errRefused)
}

// TestRestart ends a data path: its rules work on; another one takes over without a gap and frees what has gone meanwhile; Purge leaves nothing.
func TestRestart(t *testing.T) {
	l := newLab(t, 0)
	a, client := l.NewPod(0, "a"), l.NewPod(0, "client")
	l.create(newService("web", "10.43.0.7"), slice("web", backend{a, "node-0", ""}))
	l.flow(client.NetNS, "tcp", "10.43.0.7:80")

	opt := l.options[0]
	for range 3 { // each generation replaces the one before
		ctx, cancel := context.WithCancel(t.Context())
		p, err := service.New(opt)
		require.NoError(t, err)
		ended := make(chan error, 1)
		go func() { ended <- p.Run(ctx) }()
		nettest.Eventually(t, 5*time.Second, func() error {
			nettest.MustAsk(t, client.NetNS, "tcp", "10.43.0.7:80")
			if !p.Synced() {
				return fmt.Errorf("not synced")
			}
			return nil
		})
		nettest.MustAsk(t, client.NetNS, "tcp", "10.43.0.7:80")
		cancel()
		require.NoError(t, <-ended)
		nettest.MustAsk(t, client.NetNS, "tcp", "10.43.0.7:80")
	}
	chains, sets := tableSize(t, l.Machine)
	require.Less(t, chains, 20, "old generations are gone")
	require.Equal(t, 32, sets)
}

// TestPurge leaves neither table nor routes nor settings.
func TestPurge(t *testing.T) {
	const setting = "net/ipv4/conf/all/route_localnet" // a new namespace has it from the machine
	before := ""
	l := newLabWith(t, 0, func(l *lab, _ *service.Options) {
		var err error
		before, err = sysctl.Recorder{NetNS: l.Machine}.Get(setting)
		require.NoError(t, err)
	})
	a := l.NewPod(0, "a")
	l.create(newService("web", "10.43.0.7"), slice("web", backend{a, "node-0", ""}))
	l.flow(l.Machine, "tcp", "10.43.0.7:80")
	require.NoError(t, service.Purge(l.options[0]))
	require.NoError(t, service.Purge(l.options[0]))
	chains, sets := tableSize(t, l.Machine)
	require.Zero(t, chains+sets)
	v, err := sysctl.Recorder{NetNS: l.Machine}.Get(setting)
	require.NoError(t, err)
	require.Equal(t, before, v)
	require.Empty(t, routesOn(t, l.Machine, "lo"))
}

// TestRepair flushes the ruleset behind the data path's back, as a restart of nftables.service does: the rules come back by themselves.
func TestRepair(t *testing.T) {
	nft, err := exec.LookPath("nft")
	if err != nil {
		t.Skip("needs the nft command")
	}
	l := newLab(t, 0)
	a := l.NewPod(0, "a")
	l.create(newService("web", "10.43.0.7"), slice("web", backend{a, "node-0", ""}))
	l.flow(l.Machine, "tcp", "10.43.0.7:80")
	for range 2 {
		cmd := exec.Command(nft, "flush", "ruleset")
		require.NoError(t, netns.Start(l.Machine, cmd))
		require.NoError(t, cmd.Wait())
		l.flow(a.NetNS, "tcp", "10.43.0.7:80")
	}
}

// TestRebuildAfterFailure flushes the ruleset from this process, which is not watched: the next change fails and brings everything back.
func TestRebuildAfterFailure(t *testing.T) {
	l := newLab(t, 0)
	a := l.NewPod(0, "a")
	l.create(newService("web", "10.43.0.7"), slice("web", backend{a, "node-0", ""}))
	l.flow(l.Machine, "tcp", "10.43.0.7:80")
	flush(t, l.Machine)
	l.create(newService("other", "10.43.0.8"), slice("other", backend{a, "node-0", ""}))
	l.flow(l.Machine, "tcp", "10.43.0.8:80")
	l.flow(l.Machine, "tcp", "10.43.0.7:80")
}

// TestIPv6 serves a dual-stack service: plain, sticky, to itself, and rejects what nobody has.
func TestIPv6(t *testing.T) {
	six, serviceSix := netip.MustParsePrefix("fd42:0:0:1::/64"), netip.MustParsePrefix("fd43::/112")
	l := newLabWith(t, 0, func(l *lab, opt *service.Options) {
		opt.ClusterCIDRs = append(opt.ClusterCIDRs, netip.MustParsePrefix("fd42::/48"))
		opt.ServiceCIDRs = append(opt.ServiceCIDRs, serviceSix)
		l.Nodes[0].Options.PodCIDRs = []netip.Prefix{l.Nodes[0].PodCIDR, six}
		l.Nodes[0].Options.ClusterCIDRs = opt.ClusterCIDRs
	})
	a, b, client := l.NewPod(0, "a"), l.NewPod(0, "b"), l.NewPod(0, "client")
	parts := slice("web", backend{a, "node-0", ""}, backend{b, "node-0", ""})
	parts.AddressType = discovery.AddressTypeIPv6
	for i, p := range []nettest.Pod{a, b} {
		ips, _ := l.Nodes[0].Pods.IPs(p.ID)
		parts.Endpoints[i].Addresses = []string{ips[1].String()}
	}
	svc := newService("web", "10.43.0.7", nodePort(30080), func(s *v1.Service) { s.Spec.ClusterIPs = append(s.Spec.ClusterIPs, "fd43::7") })
	l.create(svc, parts)
	for _, proto := range []string{"tcp", "udp"} {
		l.flow(client.NetNS, proto, "[fd43::7]:80")
		require.Len(t, nettest.Names(t, client.NetNS, proto, "[fd43::7]:80", 30), 2)
		require.Len(t, nettest.Names(t, a.NetNS, proto, "[fd43::7]:80", 30), 2, "itself too")
	}
	l.refused(client.NetNS, "10.43.0.7:80", errRefused) // no IPv4 endpoints
	node := pod.NodeAddress(six)
	require.Len(t, nettest.Names(t, client.NetNS, "tcp", "["+node.String()+"]:30080", 30), 2)
	require.Len(t, nettest.Names(t, l.Machine, "tcp", "["+node.String()+"]:30080", 30), 2)
	l.refused(client.NetNS, "[fd43::9]:80", errRefused)

	sticky := svc.DeepCopy()
	sticky.Spec.SessionAffinity = v1.ServiceAffinityClientIP
	_, err := l.Client.CoreV1().Services("default").Update(t.Context(), sticky, metav1.UpdateOptions{})
	require.NoError(t, err)
	nettest.Eventually(t, 5*time.Second, func() error {
		if got := nettest.Names(t, client.NetNS, "tcp", "[fd43::7]:80", 20); len(got) != 1 {
			return fmt.Errorf("not sticky: %v", got)
		}
		return nil
	})
}

// TestSameAddressTwice gives two services one external address and port: the older one has it, the other one when that goes.
func TestSameAddressTwice(t *testing.T) {
	l := newLab(t, 0)
	a, b := l.NewPod(0, "a"), l.NewPod(0, "b")
	aged := func(sec int64) func(*v1.Service) {
		return func(s *v1.Service) {
			s.CreationTimestamp = metav1.Unix(sec, 0)
			s.Spec.ExternalIPs = []string{"203.0.113.50"}
		}
	}
	l.create(newService("first", "10.43.0.7", aged(1)), slice("first", backend{a, "node-0", ""}))
	l.flow(b.NetNS, "tcp", "10.43.0.7:80")
	require.Equal(t, "a", l.flow(b.NetNS, "tcp", "203.0.113.50:80").Name)
	l.create(newService("second", "10.43.0.8", aged(2)), slice("second", backend{b, "node-0", ""}))
	require.Equal(t, "b", l.flow(l.Machine, "tcp", "10.43.0.8:80").Name)
	require.Equal(t, map[string]int{"a": 10}, nettest.Names(t, b.NetNS, "tcp", "203.0.113.50:80", 10))
	require.NoError(t, l.Client.CoreV1().Services("default").Delete(t.Context(), "first", metav1.DeleteOptions{}))
	nettest.Eventually(t, 5*time.Second, func() error {
		got, err := nettest.Ask(l.Machine, "tcp", "203.0.113.50:80")
		if err == nil && got.Name != "b" {
			err = fmt.Errorf("answered by %s", got.Name)
		}
		return err
	})
}
