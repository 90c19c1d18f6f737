package pod_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"knarr/network"
	"knarr/network/nettest"
	"knarr/network/pod"
)

// TestPodToPod has pods of one node and of three nodes talk over TCP and UDP, each seeing the other's own address.
func TestPodToPod(t *testing.T) {
	c := nettest.NewCluster(t, 2)
	c.Start()
	a, b := c.NewPod(0, "a"), c.NewPod(0, "b")
	d, e := c.NewPod(1, "d"), c.NewPod(2, "e")
	for _, from := range []nettest.Pod{a, b, d, e} {
		for name, to := range map[string]nettest.Pod{"a": a, "b": b, "d": d, "e": e} {
			for _, proto := range []string{"tcp", "udp"} {
				nettest.Eventually(t, 5*time.Second, func() error { // routes to other nodes follow the Node objects
					_, err := nettest.Ask(from.NetNS, proto, to.IP.String()+":8080")
					return err
				})
				got := nettest.MustAsk(t, from.NetNS, proto, to.IP.String()+":8080")
				require.Equal(t, nettest.Answer{Name: name, Client: from.IP.String()}, got)
			}
		}
	}
	for i, n := range c.Nodes { // each node reaches all pods
		for _, to := range []nettest.Pod{a, d, e} {
			_, err := nettest.Ask(n.NetNS, "tcp", to.IP.String()+":8080")
			require.NoError(t, err, "node %d to %s", i, to.IP)
		}
	}
}

// TestUnknownAddresses proves with a capture on the uplink that packets for pod addresses that nobody has stay on the machine.
func TestUnknownAddresses(t *testing.T) {
	c := nettest.NewCluster(t, 1)
	c.Start()
	a, d := c.NewPod(0, "a"), c.NewPod(1, "d")
	capture := nettest.Watch(t, c.Machine, nettest.UplinkName, nettest.ClusterCIDR.Contains)
	for _, ns := range []string{a.NetNS, d.NetNS, c.Machine, c.Nodes[1].NetNS} {
		for _, addr := range []string{"10.42.0.250:80", "10.42.1.250:80", "10.42.77.7:80"} {
			started := time.Now()
			_, err := nettest.Ask(ns, "tcp", addr)
			require.Error(t, err)
			require.True(t, errors.Is(err, syscall.EHOSTUNREACH) || errors.Is(err, syscall.ENETUNREACH), "%s: %v", addr, err)
			require.Less(t, time.Since(started), time.Second, "rejected, not dropped")
		}
	}
	_, err := nettest.Ask(c.Machine, "tcp", nettest.OutsideIP+":9") // something that does leave, so that the capture is known to work
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
	hits, seen := capture.Stop()
	require.Zero(t, hits)
	require.NotZero(t, seen)
}

// TestRestart has a second Network take over from the files of the first, and free what no sandbox holds.
func TestRestart(t *testing.T) {
	c := nettest.NewCluster(t, 0)
	c.Start()
	a, b := c.NewPod(0, "a"), c.NewPod(0, "b")
	opt := c.Nodes[0].Options
	opt.Informers, opt.PodCIDRs = nil, []netip.Prefix{c.Nodes[0].PodCIDR}
	again, err := pod.New(opt)
	require.NoError(t, err)
	c.Go(again.Run)
	<-again.Ready()

	ips, ok := again.IPs(a.ID)
	require.True(t, ok)
	require.Equal(t, a.IP, ips[0])
	res, err := again.SetUp(t.Context(), pod.Request{SandboxID: a.ID, NetnsPath: a.NetNS})
	require.NoError(t, err)
	require.Equal(t, a.IP, res.IPs[0], "setting up again keeps the address")
	next := c.NewPod(0, "c") // the first Network allocates: after b's address
	require.NotEqual(t, b.IP, next.IP)

	require.NoError(t, again.Reconcile(t.Context(), []string{b.ID}))
	_, ok = again.IPs(a.ID)
	require.False(t, ok)
	_, err = nettest.Ask(b.NetNS, "tcp", a.IP.String()+":8080")
	require.Error(t, err, "the stale sandbox has no link any more")
	require.NoFileExists(t, filepath.Join(opt.StateDir, a.ID+".json"))
	require.FileExists(t, filepath.Join(opt.StateDir, b.ID+".json"))
}

// TestPurge leaves neither links nor routes nor addresses nor files.
func TestPurge(t *testing.T) {
	c := nettest.NewCluster(t, 1)
	c.Start()
	c.NewPod(0, "a")
	opt := c.Nodes[0].Options
	opt.ClusterCIDRs = nil // a later process may not know them any more
	require.NoError(t, pod.Purge(opt))
	require.NoError(t, pod.Purge(opt))
	require.NoDirExists(t, opt.StateDir)
	nettest.In(t, c.Machine, func() error {
		links, err := netlink.LinkList()
		require.NoError(t, err)
		for _, l := range links {
			require.NotContains(t, l.Attrs().Alias, "knarr pod")
		}
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Protocol: network.RouteProtocol}, netlink.RT_FILTER_PROTOCOL)
		require.NoError(t, err)
		require.Empty(t, routes)
		lo, err := netlink.LinkByName("lo")
		require.NoError(t, err)
		addrs, err := netlink.AddrList(lo, netlink.FAMILY_V4)
		require.NoError(t, err)
		require.Len(t, addrs, 1)
		return nil
	})
}

// TestFailedSetUpLeavesNothing uses a namespace that does not exist.
func TestFailedSetUpLeavesNothing(t *testing.T) {
	c := nettest.NewCluster(t, 0)
	c.Start()
	n := c.Nodes[0]
	_, err := n.Pods.SetUp(t.Context(), pod.Request{SandboxID: "x", Namespace: "default", Name: "x", NetnsPath: "/nonexistent"})
	require.ErrorContains(t, err, "default/x")
	entries, err := os.ReadDir(n.Options.StateDir)
	require.NoError(t, err)
	require.Len(t, entries, 1, "only the ranges")
}

// TestCollision names the foreign route in the pod range.
func TestCollision(t *testing.T) {
	c := nettest.NewCluster(t, 0)
	nettest.Route(t, c.Machine, "10.42.7.0/24", nettest.OutsideIP)
	opt := c.Nodes[0].Options
	opt.PodCIDRs = []netip.Prefix{c.Nodes[0].PodCIDR}
	n, err := pod.New(opt)
	require.NoError(t, err)
	err = n.Run(t.Context())
	require.ErrorContains(t, err, "10.42.7.0/24")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	_, err = n.SetUp(ctx, pod.Request{SandboxID: "x"})
	require.ErrorIs(t, err, context.DeadlineExceeded)
}

// TestVXLAN puts a router between two machines: their pods talk through a tunnel.
func TestVXLAN(t *testing.T) {
	c := nettest.NewCluster(t, 0) // node-0 is the machine; its default gateway is the router
	far := nettest.NewNS(t, "far")
	nettest.Connect(t, c.Outside, "far0", "192.0.2.1/24", far, "up0", "192.0.2.2/24")
	nettest.Route(t, far, "default", "192.0.2.1")
	nettest.In(t, c.Outside, func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0) })
	c.AddMachine("node-far", far, netip.MustParseAddr("192.0.2.2"))
	c.Start()
	a, b := c.NewPod(0, "a"), c.NewPod(1, "b")
	nettest.Eventually(t, 5*time.Second, func() error {
		_, err := nettest.Ask(a.NetNS, "tcp", b.IP.String()+":8080")
		return err
	})
	require.Equal(t, nettest.Answer{Name: "b", Client: a.IP.String()}, nettest.MustAsk(t, a.NetNS, "tcp", b.IP.String()+":8080"))
	require.Equal(t, nettest.Answer{Name: "a", Client: b.IP.String()}, nettest.MustAsk(t, b.NetNS, "udp", a.IP.String()+":8080"))

	require.NoError(t, c.Client.CoreV1().Nodes().Delete(t.Context(), "node-far", metav1.DeleteOptions{}))
	nettest.Eventually(t, 5*time.Second, func() (err error) {
		nettest.In(t, c.Machine, func() error {
			if _, e := netlink.LinkByName("knarr-vxlan"); e == nil {
				err = errors.New("the tunnel is still there")
			}
			return nil
		})
		return err
	})
}

// BenchmarkSetUp measures a pod's link, addresses and routes; the target is below 3 ms.
func BenchmarkSetUp(b *testing.B) {
	c := nettest.NewCluster(b, 0)
	c.Start()
	ns := nettest.NewNS(b, "pod")
	n := c.Nodes[0].Pods
	i := 0
	for b.Loop() {
		i++
		req := pod.Request{SandboxID: fmt.Sprint("s", i), NetnsPath: ns}
		_, err := n.SetUp(b.Context(), req)
		require.NoError(b, err)
		b.StopTimer()
		require.NoError(b, n.TearDown(b.Context(), req))
		b.StartTimer()
	}
}

// TestDualStack gives pods of one node addresses in both families.
func TestDualStack(t *testing.T) {
	c := nettest.NewCluster(t, 0)
	opt := &c.Nodes[0].Options
	six := netip.MustParsePrefix("fd42:0:0:1::/64")
	opt.PodCIDRs = []netip.Prefix{c.Nodes[0].PodCIDR, six}
	opt.ClusterCIDRs = append(opt.ClusterCIDRs, netip.MustParsePrefix("fd42::/48"))
	c.Start()
	a, b := c.NewPod(0, "a"), c.NewPod(0, "b")
	ips, _ := c.Nodes[0].Pods.IPs(b.ID)
	require.Len(t, ips, 2)
	own, _ := c.Nodes[0].Pods.IPs(a.ID)
	require.Equal(t, nettest.Answer{Name: "b", Client: own[1].String()}, nettest.MustAsk(t, a.NetNS, "tcp", "["+ips[1].String()+"]:8080"))
	require.Equal(t, nettest.Answer{Name: "b", Client: a.IP.String()}, nettest.MustAsk(t, a.NetNS, "tcp", ips[0].String()+":8080"))
	require.Equal(t, "b", nettest.MustAsk(t, c.Machine, "tcp", "["+ips[1].String()+"]:8080").Name)
	_, err := nettest.Ask(a.NetNS, "tcp", "[fd42:0:0:1::99]:80")
	require.Error(t, err)
	require.NoError(t, pod.Purge(*opt))
}
