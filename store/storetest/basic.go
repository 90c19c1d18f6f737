package storetest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"

	"knarr/store"
)

func resourceVersion(r *store.Record) string {
	return r.Object.(*metav1.PartialObjectMetadata).ResourceVersion
}

func testLifecycle(t *testing.T, f Factory) {
	e := newEnv(t, f)
	if e.s.Revision() < 1 {
		t.Fatalf("an empty store has revision %d, lists of it could not be watched from", e.s.Revision())
	}
	key := Pods + "default/a"
	made := e.put(e.pods, "a", "one")
	equal(t, "published revision", e.s.Revision(), made.Revision)
	equal(t, "create revision", made.CreateRevision, made.Revision)
	equal(t, "resourceVersion", resourceVersion(made), strconv.FormatInt(made.Revision, 10))
	equal(t, "Get", e.pods.Get(key), made)

	changed := e.put(e.pods, "a", "two")
	equal(t, "revision", changed.Revision, made.Revision+1)
	equal(t, "create revision", changed.CreateRevision, made.Revision)
	equal(t, "old content", Content(made), "one")
	equal(t, "new content", Content(e.pods.Get(key)), "two")

	gone := e.del(e.pods, "a")
	equal(t, "revision", gone.Revision, changed.Revision+1)
	equal(t, "deleted content", Content(gone), "two")
	equal(t, "deleted resourceVersion", resourceVersion(gone), strconv.FormatInt(gone.Revision, 10))
	equal(t, "resourceVersion of the last version", resourceVersion(changed), strconv.FormatInt(changed.Revision, 10))
	equal(t, "Get", e.pods.Get(key), nil)
	equal(t, "Len", e.pods.Len(), 0)
	equal(t, "table revision", e.pods.Revision(), gone.Revision)

	again := e.put(e.pods, "a", "three")
	equal(t, "create revision of a new life", again.CreateRevision, again.Revision)
}

func testConflicts(t *testing.T, f Factory) {
	e := newEnv(t, f)
	key := Pods + "default/a"
	first := e.put(e.pods, "a", "one")
	second := e.put(e.pods, "a", "two")
	for _, c := range []struct {
		name    string
		op      store.Op
		current *store.Record
	}{
		{"create of existing", store.Op{Table: e.pods, Key: key, Object: Object("a", "x")}, second},
		{"stale update", store.Op{Table: e.pods, Key: key, Object: Object("a", "x"), Expect: first.Revision}, second},
		{"stale delete", store.Op{Table: e.pods, Key: key, Expect: first.Revision}, second},
		{"update of absent", store.Op{Table: e.pods, Key: key + "b", Object: Object("b", "x"), Expect: 7}, nil},
		{"delete of absent", store.Op{Table: e.pods, Key: key + "b", Expect: 7}, nil},
	} {
		_, err := e.s.Txn(e.ctx, c.op)
		var conflict *store.ConflictError
		if !errors.As(err, &conflict) {
			t.Fatalf("%s: got %v, want a conflict", c.name, err)
		}
		equal(t, c.name+": key", conflict.Key, c.op.Key)
		equal(t, c.name+": current", conflict.Current, c.current)
	}
	equal(t, "revision", e.s.Revision(), second.Revision)
}

func testBadOps(t *testing.T, f Factory) {
	e := newEnv(t, f)
	cancelled, cancel := context.WithCancel(e.ctx)
	cancel()
	good := store.Op{Table: e.pods, Key: Pods + "a", Object: Object("a", "")}
	for _, c := range []struct {
		name, want string
		ctx        context.Context
		ops        []store.Op
	}{
		{"no table", "names no table", e.ctx, []store.Op{{Key: "/x", Object: Object("x", "")}}},
		{"foreign key", "does not lie under", e.ctx, []store.Op{{Table: e.pods, Key: Leases + "a", Object: Object("a", "")}}},
		{"bare prefix", "does not lie under", e.ctx, []store.Op{{Table: e.pods, Key: Pods, Object: Object("a", "")}}},
		{"delete nothing", "expects that it does not exist", e.ctx, []store.Op{{Table: e.pods, Key: Pods + "a"}}},
		{"twice", "twice", e.ctx, []store.Op{good, good}},
		{"no metadata", "no metadata", e.ctx, []store.Op{{Table: e.pods, Key: Pods + "a", Object: &metav1.WatchEvent{}}}},
		{"context", "context canceled", cancelled, []store.Op{good}},
	} {
		_, err := e.s.Txn(c.ctx, c.ops...)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got error %v, want %q", c.name, err, c.want)
		}
	}
	equal(t, "objects", e.pods.Len(), 0)
}

func testAllOrNothing(t *testing.T, f Factory) {
	e := newEnv(t, f)
	a := e.put(e.pods, "a", "one")
	_, err := e.s.Txn(e.ctx,
		store.Op{Table: e.pods, Key: Pods + "default/b", Object: Object("b", "x")},
		store.Op{Table: e.leases, Key: Leases + "default/l", Object: Object("l", "x")},
		store.Op{Table: e.pods, Key: a.Key, Object: Object("a", "x"), Expect: a.Revision - 1})
	var conflict *store.ConflictError
	if !errors.As(err, &conflict) || conflict.Key != a.Key {
		t.Fatalf("got %v, want a conflict on %s", err, a.Key)
	}
	equal(t, "pods", e.pods.Len(), 1)
	equal(t, "leases", e.leases.Len(), 0)

	out, err := e.s.Txn(e.ctx,
		store.Op{Table: e.pods, Key: Pods + "default/b", Object: Object("b", "x")},
		store.Op{Table: e.leases, Key: Leases + "default/l", Object: Object("l", "x")},
		store.Op{Table: e.pods, Key: a.Key, Expect: a.Revision})
	must(t, err)
	for i, r := range out {
		equal(t, fmt.Sprintf("revision %d", i), r.Revision, a.Revision+1+int64(i)*e.traits.step())
	}
	equal(t, "deleted", Content(out[2]), "one")
	e.reopen()
	equal(t, "pods", e.pods.Len(), 1)
	equal(t, "leases", e.leases.Len(), 1)
}

// testCounter lets many writers increment one counter by compare and swap.
func testCounter(t *testing.T, f Factory) {
	e := newEnv(t, f)
	const writers, each = 8, 20
	key := Pods + "default/counter"
	e.put(e.pods, "counter", "0")
	var mu sync.Mutex
	revisions := map[int64]bool{}
	increment := func() error {
		for {
			r := e.pods.Get(key)
			n, _ := strconv.Atoi(Content(r))
			out, err := e.s.Txn(e.ctx, store.Op{Table: e.pods, Key: key, Object: Object("counter", strconv.Itoa(n+1)), Expect: r.Revision})
			var conflict *store.ConflictError
			if errors.As(err, &conflict) {
				continue
			}
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			if revisions[out[0].Revision] {
				return fmt.Errorf("revision %d was given twice", out[0].Revision)
			}
			revisions[out[0].Revision] = true
			return nil
		}
	}
	parallel(t, writers, each, func(int, int) error { return increment() })
	equal(t, "counter", Content(e.pods.Get(key)), strconv.Itoa(writers*each))
}

// testSameKeyRace creates and deletes the same key from many goroutines: each create must win exactly once.
func testSameKeyRace(t *testing.T, f Factory) {
	e := newEnv(t, f)
	key := Pods + "default/a"
	from := e.s.Revision()
	parallel(t, 8, 20, func(w, i int) error {
		out, err := e.s.Txn(e.ctx, store.Op{Table: e.pods, Key: key, Object: Object("a", fmt.Sprint(w, i))})
		var conflict *store.ConflictError
		if errors.As(err, &conflict) {
			return nil
		}
		if err != nil {
			return err
		}
		_, err = e.s.Txn(e.ctx, store.Op{Table: e.pods, Key: key, Expect: out[0].Revision})
		return err
	})
	w := e.watch(e.pods, "", from)
	want := store.Added
	for {
		evs, err := w.TryNext()
		must(t, err)
		if len(evs) == 0 {
			break
		}
		for _, ev := range evs {
			equal(t, "event type", ev.Type, want)
			want = store.Added + store.Deleted - want
		}
	}
	equal(t, "objects", e.pods.Len(), 0)
}

// parallel runs fn each times in each of n goroutines.
func parallel(t *testing.T, n, each int, fn func(w, i int) error) {
	t.Helper()
	errs := make(chan error, n)
	for w := range n {
		go func() {
			for i := range each {
				if err := fn(w, i); err != nil {
					errs <- err
					return
				}
			}
			errs <- nil
		}()
	}
	for range n {
		must(t, <-errs)
	}
}

func testReopen(t *testing.T, f Factory) {
	e := newEnv(t, f)
	a := e.put(e.pods, "a", "one")
	a2 := e.put(e.pods, "a", "two")
	e.put(e.pods, "b", "gone")
	e.del(e.pods, "b")
	l := e.put(e.leases, "l", "lease")
	rev := e.s.Revision()
	for range 3 {
		e.reopen()
		equal(t, "revision", e.s.Revision(), rev)
		equal(t, "pods", e.pods.Len(), 1)
		got := e.pods.Get(a.Key)
		equal(t, "content", Content(got), "two")
		equal(t, "revision", got.Revision, a2.Revision)
		equal(t, "create revision", got.CreateRevision, a.Revision)
		equal(t, "resourceVersion", resourceVersion(got), strconv.FormatInt(a2.Revision, 10))
		equal(t, "lease", Content(e.leases.Get(l.Key)), "lease")
	}
	equal(t, "next revision", e.put(e.pods, "c", "").Revision, rev+1)
}

func testTables(t *testing.T, f Factory) {
	e := newEnv(t, f)
	a := e.put(e.pods, "a", "one")
	same, err := e.s.OpenTable(e.ctx, store.TableOptions{Prefix: Pods, Codec: Codec{}})
	must(t, err)
	equal(t, "the same table", same, e.pods)
	equal(t, "lookup", e.s.Table(Pods), e.pods)
	equal(t, "tables", len(e.s.Tables()), 2)
	for _, bad := range []string{"", "/", "/registry", "registry/x/", "/registry/", "/registry/pods/sub/"} {
		if _, err := e.s.OpenTable(e.ctx, store.TableOptions{Prefix: bad, Codec: Codec{}}); err == nil {
			t.Errorf("prefix %q was accepted", bad)
		}
	}
	w := e.watch(e.pods, "", a.Revision)
	old := e.pods
	e.s.CloseTable(Pods)
	equal(t, "lookup", e.s.Table(Pods), nil)
	if _, err := w.Next(e.ctx); !errors.Is(err, store.ErrGone) {
		t.Fatalf("watch of a closed table: %v", err)
	}
	if _, err := e.s.Txn(e.ctx, store.Op{Table: old, Key: a.Key, Expect: a.Revision}); !errors.Is(err, store.ErrClosed) {
		t.Fatalf("transaction on a closed table: %v", err)
	}
	e.pods = e.table(Pods, store.Durable)
	equal(t, "content after opening again", Content(e.pods.Get(a.Key)), "one")
	e.put(e.pods, "a", "two")
}

// unstructuredCodec is Codec for custom resources.
type unstructuredCodec struct{}

func (unstructuredCodec) Encode(_ context.Context, _ string, obj runtime.Object) ([]byte, error) {
	return json.Marshal(obj)
}

func (unstructuredCodec) Decode(_ context.Context, _ string, value []byte, _ int64) (runtime.Object, error) {
	u := &unstructured.Unstructured{}
	return u, json.Unmarshal(value, u)
}

func testUnstructured(t *testing.T, f Factory) {
	e := newEnv(t, f)
	tab, err := e.s.OpenTable(e.ctx, store.TableOptions{Prefix: "/registry/example.com/foos/", Codec: unstructuredCodec{}})
	must(t, err)
	key := tab.Prefix() + "default/f"
	obj := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "example.com/v1", "kind": "Foo", "metadata": map[string]any{"name": "f", "resourceVersion": "77"}, "spec": map[string]any{"n": int64(1)},
	}}
	out, err := e.s.Txn(e.ctx, store.Op{Table: tab, Key: key, Object: obj})
	must(t, err)
	rv := func(r *store.Record) string { return r.Object.(*unstructured.Unstructured).GetResourceVersion() }
	equal(t, "resourceVersion", rv(out[0]), strconv.FormatInt(out[0].Revision, 10))
	gone, err := e.s.Txn(e.ctx, store.Op{Table: tab, Key: key, Expect: out[0].Revision})
	must(t, err)
	equal(t, "resourceVersion of the last version", rv(out[0]), strconv.FormatInt(out[0].Revision, 10))
	equal(t, "resourceVersion of the deletion", rv(gone[0]), strconv.FormatInt(gone[0].Revision, 10))
}

// brokenCodec cannot decode what has a certain content.
type brokenCodec struct{ Codec }

func (c brokenCodec) Decode(ctx context.Context, key string, value []byte, rev int64) (runtime.Object, error) {
	if strings.Contains(string(value), "broken") {
		return nil, errors.New("no key for this")
	}
	return c.Codec.Decode(ctx, key, value, rev)
}

func testCorrupt(t *testing.T, f Factory) {
	e := newEnv(t, f)
	r := e.put(e.pods, "a", "broken")
	e.s.CloseTable(Pods)
	_, err := e.s.OpenTable(e.ctx, store.TableOptions{Prefix: Pods, Codec: brokenCodec{}})
	var corrupt *store.CorruptError
	if !errors.As(err, &corrupt) || corrupt.Key != r.Key {
		t.Fatalf("got %v, want a CorruptError for %s", err, r.Key)
	}
	e.pods = e.table(Pods, store.Durable)
	equal(t, "content", Content(e.pods.Get(r.Key)), "broken")
}
