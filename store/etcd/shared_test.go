package etcd_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"knarr/store"
	"knarr/store/etcd"
	"knarr/store/storetest"
)

// patience bounds every wait.
const patience = 60 * time.Second

// newClient is a plain client of the server, as upstream's API server would have one.
func newClient(t testing.TB, s *server) *clientv3.Client {
	t.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{s.url}, Logger: zap.NewNop()})
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// recorder follows a table and writes down every event.
type recorder struct {
	watch  *store.Watch
	events []string
	last   map[string]int64 // by key: revision of the object, 0 when deleted
}

func newRecorder(t testing.TB, st *store.Store, tab *store.Table) *recorder {
	w, err := tab.Watch("", st.Revision())
	require.NoError(t, err)
	t.Cleanup(w.Stop)
	return &recorder{watch: w, last: map[string]int64{}}
}

// until reads up to a revision, and checks that each event follows what was before.
func (r *recorder) until(ctx context.Context, rev int64) error {
	for r.watch.Progress() < rev {
		evs, err := r.watch.Next(ctx)
		if err != nil {
			return err
		}
		for _, ev := range evs {
			prev := int64(0)
			if ev.Prev != nil {
				prev = ev.Prev.Revision
			}
			if prev != r.last[ev.Record.Key] {
				return fmt.Errorf("%s %s@%d follows %d, the one before was %d", ev.Type, ev.Record.Key, ev.Revision, prev, r.last[ev.Record.Key])
			}
			r.last[ev.Record.Key] = ev.Revision
			if ev.Type == store.Deleted {
				r.last[ev.Record.Key] = 0
			}
			r.events = append(r.events, fmt.Sprintf("%s %s@%d=%s", ev.Type, ev.Record.Key, ev.Revision, storetest.Content(ev.Record)))
		}
	}
	return nil
}

// increment adds one to a counter that everybody shares. It returns the new value; 0 when the outcome is unknown.
func increment(ctx context.Context, st *store.Store, tab *store.Table, key string) (int, error) {
	for {
		r := tab.Get(key)
		n, _ := strconv.Atoi(storetest.Content(r))
		op := store.Op{Table: tab, Key: key, Object: storetest.Object("n", strconv.Itoa(n+1))}
		if r != nil {
			op.Expect = r.Revision
		}
		_, err := st.Txn(ctx, op)
		var conflict *store.ConflictError
		var away *store.UnavailableError
		switch {
		case errors.As(err, &conflict):
			if conflict.Current == nil || conflict.Current.Revision == op.Expect {
				return 0, fmt.Errorf("expected %d, the conflict shows %+v", op.Expect, conflict.Current)
			}
		case errors.As(err, &away):
			return 0, nil
		default:
			return n + 1, err
		}
	}
}

// hammer lets writers of all stores increment one counter and make and delete keys of their own, until rounds are done or stop is closed.
// It returns the counter's acknowledged values; each was acknowledged once.
func hammer(t *testing.T, stores []*store.Store, tables []*store.Table, writers, rounds int, stop <-chan struct{}) map[int]bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var mu sync.Mutex
	acked := map[int]bool{}
	var wg sync.WaitGroup
	for i := range stores {
		for w := range writers {
			wg.Add(1)
			go func() {
				defer wg.Done()
				for n := 0; n < rounds; n++ {
					select {
					case <-stop:
						return
					default:
					}
					value, err := increment(ctx, stores[i], tables[i], storetest.Pods+"default/counter")
					if err == nil {
						err = toggle(ctx, stores[i], tables[i], fmt.Sprintf("%ss%d/w%d", storetest.Pods, i, w))
					}
					mu.Lock()
					if err != nil || value != 0 && acked[value] {
						t.Errorf("store %d writer %d: value %d, error %v", i, w, value, err)
						mu.Unlock()
						return
					}
					if value != 0 {
						acked[value] = true
					}
					mu.Unlock()
				}
			}()
		}
	}
	wg.Wait()
	return acked
}

// toggle makes a key that is absent and deletes one that is there.
func toggle(ctx context.Context, st *store.Store, tab *store.Table, key string) error {
	op := store.Op{Table: tab, Key: key}
	if r := tab.Get(key); r != nil {
		op.Expect = r.Revision
	} else {
		op.Object = storetest.Object("k", "k")
	}
	_, err := st.Txn(ctx, op)
	var conflict *store.ConflictError // an attempt of unknown outcome came in between
	var away *store.UnavailableError
	if errors.As(err, &conflict) || errors.As(err, &away) {
		return nil
	}
	return err
}

// compare reads both recorders to the same revision: same events, same order, same end.
func compare(t *testing.T, engines []*etcd.Engine, stores []*store.Store, tables []*store.Table, recs []*recorder) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for _, e := range engines {
		require.NoError(t, e.Sync(ctx))
	}
	rev := stores[0].Revision()
	for i, r := range recs {
		require.Equal(t, rev, stores[i].Revision(), "both were brought up to date")
		require.NoError(t, r.until(ctx, rev))
	}
	require.Equal(t, recs[0].events, recs[1].events)
	require.Equal(t, tables[0].Len(), tables[1].Len())
	tables[0].Snapshot().Ascend("", "", func(r *store.Record) bool {
		other := tables[1].Get(r.Key)
		require.NotNil(t, other, r.Key)
		require.Equal(t, r.Revision, other.Revision)
		require.Equal(t, r.CreateRevision, other.CreateRevision, r.Key)
		require.Equal(t, storetest.Content(r), storetest.Content(other))
		require.Equal(t, r.Revision, recs[0].last[r.Key])
		return true
	})
}

func openTwo(t *testing.T, s *server) (engines []*etcd.Engine, stores []*store.Store, tables []*store.Table, recs []*recorder) {
	for range 2 {
		engine, err := open(s)
		require.NoError(t, err)
		st, tab := openOn(t, engine)
		engines, stores, tables = append(engines, engine), append(stores, st), append(tables, tab)
	}
	for i := range stores {
		recs = append(recs, newRecorder(t, stores[i], tables[i]))
	}
	return engines, stores, tables, recs
}

func TestTwoStores(t *testing.T) {
	engines, stores, tables, recs := openTwo(t, newServer(t, "-no-fsync"))
	const writers, rounds = 4, 60
	acked := hammer(t, stores, tables, writers, rounds, nil)
	require.Len(t, acked, 2*writers*rounds)
	compare(t, engines, stores, tables, recs)
	require.Equal(t, strconv.Itoa(2*writers*rounds), storetest.Content(tables[1].Get(storetest.Pods+"default/counter")))
}

// TestRestartUnderLoad kills etcd again and again while both stores write: they recover by themselves, miss nothing and repeat nothing.
func TestRestartUnderLoad(t *testing.T) {
	s := newServer(t)
	engines, stores, tables, recs := openTwo(t, s)
	stop := make(chan struct{})
	result := make(chan map[int]bool)
	go func() { result <- hammer(t, stores, tables, 3, 1<<30, stop) }()
	for range 2 {
		at := stores[0].Revision()
		waitFor(t, func() bool { return stores[0].Revision() > at+100 })
		address := s.address()
		s.kill()
		waitFor(t, func() bool {
			_, err := stores[0].Txn(t.Context(), store.Op{Table: tables[0], Key: storetest.Pods + "away/x", Object: storetest.Object("x", "x"), Expect: 1})
			var away *store.UnavailableError
			return errors.As(err, &away)
		})
		require.NotNil(t, tables[1].Get(storetest.Pods+"default/counter"), "reads go on")
		s.start(address)
	}
	at := stores[1].Revision()
	waitFor(t, func() bool { return stores[1].Revision() > at+100 })
	close(stop)
	acked := <-result
	compare(t, engines, stores, tables, recs)
	value, _ := strconv.Atoi(storetest.Content(tables[0].Get(storetest.Pods + "default/counter")))
	require.GreaterOrEqual(t, value, len(acked), "an acknowledged increment was lost")
	for n := range acked {
		require.LessOrEqual(t, n, value)
	}
}

// waitFor waits for something that another goroutine or process brings about.
func waitFor(t testing.TB, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it did not happen")
		}
	}
}

// TestUpstreamFormat looks at the bytes with a plain client, and lets it write: no header, upstream's keys, etcd's revisions.
func TestUpstreamFormat(t *testing.T) {
	s := newServer(t, "-no-fsync")
	c := newClient(t, s)
	st, tab := openStore(t, s)
	key := storetest.Pods + "default/a"
	obj := storetest.Object("a", "one")
	want, err := storetest.Codec{}.Encode(t.Context(), key, obj)
	require.NoError(t, err)
	out, err := st.Txn(t.Context(), store.Op{Table: tab, Key: key, Object: obj})
	require.NoError(t, err)
	resp, err := c.Get(t.Context(), key)
	require.NoError(t, err)
	require.Equal(t, string(want), string(resp.Kvs[0].Value))
	require.Equal(t, resp.Kvs[0].ModRevision, out[0].Revision)

	w, err := tab.Watch("", st.Revision())
	require.NoError(t, err)
	defer w.Stop()
	put, err := c.Put(t.Context(), storetest.Pods+"default/b", string(want))
	require.NoError(t, err)
	evs, err := w.Next(t.Context())
	require.NoError(t, err)
	require.Equal(t, put.Header.Revision, evs[0].Revision)
	// What lies outside the prefix moves the revision, too.
	put, err = c.Put(t.Context(), "/elsewhere", "x")
	require.NoError(t, err)
	_, err = c.Txn(t.Context()).Then(clientv3.OpPut("/elsewhere", "y"), clientv3.OpDelete(storetest.Pods+"default/b")).Commit()
	require.NoError(t, err)
	_, err = st.Txn(t.Context(), store.Op{Table: tab, Key: storetest.Pods + "default/b", Expect: evs[0].Revision})
	var conflict *store.ConflictError
	require.ErrorAs(t, err, &conflict)
	require.Nil(t, conflict.Current)
	require.Greater(t, st.Revision(), put.Header.Revision)
	put, err = c.Put(t.Context(), "/elsewhere", "z")
	require.NoError(t, err)
	_, err = st.Txn(t.Context(), store.Op{Table: tab, Key: storetest.Pods + "default/b", Expect: 1})
	require.ErrorAs(t, err, &conflict)
	require.Equal(t, put.Header.Revision, st.Revision())
}

// TestLease lets etcd delete what expires, after the server that wrote it has gone; objects with like TTLs share a lease.
func TestLease(t *testing.T) {
	s := newServer(t, "-no-fsync")
	c := newClient(t, s)
	st, tab := openStore(t, s)
	_, other := openStore(t, s)
	for i := range 20 {
		_, err := st.Txn(t.Context(), store.Op{Table: tab, Key: fmt.Sprint(storetest.Pods, "e", i), Object: storetest.Object("e", ""), TTL: 2 * time.Second})
		require.NoError(t, err)
	}
	require.NoError(t, st.Close())
	leases, err := c.Leases(t.Context())
	require.NoError(t, err)
	require.NotEmpty(t, leases.Leases)
	require.LessOrEqual(t, len(leases.Leases), 3)
	require.Equal(t, 20, other.Len())
	waitFor(t, func() bool { return other.Len() == 0 })
}

// TestLeaseRevoked takes the shared lease away: the next write gets a new one.
func TestLeaseRevoked(t *testing.T) {
	s := newServer(t, "-no-fsync")
	c := newClient(t, s)
	st, tab := openStore(t, s)
	put := func(name string) {
		_, err := st.Txn(t.Context(), store.Op{Table: tab, Key: storetest.Pods + name, Object: storetest.Object(name, ""), TTL: time.Hour})
		require.NoError(t, err)
	}
	put("a")
	leases, err := c.Leases(t.Context())
	require.NoError(t, err)
	_, err = c.Revoke(t.Context(), leases.Leases[0].ID)
	require.NoError(t, err)
	put("b")
	waitFor(t, func() bool { return tab.Get(storetest.Pods+"a") == nil })
	require.NotNil(t, tab.Get(storetest.Pods+"b"))
}

// TestCompaction lets the engine compact: history goes, the store does not notice, and a new one opens.
func TestCompaction(t *testing.T) {
	s := newServer(t, "-no-fsync")
	c := newClient(t, s)
	engine, err := etcd.Open(t.Context(), etcd.Options{Endpoints: []string{s.url}, CompactEvery: 100 * time.Millisecond})
	require.NoError(t, err)
	st, tab := openOn(t, engine)
	key := storetest.Pods + "default/counter"
	compacted := func() bool {
		_, err := increment(t.Context(), st, tab, key)
		require.NoError(t, err)
		_, err = c.Get(t.Context(), key, clientv3.WithRev(2))
		return err != nil
	}
	waitFor(t, compacted)
	_, late := openStore(t, s)
	require.Equal(t, tab.Get(key).Revision, late.Get(key).Revision)
	value, err := c.Get(t.Context(), "compact_rev_key")
	require.NoError(t, err)
	require.Len(t, value.Kvs, 1)
}

func TestOpenErrors(t *testing.T) {
	s := newServer(t, "-no-fsync")
	gone := s.url
	s.kill()
	for name, c := range map[string]struct {
		o    etcd.Options
		want string
	}{
		"no endpoint":   {etcd.Options{}, "no endpoint is given"},
		"prefix":        {etcd.Options{Endpoints: []string{gone}, Prefix: "x"}, "slash"},
		"half a pair":   {etcd.Options{Endpoints: []string{gone}, CertFile: "x"}, "its key's"},
		"plain":         {etcd.Options{Endpoints: []string{gone}, CAFile: "x"}, "use https://"},
		"no authority":  {etcd.Options{Endpoints: []string{"https://127.0.0.1:1"}, CAFile: "/nonexistent"}, "read the authorities"},
		"empty CA":      {etcd.Options{Endpoints: []string{"https://127.0.0.1:1"}, CAFile: os.DevNull}, "no PEM certificate"},
		"nobody there":  {etcd.Options{Endpoints: []string{gone}, RequestTimeout: 300 * time.Millisecond}, "check the endpoints"},
		"no such certs": {etcd.Options{Endpoints: []string{"https://127.0.0.1:1"}, CertFile: "/nonexistent", KeyFile: "/nonexistent"}, "client certificate"},
	} {
		_, err := etcd.Open(t.Context(), c.o)
		require.ErrorContains(t, err, c.want, name)
	}
}
