package pod

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestIPAM fills a small range, frees one address, and restarts.
func TestIPAM(t *testing.T) {
	dir := t.TempDir()
	p, err := openIPAM(dir)
	require.NoError(t, err)
	ranges := []netip.Prefix{netip.MustParsePrefix("10.42.9.0/29"), netip.MustParsePrefix("fd42:0:0:9::/64")}
	p.setRanges(ranges)
	seen := map[netip.Addr]bool{}
	for i := range 5 { // .2 to .6: .0 is the network, .1 the node, .7 broadcast
		rec, err := p.allocate(record{SandboxID: fmt.Sprint("s", i)})
		require.NoError(t, err)
		require.Len(t, rec.IPs, 2)
		seen[rec.IPs[0]] = true
	}
	require.Len(t, seen, 5)
	for _, bad := range []string{"10.42.9.0", "10.42.9.1", "10.42.9.7"} {
		require.NotContains(t, seen, netip.MustParseAddr(bad))
	}
	_, err = p.allocate(record{SandboxID: "full"})
	require.ErrorIs(t, err, ErrNoAddress)
	require.NoFileExists(t, filepath.Join(dir, "full.json"))

	require.NoError(t, os.WriteFile(filepath.Join(dir, "cut.tmp"), []byte("{"), 0o600))
	again, err := openIPAM(dir)
	require.NoError(t, err)
	again.setRanges(ranges)
	require.Len(t, again.all(), 5)
	old, _ := p.get("s2")
	require.NoError(t, again.release("s2"))
	require.NoError(t, again.release("s2"))
	rec, err := again.allocate(record{SandboxID: "new"})
	require.NoError(t, err)
	require.Equal(t, old.IPs[0], rec.IPs[0], "the only free one")

	require.NoError(t, os.WriteFile(filepath.Join(dir, "bad.json"), []byte("{"), 0o600))
	_, err = openIPAM(dir)
	require.ErrorContains(t, err, "bad.json")
}

// TestAddressRests checks that a freed address is the last to be used again.
func TestAddressRests(t *testing.T) {
	p, err := openIPAM(t.TempDir())
	require.NoError(t, err)
	p.setRanges([]netip.Prefix{netip.MustParsePrefix("10.42.9.0/24")})
	first, err := p.allocate(record{SandboxID: "a"})
	require.NoError(t, err)
	require.NoError(t, p.release("a"))
	for i := range 252 {
		rec, err := p.allocate(record{SandboxID: "b"})
		require.NoError(t, err)
		require.NotEqual(t, first.IPs[0], rec.IPs[0], "after %d", i)
		require.NoError(t, p.release("b"))
	}
	rec, err := p.allocate(record{SandboxID: "c"})
	require.NoError(t, err)
	require.Equal(t, first.IPs[0], rec.IPs[0])
}

// TestPlan is the table of the decision how a node is reached.
func TestPlan(t *testing.T) {
	r4, r6 := netip.MustParsePrefix("10.42.1.0/24"), netip.MustParsePrefix("fd42:0:0:1::/64")
	near, far := netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("203.0.113.7")
	gw := netip.MustParseAddr("10.41.1.1")
	onLink := func(ip netip.Addr) bool { return ip == near }
	for name, tc := range map[string]struct {
		peer    peer
		gateway netip.Addr
		want    []hop
	}{
		"near":               {peer{"n", []netip.Prefix{r4}, []netip.Addr{near}}, netip.Addr{}, []hop{{r4, near, false}}},
		"far":                {peer{"n", []netip.Prefix{r4}, []netip.Addr{far}}, netip.Addr{}, []hop{{r4, far, true}}},
		"inside a machine":   {peer{"n", []netip.Prefix{r4}, []netip.Addr{far}}, gw, []hop{{r4, gw, false}}},
		"no address yet":     {peer{"n", []netip.Prefix{r4}, nil}, netip.Addr{}, nil},
		"no range yet":       {peer{"n", nil, []netip.Addr{near}}, netip.Addr{}, nil},
		"IPv6 without an IP": {peer{"n", []netip.Prefix{r4, r6}, []netip.Addr{near}}, netip.Addr{}, []hop{{r4, near, false}}},
	} {
		t.Run(name, func(t *testing.T) { require.Equal(t, tc.want, plan([]peer{tc.peer}, tc.gateway, onLink)) })
	}
}
