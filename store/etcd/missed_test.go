package etcd_test

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"k8s.io/apimachinery/pkg/runtime"

	"knarr/store"
	"knarr/store/etcd"
	"knarr/store/storetest"
)

// TestMissedHistory changes and compacts etcd while the engine cannot see it: the store ends as etcd is, and its watch hears of every key.
func TestMissedHistory(t *testing.T) {
	s := newServer(t, "-no-fsync")
	address := s.address()
	st, tab := openStore(t, s)
	for _, name := range []string{"changed", "deleted", "reborn", "same"} {
		_, err := st.Txn(t.Context(), store.Op{Table: tab, Key: storetest.Pods + name, Object: storetest.Object(name, "old")})
		require.NoError(t, err)
	}
	w, err := tab.Watch("", st.Revision())
	require.NoError(t, err)
	defer w.Stop()

	s.kill()
	s.start(freshAddress())
	at := changeUnseen(t, s)
	s.kill()
	s.start(address)

	var got []string
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for last := int64(0); w.Progress() < at; {
		evs, err := w.Next(ctx)
		require.NoError(t, err)
		for _, ev := range evs {
			require.GreaterOrEqual(t, ev.Revision, last)
			last = ev.Revision
			got = append(got, ev.Type.String()+" "+strings.TrimPrefix(ev.Record.Key, storetest.Pods)+" "+storetest.Content(ev.Record))
		}
	}
	require.Equal(t, []string{"MODIFIED changed new", "DELETED reborn old", "ADDED reborn new", "ADDED added new", "DELETED deleted old"}, got)
	// Life goes on.
	_, err = st.Txn(t.Context(), store.Op{Table: tab, Key: storetest.Pods + "changed", Expect: tab.Get(storetest.Pods + "changed").Revision})
	require.NoError(t, err)
	_, fresh := openStore(t, s)
	require.Equal(t, tab.Len(), fresh.Len())
	fresh.Snapshot().Ascend("", "", func(r *store.Record) bool {
		mine := tab.Get(r.Key)
		require.Equal(t, []int64{r.Revision, r.CreateRevision}, []int64{mine.Revision, mine.CreateRevision}, r.Key)
		return true
	})
}

// changeUnseen does what the watch expects, compacts all history, and returns the revision.
func changeUnseen(t *testing.T, s *server) int64 {
	t.Helper()
	c := newClient(t, s)
	value, err := storetest.Codec{}.Encode(t.Context(), "", storetest.Object("x", "new"))
	require.NoError(t, err)
	put := func(name string) int64 {
		resp, err := c.Put(t.Context(), storetest.Pods+name, string(value))
		require.NoError(t, err)
		return resp.Header.Revision
	}
	for range 3 {
		put("changed")
	}
	for _, name := range []string{"deleted", "reborn"} {
		_, err = c.Delete(t.Context(), storetest.Pods+name)
		require.NoError(t, err)
	}
	put("reborn")
	put("added")
	put("passing")
	del, err := c.Delete(t.Context(), storetest.Pods+"passing")
	require.NoError(t, err)
	_, err = c.Compact(t.Context(), del.Header.Revision)
	require.NoError(t, err)
	return del.Header.Revision
}

// TestHistory: a restarted server goes on with watches that missed nothing, also when what came last was a deletion, or lay elsewhere.
func TestHistory(t *testing.T) {
	s := newServer(t, "-no-fsync")
	c := newClient(t, s)
	_, err := c.Put(t.Context(), storetest.Pods+"a", "{}")
	require.NoError(t, err)
	del, err := c.Delete(t.Context(), storetest.Pods+"a")
	require.NoError(t, err)
	_, err = c.Put(t.Context(), "/registry/other/a", "{}")
	require.NoError(t, err)
	elsewhere, err := c.Put(t.Context(), "/elsewhere", "{}")
	require.NoError(t, err)
	st, tab := openStore(t, s)
	require.Equal(t, elsewhere.Header.Revision, st.Revision())
	w, err := tab.Watch("", del.Header.Revision)
	require.NoError(t, err)
	w.Stop()
	_, err = tab.Watch("", del.Header.Revision-1)
	require.ErrorIs(t, err, store.ErrGone)
	// What is compacted is not known.
	_, err = c.Compact(t.Context(), elsewhere.Header.Revision)
	require.NoError(t, err)
	_, tab = openStore(t, s)
	_, err = tab.Watch("", del.Header.Revision)
	require.ErrorIs(t, err, store.ErrGone)
	w, err = tab.Watch("", elsewhere.Header.Revision)
	require.NoError(t, err)
	w.Stop()
}

// stuckCodec cannot decode the key "stuck" before it is let go.
type stuckCodec struct {
	storetest.Codec
	reached, release chan struct{}
}

func (c stuckCodec) Decode(ctx context.Context, key string, value []byte, rev int64) (runtime.Object, error) {
	if strings.HasSuffix(key, "/stuck") {
		close(c.reached)
		<-c.release
	}
	return c.Codec.Decode(ctx, key, value, rev)
}

// TestMissedOwn lets transactions of our own happen, and their history be compacted, while the watch stands still: they succeed all the same.
func TestMissedOwn(t *testing.T) {
	const writers = 300
	big := strings.Repeat("x", 30_000) // together more than the connection buffers
	s := newServer(t, "-no-fsync")
	engine, err := etcd.Open(t.Context(), etcd.Options{Endpoints: []string{s.url}, RequestTimeout: patience})
	require.NoError(t, err)
	st, err := store.Open(t.Context(), store.Options{Engine: engine, Debug: true})
	require.NoError(t, err)
	t.Cleanup(func() { st.Close() })
	codec := stuckCodec{reached: make(chan struct{}), release: make(chan struct{})}
	tab, err := st.OpenTable(t.Context(), store.TableOptions{Prefix: storetest.Pods, Codec: codec})
	require.NoError(t, err)
	rec := newRecorder(t, st, tab)

	c := newClient(t, s)
	value, err := storetest.Codec{}.Encode(t.Context(), "", storetest.Object("stuck", ""))
	require.NoError(t, err)
	put, err := c.Put(t.Context(), storetest.Pods+"stuck", string(value))
	require.NoError(t, err)
	<-codec.reached
	records, errs := make(chan *store.Record, writers), make(chan error, writers)
	for i := range writers {
		go func() {
			key := fmt.Sprint(storetest.Pods, "own", i)
			out, err := st.Txn(t.Context(), store.Op{Table: tab, Key: key, Object: storetest.Object("own", big)})
			if err == nil {
				records <- out[0]
			}
			errs <- err
		}()
	}
	end := put.Header.Revision + writers
	waitFor(t, func() bool {
		resp, err := c.Get(t.Context(), "x")
		require.NoError(t, err)
		return resp.Header.Revision == end
	})
	_, err = c.Compact(t.Context(), end)
	require.NoError(t, err)
	address := s.address()
	s.kill()
	s.start(address)
	close(codec.release)
	for range writers {
		require.NoError(t, <-errs)
		if r := <-records; tab.Get(r.Key) != r || r.CreateRevision != r.Revision {
			t.Fatalf("%s has another record", r.Key)
		}
	}
	require.NoError(t, rec.until(t.Context(), end))
	require.Len(t, rec.events, writers+1)
	require.Equal(t, end, st.Revision())
}

// TestRestored gives the engine an etcd that has forgotten everything: it says so.
func TestRestored(t *testing.T) {
	s := newServer(t, "-no-fsync")
	st, tab := openStore(t, s)
	for i := range 5 {
		_, err := st.Txn(t.Context(), store.Op{Table: tab, Key: fmt.Sprint(storetest.Pods, i), Object: storetest.Object("x", "")})
		require.NoError(t, err)
	}
	address := s.address()
	s.kill()
	s.dir = t.TempDir()
	s.start(address)
	for n := 0; ; n++ { // the first may still meet the broken connection
		_, err := st.Txn(t.Context(), store.Op{Table: tab, Key: fmt.Sprint(storetest.Pods, "new", n), Object: storetest.Object("x", "")})
		var away *store.UnavailableError
		require.ErrorAs(t, err, &away)
		if strings.Contains(err.Error(), "Restart every knarr server") {
			return
		}
		require.Less(t, n, 3, err)
	}
}
