package api

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/storage"

	"knarr/store"
	"knarr/store/pebble"
)

// mapCodec keeps ConfigMaps as JSON.
type mapCodec struct{}

func (mapCodec) Encode(_ context.Context, _ string, obj runtime.Object) ([]byte, error) {
	return json.Marshal(obj)
}

func (mapCodec) Decode(_ context.Context, _ string, data []byte, _ int64) (runtime.Object, error) {
	obj := &corev1.ConfigMap{}
	return obj, json.Unmarshal(data, obj)
}

// mapsKind opens a table of ConfigMaps in memory.
func mapsKind(t testing.TB) *Kind {
	t.Helper()
	ctx := context.Background()
	engine, err := pebble.Open(ctx, pebble.Options{Dir: "db", FS: vfs.NewMem()})
	require.NoError(t, err)
	s, err := store.Open(ctx, store.Options{Engine: engine, Debug: true})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	table, err := s.OpenTable(ctx, store.TableOptions{Prefix: "/maps/", Codec: mapCodec{}})
	require.NoError(t, err)
	return &Kind{Table: table, store: s, prefix: "/maps/"}
}

// put writes an object under a key below the table's prefix, or deletes it.
func (k *Kind) put(t testing.TB, key, label string) {
	t.Helper()
	op := store.Op{Table: k.Table, Key: k.prefix + key}
	if old := k.Table.Get(op.Key); old != nil {
		op.Expect = old.Revision
	} else if label == "" {
		return
	}
	if label != "" {
		op.Object = &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: key, Labels: map[string]string{"l": label}}}
	}
	_, err := k.store.Txn(context.Background(), op)
	require.NoError(t, err)
}

// lister is an Encoder that counts what it encodes.
type lister struct{ made int }

// AppendChange implements Encoder.
func (l *lister) AppendChange(out []byte, c Change) ([]byte, error) {
	l.made++
	return fmt.Appendf(out, "%s %s %d\n", c.Type, c.Record.Key, c.Revision), nil
}

// TestSharedEncodings has many watches of several selections read at different paces: each is told the same as one that shares nothing, and
// those that keep up have each change encoded once.
func TestSharedEncodings(t *testing.T) {
	k, r := mapsKind(t), rand.New(rand.NewSource(1))
	type reader struct {
		*Changes
		out []byte
	}
	follow := func(sel Selection, from int64, share any) *reader {
		c, err := k.Follow(sel, storage.ListOptions{ResourceVersion: fmt.Sprint(from)})
		require.NoError(t, err)
		t.Cleanup(c.Stop)
		if share != nil {
			c.Share(share)
		}
		return &reader{Changes: c}
	}
	read := func(rd *reader, e Encoder, n int) {
		for ; n > 0; n-- {
			out, ok, err := rd.AppendNext(rd.out, e)
			require.NoError(t, err)
			if rd.out = out; !ok {
				return
			}
		}
	}
	k.put(t, "a/first", "1")
	now := k.store.Revision()
	label, err := labels.Parse("l=1")
	require.NoError(t, err)
	selections := []Selection{{Prefix: "/maps/"}, {Prefix: "/maps/a/"}, {Prefix: "/maps/a/x", Exact: true}, {Prefix: "/maps/a/", Label: label}}
	var all [][]*reader // by selection: the one that shares nothing, then those that do
	var shared, alone lister
	for i, sel := range selections {
		group := []*reader{follow(sel, now, nil)}
		for range 4 {
			group = append(group, follow(sel, now, "text"))
		}
		if i < 2 {
			group = append(group, follow(sel, now+40, "text")) // begins in the future
		}
		all = append(all, group)
	}
	const changes = 200
	for range changes {
		k.put(t, fmt.Sprintf("%c/%c", 'a'+rune(r.Intn(2)), 'w'+rune(r.Intn(3))), []string{"", "1", "1", "2"}[r.Intn(4)])
		for _, group := range all {
			read(group[1], &shared, changes)
			read(group[2], &shared, changes)
			for _, late := range group[3:] {
				read(late, &shared, r.Intn(3))
			}
		}
	}
	for i, group := range all {
		for _, rd := range group[1:] {
			read(rd, &shared, changes)
			require.False(t, rd.Pending())
			require.Equal(t, k.store.Revision(), rd.Revision())
		}
		read(group[0], &alone, changes)
		for j, rd := range group[1:min(5, len(group))] {
			require.Equal(t, string(group[0].out), string(rd.out), "selection %d, watch %d", i, j+1)
		}
		if i < 2 {
			skipped := &reader{Changes: follow(selections[i], now+40, nil).Changes}
			read(skipped, &lister{}, changes)
			require.Equal(t, string(skipped.out), string(group[5].out), "selection %d, from the future", i)
		}
	}
	keeping := lister{}
	a, b := follow(Selection{Prefix: "/maps/"}, k.store.Revision(), "text"), follow(Selection{Prefix: "/maps/"}, k.store.Revision(), "text")
	for range 10 {
		k.put(t, "a/first", "3")
		read(a, &keeping, 1)
		read(b, &keeping, 1)
	}
	require.Equal(t, 10, keeping.made)
	require.Equal(t, string(a.out), string(b.out))
}
