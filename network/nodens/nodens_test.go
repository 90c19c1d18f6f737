package nodens_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"

	"knarr/network/netns"
	"knarr/network/nettest"
	"knarr/network/nodens"
	"knarr/network/sysctl"
)

func machine(t *testing.T) nodens.Options {
	return nodens.Options{
		Cluster: fmt.Sprintf("t%x", rand.Uint32()), Dir: filepath.Join(t.TempDir(), "nodes"), HostNS: nettest.NewNS(t, "machine"),
		Sysctl: sysctl.Recorder{Dir: filepath.Join(t.TempDir(), "sysctl"), Owner: "test"},
	}
}

// TestNodesReachEachOther makes two nodes on a machine that has no uplink at all.
func TestNodesReachEachOther(t *testing.T) {
	o := machine(t)
	a, err := nodens.SetUp(o, 1)
	require.NoError(t, err)
	b, err := nodens.SetUp(o, 2)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, nodens.Purge(o)) })
	require.Equal(t, "10.41.1.2", a.Address.String())
	require.Equal(t, "10.41.2.1", b.Gateway.String())
	nettest.Serve(t, b.NetNS, "b", 7000)
	nettest.Serve(t, o.HostNS, "machine", 7000)
	require.Equal(t, nettest.Answer{Name: "b", Client: a.Address.String()}, nettest.MustAsk(t, a.NetNS, "tcp", b.Address.String()+":7000"))
	require.Equal(t, nettest.Answer{Name: "machine", Client: a.Address.String()}, nettest.MustAsk(t, a.NetNS, "tcp", a.Gateway.String()+":7000"))
	require.Equal(t, "b", nettest.MustAsk(t, o.HostNS, "tcp", b.Address.String()+":7000").Name)
}

// TestRepairAndPurge breaks a node in each way that a crash can, sets it up again, and takes everything down twice.
func TestRepairAndPurge(t *testing.T) {
	o := machine(t)
	before, err := sysctl.Recorder{NetNS: o.HostNS}.Get("net/ipv4/ip_forward") // a new namespace has it from the machine
	require.NoError(t, err)
	n, err := nodens.SetUp(o, 3)
	require.NoError(t, err)
	again, err := nodens.SetUp(o, 3)
	require.NoError(t, err)
	require.Equal(t, n, again)

	require.NoError(t, netns.Delete(n.NetNS)) // the namespace is gone, the link may linger
	_, err = nodens.SetUp(o, 3)
	require.NoError(t, err)
	nettest.In(t, o.HostNS, func() error {
		l, err := netlink.LinkByName(n.HostLink)
		require.NoError(t, err)
		return netlink.LinkDel(l)
	})
	_, err = nodens.SetUp(o, 3)
	require.NoError(t, err)
	found, err := nodens.List(o)
	require.NoError(t, err)
	require.Equal(t, []int{3}, found)
	require.NoError(t, nodens.Purge(o))
	require.NoError(t, nodens.Purge(o))
	require.NoDirExists(t, o.Dir)
	nettest.In(t, o.HostNS, func() error {
		links, err := netlink.LinkList()
		require.Len(t, links, 1, "only the loopback link")
		return err
	})
	after, err := sysctl.Recorder{NetNS: o.HostNS}.Get("net/ipv4/ip_forward")
	require.NoError(t, err)
	require.Equal(t, before, after)
}

// TestCollision names the foreign route and leaves nothing.
func TestCollision(t *testing.T) {
	o := machine(t)
	other := nettest.NewNS(t, "other")
	nettest.Connect(t, o.HostNS, "lan0", "10.41.0.1/16", other, "lan0", "10.41.0.2/16")
	_, err := nodens.SetUp(o, 1)
	require.ErrorContains(t, err, "10.41.0.0/16 to link lan0")
	found, err := nodens.List(o)
	require.NoError(t, err)
	require.Empty(t, found)
	o.Range = netip.MustParsePrefix("10.99.0.0/24")
	n, err := nodens.SetUp(o, 1)
	require.NoError(t, err)
	require.Equal(t, "10.99.0.6", n.Address.String())
	_, err = nodens.SetUp(o, 64)
	require.ErrorContains(t, err, "too small")
	require.NoError(t, nodens.Purge(o))
}
