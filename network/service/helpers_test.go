package service_test

import (
	"context"
	"net"
	"net/http"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	v1 "k8s.io/api/core/v1"

	"knarr/network"
	"knarr/network/netns"
	"knarr/network/nettest"
	"knarr/network/pod"
)

const (
	errRefused     = syscall.ECONNREFUSED
	errUnreachable = syscall.EHOSTUNREACH
)

func hostPort(port uint16, proto v1.Protocol) pod.PortMapping {
	return pod.PortMapping{Protocol: proto, ContainerPort: 8080, HostPort: port}
}

func request(p nettest.Pod) pod.Request { return pod.Request{SandboxID: p.ID} }

// health asks a health check port and returns the status, 0 when nobody answers.
func health(ns, addr string) int {
	c := http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			return nettest.Dial(ns, "tcp", addr)
		},
	}}
	res, err := c.Get("http://" + addr + "/healthz")
	if err != nil {
		return 0
	}
	res.Body.Close()
	return res.StatusCode
}

func tables(t *testing.T, ns string, fn func(*nftables.Conn)) {
	t.Helper()
	h, err := netns.Open(ns)
	require.NoError(t, err)
	defer h.Close()
	c, err := nftables.New(nftables.WithNetNSFd(int(h)))
	require.NoError(t, err)
	fn(c)
}

// tableSize counts the chains and sets of all tables of ns.
func tableSize(t *testing.T, ns string) (chains, sets int) {
	t.Helper()
	tables(t, ns, func(c *nftables.Conn) {
		all, err := c.ListChains()
		require.NoError(t, err)
		chains = len(all)
		ts, err := c.ListTables()
		require.NoError(t, err)
		for _, table := range ts {
			s, err := c.GetSets(table)
			require.NoError(t, err)
			sets += len(s)
		}
	})
	return chains, sets
}

// flush deletes all rules of ns, as `nft flush ruleset` does.
func flush(t *testing.T, ns string) {
	t.Helper()
	tables(t, ns, func(c *nftables.Conn) {
		c.FlushRuleset()
		require.NoError(t, c.Flush())
	})
}

// routesOn lists our routes that lead to a link.
func routesOn(t *testing.T, ns, link string) (out []netlink.Route) {
	t.Helper()
	nettest.In(t, ns, func() error {
		l, err := netlink.LinkByName(link)
		if err != nil {
			return err
		}
		filter := &netlink.Route{Protocol: network.RouteProtocol, LinkIndex: l.Attrs().Index}
		out, err = netlink.RouteListFiltered(netlink.FAMILY_V4, filter, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_OIF)
		return err
	})
	return out
}
