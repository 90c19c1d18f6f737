package storetest

import (
	"errors"
	"fmt"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"knarr/store"
)

func keysOf(sn *store.Snapshot, prefix, from string) string {
	var out []string
	sn.Ascend(prefix, from, func(r *store.Record) bool {
		out = append(out, strings.TrimPrefix(r.Key, Pods))
		return true
	})
	return strings.Join(out, " ")
}

func testSnapshots(t *testing.T, f Factory) {
	e := newEnv(t, f)
	for _, n := range []string{"c", "a", "b"} {
		e.put(e.pods, n, "one")
	}
	_, err := e.s.Txn(e.ctx, store.Op{Table: e.pods, Key: Pods + "other/z", Object: Object("z", "one")})
	must(t, err)
	sn := e.pods.Snapshot()
	equal(t, "same while nothing changes", e.pods.Snapshot(), sn)
	equal(t, "revision", sn.Revision(), e.s.Revision())
	e.put(e.pods, "a", "two")
	e.del(e.pods, "b")
	equal(t, "Len", sn.Len(), 4)
	equal(t, "content", Content(sn.Get(Pods+"default/a")), "one")
	equal(t, "all", keysOf(sn, "", ""), "default/a default/b default/c other/z")
	equal(t, "prefix", keysOf(sn, Pods+"default/", ""), "default/a default/b default/c")
	equal(t, "from", keysOf(sn, Pods+"default/", Pods+"default/b"), "default/b default/c")
	equal(t, "from between", keysOf(sn, Pods, Pods+"default/b\x00"), "default/c other/z")
	equal(t, "no match", keysOf(sn, Pods+"nowhere/", ""), "")
	equal(t, "now", keysOf(e.pods.Snapshot(), "", ""), "default/a default/c other/z")
	e.put(e.leases, "l", "")
	equal(t, "revision follows other tables", e.pods.Snapshot().Revision(), e.s.Revision())
}

// testSnapshotWhileWriting checks an invariant that every transaction keeps: the same content under two keys.
func testSnapshotWhileWriting(t *testing.T, f Factory) {
	e := newEnv(t, f)
	var stop atomic.Bool
	var wg sync.WaitGroup
	keyA, keyB := Pods+"default/a", Pods+"default/b"
	_, err := e.s.Txn(e.ctx, store.Op{Table: e.pods, Key: keyA, Object: Object("a", "x")}, store.Op{Table: e.pods, Key: keyB, Object: Object("b", "x")})
	must(t, err)
	wg.Add(1)
	go func() {
		defer wg.Done()
		for i := 0; i < 200; i++ {
			c := fmt.Sprint(i)
			_, err := e.s.Txn(e.ctx,
				store.Op{Table: e.pods, Key: keyA, Object: Object("a", c), Expect: e.pods.Get(keyA).Revision},
				store.Op{Table: e.pods, Key: keyB, Object: Object("b", c), Expect: e.pods.Get(keyB).Revision})
			if err != nil {
				t.Error(err)
				break
			}
		}
		stop.Store(true)
	}()
	last := int64(0)
	for !stop.Load() {
		sn := e.pods.Snapshot()
		a, b := sn.Get(keyA), sn.Get(keyB)
		if Content(a) != Content(b) || b.Revision != a.Revision+1 && b.Revision != a.Revision {
			t.Errorf("a half transaction is visible: %s@%d and %s@%d", Content(a), a.Revision, Content(b), b.Revision)
			break
		}
		if sn.Revision() < b.Revision || sn.Revision() < last {
			t.Errorf("snapshot at %d after %d shows revision %d", sn.Revision(), last, b.Revision)
			break
		}
		last = sn.Revision()
	}
	wg.Wait()
}

func testSnapshotAt(t *testing.T, f Factory) {
	e := newEnv(t, f)
	first := e.put(e.pods, "a", "one")
	sn := e.pods.Snapshot()
	e.pods.Pin(sn)
	unpinned := e.put(e.pods, "a", "two")
	last := e.put(e.pods, "a", "three")
	lease := e.put(e.leases, "l", "")

	got, err := e.pods.SnapshotAt(first.Revision)
	must(t, err)
	equal(t, "pinned content", Content(got.Get(first.Key)), "one")
	equal(t, "pinned revision", got.Revision(), first.Revision)
	for _, rev := range []int64{last.Revision, lease.Revision} {
		got, err = e.pods.SnapshotAt(rev)
		must(t, err)
		equal(t, "present content", Content(got.Get(first.Key)), "three")
		equal(t, "present revision", got.Revision(), rev)
	}
	if _, err = e.pods.SnapshotAt(unpinned.Revision); !errors.Is(err, store.ErrGone) {
		t.Fatalf("a revision that nobody pinned: %v", err)
	}
	var future *store.FutureError
	if _, err = e.pods.SnapshotAt(lease.Revision + 1); !errors.As(err, &future) || future.Current != lease.Revision {
		t.Fatalf("a future revision: %v", err)
	}
	present := e.pods.Snapshot()
	e.clock.Advance(time.Minute)
	e.pods.Pin(present)
	e.clock.Advance(store.DefaultPinAge - time.Minute - time.Second)
	got, err = e.pods.SnapshotAt(first.Revision)
	must(t, err)
	e.pods.Pin(got) // does not extend its time
	e.clock.Advance(2 * time.Second)
	if _, err = e.pods.SnapshotAt(first.Revision); !errors.Is(err, store.ErrGone) {
		t.Fatalf("an outdated pin: %v", err)
	}
	equal(t, "the holder's snapshot", Content(sn.Get(first.Key)), "one")

	// A list from the present state goes on while nothing is written, and is too old later, though the table has not changed.
	e.clock.Advance(store.DefaultPinAge)
	_, err = e.pods.SnapshotAt(present.Revision())
	must(t, err)
	e.pods.Pin(e.pods.Snapshot())
	e.put(e.leases, "l", "again")
	e.clock.Advance(store.DefaultPinAge)
	if _, err = e.pods.SnapshotAt(present.Revision()); !errors.Is(err, store.ErrGone) {
		t.Fatalf("a list that took too long: %v", err)
	}
	_, err = e.pods.SnapshotAt(e.s.Revision())
	must(t, err)
}

func testPinBounds(t *testing.T, f Factory) {
	big := strings.Repeat("x", 1000)
	e := newEnv(t, f, func(e *env) { e.options.PinCount, e.options.PinBytes = 3, 5000 })
	var revs []int64
	for i := range 5 {
		revs = append(revs, e.put(e.pods, "a", fmt.Sprint(i)).Revision)
		e.pods.Pin(e.pods.Snapshot())
	}
	kept := func() (out []bool) {
		for _, rev := range revs {
			_, err := e.pods.SnapshotAt(rev)
			out = append(out, err == nil)
		}
		return out
	}
	equal(t, "by count", fmt.Sprint(kept()), "[false false true true true]")
	for range 6 {
		e.put(e.pods, "a", big)
	}
	equal(t, "by bytes", fmt.Sprint(kept()), "[false false false false false]")
}

func testIndexes(t *testing.T, f Factory) {
	e := newEnv(t, f)
	e.put(e.pods, "a", "red")
	e.put(e.pods, "b", "blue")
	must(t, e.pods.AddIndex("content", func(r *store.Record) []string { return []string{Content(r), "all"} }))
	if err := e.pods.AddIndex("content", func(*store.Record) []string { return nil }); err == nil {
		t.Fatal("the same index twice was accepted")
	}
	show := func(value string) string {
		var keys []string
		for _, r := range e.pods.ByIndex("content", value) {
			keys = append(keys, strings.TrimPrefix(r.Key, Pods+"default/")+":"+Content(r))
		}
		sort.Strings(keys)
		return strings.Join(keys, " ")
	}
	values := func() string {
		v := e.pods.IndexValues("content")
		sort.Strings(v)
		return strings.Join(v, " ")
	}
	equal(t, "red", show("red"), "a:red")
	w := e.watch(e.pods, "", e.s.Revision())
	e.put(e.pods, "a", "blue")
	e.put(e.pods, "c", "green")
	e.next(w, 2)
	equal(t, "red", show("red"), "")
	equal(t, "blue", show("blue"), "a:blue b:blue")
	equal(t, "values", values(), "all blue green")
	e.del(e.pods, "b")
	e.del(e.pods, "c")
	equal(t, "all", show("all"), "a:blue")
	equal(t, "values", values(), "all blue")
	e.pods.DropIndex("content")
	equal(t, "dropped index", len(e.pods.ByIndex("content", "all")), 0)
	must(t, e.pods.AddIndex("content", func(r *store.Record) []string { return nil }))
	equal(t, "no such index", len(e.pods.ByIndex("nope", "x"))+len(e.pods.IndexValues("nope")), 0)
}

func testEncoding(t *testing.T, f Factory) {
	e := newEnv(t, f)
	r := e.put(e.pods, "a", "one")
	var made atomic.Int64
	get := func(kind string) ([]byte, error) {
		return r.Encoding(kind, func() ([]byte, error) { made.Add(1); return []byte(kind), nil })
	}
	parallel(t, 8, 50, func(_, i int) error {
		kind := fmt.Sprint("kind", i%3)
		data, err := get(kind)
		if err == nil && string(data) != kind {
			err = fmt.Errorf("got %q for %q", data, kind)
		}
		return err
	})
	equal(t, "made", made.Load(), 3)
	boom := errors.New("boom")
	if _, err := r.Encoding("bad", func() ([]byte, error) { return nil, boom }); !errors.Is(err, boom) {
		t.Fatal(err)
	}
	if _, err := get("bad"); err != nil {
		t.Fatal("an error was remembered")
	}
	for i := range 100 {
		data, err := get(fmt.Sprint("many", i))
		must(t, err)
		equal(t, "data", string(data), fmt.Sprint("many", i))
	}
	testEncodings(t, e)
}

// testEncodings asks for the encodings of many records, a third of which have none.
func testEncodings(t *testing.T, e *env) {
	var records []*store.Record
	for i := range 200 {
		r := e.put(e.pods, fmt.Sprintf("many%03d", i), fmt.Sprint(i))
		for _, kind := range []string{"other", "wanted", "third"}[i%3:] {
			_, err := r.Encoding(kind, func() ([]byte, error) { return []byte(kind + Content(r)), nil })
			must(t, err)
		}
		records = append(records, r)
	}
	got := make([][]byte, len(records))
	store.Encodings(records, "wanted", got)
	for i, data := range got {
		want := ""
		if i%3 < 2 {
			want = fmt.Sprint("wanted", i)
		}
		equal(t, fmt.Sprint("encoding of record ", i), string(data), want)
	}
	store.Encodings(nil, "wanted", nil)
}

func testEncodingBounds(t *testing.T, f Factory) {
	e := newEnv(t, f, func(e *env) { e.options.EncodingBytes = 1000 })
	made := 0
	encode := func(r *store.Record) {
		_, err := r.Encoding("json", func() ([]byte, error) { made++; return make([]byte, 400), nil })
		must(t, err)
	}
	a, b, c := e.put(e.pods, "a", ""), e.put(e.pods, "b", ""), e.put(e.pods, "c", "")
	for _, r := range []*store.Record{a, b, a, b, c, b, c} {
		encode(r)
	}
	equal(t, "made", made, 3)
	encode(a)
	equal(t, "made after the bound pushed one out", made, 4)

	// Versions that were replaced have a bound of their own: they push out each other, and none that is current.
	var versions []*store.Record
	for i := range 4 {
		versions = append(versions, e.put(e.pods, "a", fmt.Sprint(i)))
		encode(versions[i])
	}
	made = 0
	for _, r := range []*store.Record{versions[3], versions[2], versions[1], c} {
		encode(r)
	}
	equal(t, "made of those that are kept", made, 0)
	encode(versions[0])
	equal(t, "made of one that was pushed out", made, 1)
	encode(versions[1])
	equal(t, "made of the one that this pushed out", made, 2)
	e.del(e.pods, "c")
	encode(c)
	encode(versions[3])
	equal(t, "made after a deletion", made, 2)
}

func testDetector(t *testing.T, f Factory) {
	e := newEnv(t, f)
	obj := Object("a", "one")
	_, err := e.s.Txn(e.ctx, store.Op{Table: e.pods, Key: Pods + "default/a", Object: obj})
	must(t, err)
	w := e.watch(e.pods, "", e.s.Revision()-1)
	panics := func(what string, fn func()) {
		t.Helper()
		defer func() {
			if p := fmt.Sprint(recover()); !strings.Contains(p, "/registry/pods/default/a") {
				t.Errorf("%s: a changed object was not found: %s", what, p)
			}
		}()
		fn()
	}
	obj.Labels["content"] = "changed"
	panics("Get", func() {
		for range 100 {
			e.pods.Get(Pods + "default/a")
		}
	})
	panics("Snapshot", func() { e.pods.Snapshot() })
	panics("Watch", func() { w.TryNext() })
	obj.Labels["content"] = "one"
}
