package service

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func at(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 42, byte(n >> 8), byte(n)}), 8080)
}

// ep describes an endpoint by letters: r ready, s serving, t terminating, l on this node; hints follow.
func ep(n int, flags string, nodes, zones []string) endpoint {
	has := func(c string) bool { return slices.Contains([]byte(flags), c[0]) }
	return endpoint{target: at(n), ready: has("r"), serving: has("s"), terminating: has("t"), local: has("l"), forNodes: nodes, forZones: zones}
}

// TestChoose is the table of which endpoints get traffic.
func TestChoose(t *testing.T) {
	here := place{node: "me", zone: "z1"}
	me, you, z1, z2 := []string{"me"}, []string{"you"}, []string{"z1"}, []string{"z2"}
	for name, tc := range map[string]struct {
		in             []endpoint
		cluster, local []int
	}{
		"nothing":                              {},
		"ready only":                           {[]endpoint{ep(1, "rs", nil, nil), ep(2, "", nil, nil), ep(3, "rsl", nil, nil)}, []int{1, 3}, []int{3}},
		"terminating when none is ready":       {[]endpoint{ep(1, "st", nil, nil), ep(2, "t", nil, nil), ep(3, "stl", nil, nil)}, []int{1, 3}, []int{3}},
		"terminating here, ready elsewhere":    {[]endpoint{ep(1, "rs", nil, nil), ep(3, "stl", nil, nil)}, []int{1}, []int{3}},
		"not serving gets nothing":             {[]endpoint{ep(1, "t", nil, nil), ep(2, "s", nil, nil)}, nil, nil},
		"published though not ready":           {[]endpoint{ep(1, "rt", nil, nil)}, []int{1}, nil},
		"zone hints":                           {[]endpoint{ep(1, "rs", nil, z1), ep(2, "rs", nil, z2)}, []int{1}, nil},
		"zone hints missing on one":            {[]endpoint{ep(1, "rs", nil, z1), ep(2, "rs", nil, nil)}, []int{1, 2}, nil},
		"no hint for this zone":                {[]endpoint{ep(1, "rs", nil, z2), ep(2, "rs", nil, z2)}, []int{1, 2}, nil},
		"node hints before zone hints":         {[]endpoint{ep(1, "rs", me, z1), ep(2, "rs", you, z1)}, []int{1}, nil},
		"node hints elsewhere, zone hints":     {[]endpoint{ep(1, "rs", you, z1), ep(2, "rs", you, z2)}, []int{1}, nil},
		"unready endpoints need no hint":       {[]endpoint{ep(1, "rs", nil, z1), ep(2, "", nil, nil)}, []int{1}, nil},
		"hints do not narrow the policy Local": {[]endpoint{ep(1, "rsl", nil, z2), ep(2, "rs", nil, z1)}, []int{2}, []int{1}},
	} {
		t.Run(name, func(t *testing.T) {
			cluster, local := choose(tc.in, here)
			want := func(ns []int) []netip.AddrPort {
				out := []netip.AddrPort{}
				for _, n := range ns {
					out = append(out, at(n))
				}
				return out
			}
			require.Equal(t, want(tc.cluster), cluster)
			require.Equal(t, want(tc.local), local)
		})
	}
}

// TestArrange changes lists at random: the result always holds the wanted targets without holes, and few slots move.
func TestArrange(t *testing.T) {
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 0))
	var old []netip.AddrPort
	for range 500 {
		want := map[netip.AddrPort]bool{}
		for _, x := range old {
			if rnd.IntN(4) > 0 {
				want[x] = true
			}
		}
		for range rnd.IntN(4) {
			want[at(rnd.IntN(60))] = true
		}
		var list []netip.AddrPort
		kept := 0
		for x := range want {
			list = append(list, x)
			if slices.Contains(old, x) {
				kept++
			}
		}
		got := arrange(old, list)
		require.ElementsMatch(t, list, got, "seed %d", seed)
		stay := 0
		for i, x := range got {
			if i < len(old) && old[i] == x {
				stay++
			}
		}
		holes := max(0, len(old)-len(got)) // each shrinking by one may move one target from the end
		require.GreaterOrEqual(t, stay, kept-holes, "seed %d", seed)
		old = got
	}
}

// TestDiffIsSmall checks that one endpoint less of a hundred is a handful of elements.
func TestDiffIsSmall(t *testing.T) {
	var id uint32
	pl := &planner{here: place{node: "me"}, skip: map[netip.Addr]bool{}, newID: func() uint32 { id++; return id }}
	svc := &v1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "b"}, Spec: v1.ServiceSpec{
		Type: v1.ServiceTypeNodePort, ClusterIP: "10.43.0.1", ClusterIPs: []string{"10.43.0.1"}, Ports: []v1.ServicePort{{Protocol: v1.ProtocolTCP, Port: 80, NodePort: 30080}},
	}}
	slice := func(n int) []*discovery.EndpointSlice {
		port, tcp := int32(8080), v1.ProtocolTCP
		s := &discovery.EndpointSlice{AddressType: discovery.AddressTypeIPv4, Ports: []discovery.EndpointPort{{Protocol: &tcp, Port: &port}}}
		for i := range n {
			s.Endpoints = append(s.Endpoints, discovery.Endpoint{Addresses: []string{fmt.Sprintf("10.42.0.%d", i+1)}})
		}
		return []*discovery.EndpointSlice{s}
	}
	chains := map[string]chainSpec{}
	old := pl.service(svc, slice(100), nil)
	next := pl.service(svc, slice(99), old)
	require.Equal(t, old.lists[0].id, next.lists[0].id)
	del, add := diff(render(old, chains), render(next, chains))
	require.LessOrEqual(t, len(del), 4)
	require.LessOrEqual(t, len(add), 3)
	require.Contains(t, chains, "lb4-a99")
	require.Contains(t, chains, "lb4-n100")
	del, add = diff(render(next, chains), render(next, chains))
	require.Empty(t, del)
	require.Empty(t, add)
}

// TestMerge drops what is covered.
func TestMerge(t *testing.T) {
	in := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("11.0.0.0/8")}
	require.Equal(t, []netip.Prefix{in[0], in[3]}, merge(in))
	require.Equal(t, "10.255.255.255", lastOf(in[0]).String())
}
