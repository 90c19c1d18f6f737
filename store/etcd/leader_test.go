package etcd_test

import (
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"knarr/store"
	"knarr/store/etcd"
	"knarr/store/storetest"
)

// newCluster starts an etcd of three members.
func newCluster(t *testing.T) (members []*server) {
	t.Helper()
	var all, hosts []string
	for i := range 3 {
		hosts = append(hosts, strings.TrimSuffix(freshAddress(), ":0"))
		all = append(all, fmt.Sprintf("m%d=http://%s:2380", i, hosts[i]))
	}
	for i, host := range hosts {
		m := &server{t: t, dir: t.TempDir(), args: []string{
			"-no-fsync", "-name", fmt.Sprintf("m%d", i), "-peer", host + ":2380", "-cluster", strings.Join(all, ","),
		}}
		m.launch(host + ":0")
		t.Cleanup(m.kill)
		members = append(members, m)
	}
	for _, m := range members {
		m.awaitReady()
	}
	return members
}

// leaderOf finds the member that leads.
func leaderOf(t *testing.T, members []*server) *server {
	t.Helper()
	for _, m := range members {
		st, err := newClient(t, m).Status(t.Context(), m.url)
		require.NoError(t, err)
		if st.Leader == st.Header.MemberId {
			return m
		}
	}
	t.Fatal("nobody leads")
	return nil
}

// TestLeaderDies kills the leader of three members under load, for good: the stores go on with the others, and miss and repeat nothing.
func TestLeaderDies(t *testing.T) {
	members := newCluster(t)
	var urls []string
	for _, m := range members {
		urls = append(urls, m.url)
	}
	var engines []*etcd.Engine
	var stores []*store.Store
	var tables []*store.Table
	var recs []*recorder
	for i := range 2 {
		// Each has another member first.
		engine, err := etcd.Open(t.Context(), etcd.Options{Endpoints: append(urls[i:len(urls):len(urls)], urls[:i]...), RequestTimeout: requestTimeout})
		require.NoError(t, err)
		st, tab := openOn(t, engine)
		engines, stores, tables = append(engines, engine), append(stores, st), append(tables, tab)
	}
	for i := range stores {
		recs = append(recs, newRecorder(t, stores[i], tables[i]))
	}
	stop, result := make(chan struct{}), make(chan map[int]bool)
	go func() { result <- hammer(t, stores, tables, 3, 1<<30, stop) }()
	goOn := func(st *store.Store) {
		at := st.Revision()
		waitFor(t, func() bool { return st.Revision() > at+100 })
	}
	goOn(stores[0])
	leaderOf(t, members).kill()
	goOn(stores[0])
	goOn(stores[1])
	close(stop)
	acked := <-result
	compare(t, engines, stores, tables, recs)
	value, _ := strconv.Atoi(storetest.Content(tables[0].Get(storetest.Pods + "default/counter")))
	require.GreaterOrEqual(t, value, len(acked), "an acknowledged increment was lost")
}
