package etcd_test

import (
	"context"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"knarr/store"
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
