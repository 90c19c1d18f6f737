package service_test

import (
	"context"
	"log/slog"
	"net"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	v1 "k8s.io/api/core/v1"

	"knarr/network/netns"
	"knarr/network/nettest"
	"knarr/network/pod"
	"knarr/network/service"
)

// TestNoDefaultRoute serves processes of a machine without any default route, and its pods.
func TestNoDefaultRoute(t *testing.T) {
	l := newLabWith(t, 1, func(l *lab, _ *service.Options) {
		if len(l.options) > 0 {
			return
		}
		nettest.In(t, l.Machine, func() error {
			return netlink.RouteDel(&netlink.Route{Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}, Gw: net.ParseIP(nettest.OutsideIP)})
		})
	})
	a, c := l.NewPod(0, "a"), l.NewPod(1, "c")
	l.create(newService("web", "10.43.0.7", nodePort(30080)), slice("web", backend{a, "node-0", ""}, backend{c, "node-1", ""}))
	for _, ns := range []string{l.Machine, l.Nodes[1].NetNS, a.NetNS, c.NetNS} {
		l.flow(ns, "tcp", "10.43.0.7:80")
		require.Len(t, nettest.Names(t, ns, "tcp", "10.43.0.7:80", 30), 2)
		require.Len(t, nettest.Names(t, ns, "tcp", nettest.MachineIP+":30080", 30), 2)
	}
	l.refused(l.Machine, "10.43.9.9:80", errRefused)
}

// TestHostPortSurvivesRestart has a new pod network announce the host ports of the old one's pods to a new data path.
func TestHostPortSurvivesRestart(t *testing.T) {
	l := newLab(t, 0)
	l.NewPod(0, "a", hostPort(8888, v1.ProtocolTCP))
	l.flow(l.Outside, "tcp", nettest.MachineIP+":8888")
	p, err := service.New(l.options[0])
	require.NoError(t, err)
	opt := l.Nodes[0].Options
	opt.HostPorts = p
	_, err = pod.New(opt)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	defer func() { cancel(); require.NoError(t, <-ended) }()
	nettest.Eventually(t, 5*time.Second, func() error {
		require.Equal(t, "a", nettest.MustAsk(t, l.Outside, "tcp", nettest.MachineIP+":8888").Name)
		if !p.Synced() {
			return context.DeadlineExceeded
		}
		return nil
	})
	require.Equal(t, "a", nettest.MustAsk(t, l.Outside, "tcp", nettest.MachineIP+":8888").Name)
}

// TestLoopbackIsGuarded sends packets for 127.0.0.1 from outside: route_localnet lets them not in.
func TestLoopbackIsGuarded(t *testing.T) {
	l := newLab(t, 0)
	nettest.Serve(t, l.Machine, "secret", 7777)
	nettest.In(t, l.Outside, func() error {
		link, err := netlink.LinkByName("down0")
		if err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		addr, _ := netlink.ParseAddr("127.0.0.1/8")
		if err := netlink.AddrDel(lo, addr); err != nil {
			return err
		}
		dst := &net.IPNet{IP: net.IPv4(127, 0, 0, 0), Mask: net.CIDRMask(8, 32)}
		return netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: dst, Gw: net.ParseIP(nettest.MachineIP)})
	})
	require.Equal(t, "secret", nettest.MustAsk(t, l.Outside, "tcp", nettest.MachineIP+":7777").Name)
	nettest.MustDrop(t, l.Outside, "127.0.0.1:7777")
}

// logs keeps what is logged.
type logs struct {
	mu  sync.Mutex
	all strings.Builder
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.String()
}

// TestForeignDrop reports a firewall that drops what is forwarded.
func TestForeignDrop(t *testing.T) {
	nft, err := exec.LookPath("nft")
	if err != nil {
		t.Skip("needs the nft command")
	}
	out := &logs{}
	l := newLabWith(t, 0, func(l *lab, o *service.Options) {
		o.Log = slog.New(slog.NewTextHandler(out, nil))
		cmd := exec.Command(nft, "add table ip filter; add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }")
		require.NoError(t, netns.Start(l.Machine, cmd))
		require.NoError(t, cmd.Wait())
	})
	require.Contains(t, out.String(), "table filter, chain FORWARD drops forwarded packets")
	found, err := service.ForeignDrops(l.options[0])
	require.NoError(t, err)
	require.Len(t, found, 1)
}
