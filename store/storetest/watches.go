package storetest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"knarr/store"
)

func testWatchOrder(t *testing.T, f Factory) {
	e := newEnv(t, f)
	w := e.watch(e.pods, "", e.s.Revision())
	a := e.put(e.pods, "a", "one")
	b := e.put(e.pods, "a", "two")
	c := e.del(e.pods, "a")
	evs := e.next(w, 3)
	for i, want := range []store.Event{
		{Type: store.Added, Revision: a.Revision, Record: a},
		{Type: store.Modified, Revision: b.Revision, Record: b, Prev: a},
		{Type: store.Deleted, Revision: c.Revision, Record: c, Prev: b},
	} {
		equal(t, fmt.Sprint("event ", i), evs[i], want)
	}
	e.noEvents(w)
}

func testWatchFrom(t *testing.T, f Factory) {
	e := newEnv(t, f)
	start := e.s.Revision()
	for i := range 600 { // several chunks
		e.put(e.leases, "a", fmt.Sprint(i))
	}
	for _, back := range []int64{0, 1, 7, 8, 300, 599, 600} {
		w := e.watch(e.leases, "", e.s.Revision()-back)
		if back == 0 {
			e.noEvents(w)
			continue
		}
		evs := e.next(w, int(back))
		for i, ev := range evs {
			equal(t, "revision", ev.Revision, e.s.Revision()-back+int64(i)+1)
		}
	}
	future := e.watch(e.leases, "", e.s.Revision()+2)
	e.put(e.leases, "a", "x")
	e.put(e.leases, "a", "y")
	z := e.put(e.leases, "a", "z")
	equal(t, "first event after a future revision", e.next(future, 1)[0].Revision, z.Revision)
	if _, err := e.leases.Watch("", start-1); !errors.Is(err, store.ErrGone) {
		t.Fatalf("watch from before the store's beginning: %v", err)
	}
	if _, err := e.leases.Watch(Pods, start); err == nil {
		t.Fatal("watch of another table's prefix was accepted")
	}
}

func testWatchPrefix(t *testing.T, f Factory) {
	e := newEnv(t, f)
	at := e.s.Revision()
	prefixes := []string{"", Pods + "ns1/", Pods + "ns2/", Pods + "ns2/a", Pods + "ns3/", Pods + "n", Pods + "ns2/a/", Pods + "ns1/b/"}
	var watches []*store.Watch
	for _, p := range prefixes {
		watches = append(watches, e.watch(e.pods, p, at))
	}
	for _, k := range []string{"ns1/a", "ns2/a", "ns2/ab", "ns2/b", "cluster", "ns1/b"} {
		_, err := e.s.Txn(e.ctx, store.Op{Table: e.pods, Key: Pods + k, Object: Object("x", k)})
		must(t, err)
	}
	for i, want := range []string{
		"ns1/a ns2/a ns2/ab ns2/b cluster ns1/b", "ns1/a ns1/b", "ns2/a ns2/ab ns2/b", "ns2/a ns2/ab", "", "ns1/a ns2/a ns2/ab ns2/b ns1/b", "", "",
	} {
		var got []string
		evs, err := watches[i].TryNext()
		for ; len(evs) > 0; evs, err = watches[i].TryNext() {
			for _, ev := range evs {
				got = append(got, Content(ev.Record))
			}
		}
		must(t, err)
		equal(t, "events of "+prefixes[i], strings.Join(got, " "), want)
		equal(t, "progress of "+prefixes[i], watches[i].Progress(), e.s.Revision())
	}
}

func testWatchGone(t *testing.T, f Factory) {
	e := newEnv(t, f, func(e *env) { e.window = 20 })
	at := e.s.Revision()
	slow := e.watch(e.leases, "", at)
	quiet := e.watch(e.leases, Leases+"quiet/", at)
	late := e.watch(e.leases, Leases+"default/b", at)
	e.put(e.leases, "b", "early")
	for i := range 600 {
		e.put(e.leases, "a", fmt.Sprint(i))
	}
	for name, w := range map[string]*store.Watch{"slow": slow, "late": late} {
		if evs, err := w.TryNext(); !errors.Is(err, store.ErrGone) {
			t.Fatalf("%s watch got %d events and %v", name, len(evs), err)
		}
		select {
		case <-w.Ready():
		default:
			t.Fatalf("%s watch that is gone is not ready", name)
		}
	}
	if _, err := e.leases.Watch("", at); !errors.Is(err, store.ErrGone) {
		t.Fatalf("watch from an old revision: %v", err)
	}
	e.noEvents(quiet)
	_, err := e.s.Txn(e.ctx, store.Op{Table: e.leases, Key: Leases + "quiet/q", Object: Object("q", "q")})
	must(t, err)
	equal(t, "event of the quiet watch", Content(e.next(quiet, 1)[0].Record), "q")
}

func testWatchAge(t *testing.T, f Factory) {
	e := newEnv(t, f)
	at := e.s.Revision()
	slow := e.watch(e.pods, "", at)
	e.put(e.pods, "a", "one")
	last := e.put(e.pods, "a", "two")
	e.clock.Advance(store.DefaultWindowAge - time.Minute)
	w, err := e.pods.Watch("", at)
	must(t, err)
	w.Stop()
	// The store forgets old events without anybody writing.
	e.advanceUntil(time.Minute, func() bool {
		_, err := e.pods.Watch("", at)
		return errors.Is(err, store.ErrGone)
	})
	if _, err := slow.TryNext(); !errors.Is(err, store.ErrGone) {
		t.Fatalf("slow watch: %v", err)
	}
	fresh := e.watch(e.pods, "", last.Revision)
	e.put(e.pods, "a", "three")
	e.next(fresh, 1)
}

// advanceUntil moves the clock step by step until the store's keeper has done what is asked for.
func (e *env) advanceUntil(step time.Duration, done func() bool) {
	e.t.Helper()
	for deadline := time.Now().Add(patience); !done(); time.Sleep(time.Millisecond) {
		e.clock.Advance(step)
		if time.Now().After(deadline) {
			e.t.Fatal("it did not happen")
		}
	}
}

func testWatchBytes(t *testing.T, f Factory) {
	e := newEnv(t, f)
	tab, err := e.s.OpenTable(e.ctx, store.TableOptions{Prefix: "/registry/big/", Codec: Codec{}, Class: store.Lossy, WindowBytes: 100_000})
	must(t, err)
	at := e.s.Revision()
	for range 30 {
		e.put(tab, "a", strings.Repeat("x", 10_000))
	}
	if _, err := tab.Watch("", at); !errors.Is(err, store.ErrGone) {
		t.Fatalf("300 kB of objects were kept in a window of 100 kB: %v", err)
	}
	e.next(e.watch(tab, "", e.s.Revision()-2), 2)
}

func testWatchEnds(t *testing.T, f Factory) {
	e := newEnv(t, f)
	blocked := func(w *store.Watch, ctx context.Context) chan error {
		result := make(chan error, 1)
		go func() { _, err := w.Next(ctx); result <- err }()
		return result
	}
	wait := func(what string, result chan error, want error) {
		t.Helper()
		select {
		case err := <-result:
			if !errors.Is(err, want) {
				t.Fatalf("%s: %v", what, err)
			}
		case <-time.After(patience):
			t.Fatalf("%s did not end Next", what)
		}
	}
	ctx, cancel := context.WithCancel(e.ctx)
	w := e.watch(e.pods, "", e.s.Revision())
	r := blocked(w, ctx)
	cancel()
	wait("cancel", r, context.Canceled)
	r = blocked(w, e.ctx)
	w.Stop()
	wait("Stop", r, store.ErrStopped)
	r = blocked(e.watch(e.pods, "", e.s.Revision()), e.ctx)
	must(t, e.s.Close())
	wait("Close", r, store.ErrClosed)
	if _, err := e.s.Txn(e.ctx, store.Op{Table: e.pods, Key: Pods + "x", Object: Object("x", "")}); !errors.Is(err, store.ErrClosed) {
		t.Fatalf("Txn after Close: %v", err)
	}
}

func testWatchReady(t *testing.T, f Factory) {
	e := newEnv(t, f)
	w := e.watch(e.pods, Pods+"default/", e.s.Revision())
	ready := w.Ready()
	select {
	case <-ready:
		t.Fatal("ready with nothing to read")
	default:
	}
	e.put(e.leases, "l", "")
	_, err := e.s.Txn(e.ctx, store.Op{Table: e.pods, Key: Pods + "other/x", Object: Object("x", "")})
	must(t, err)
	select {
	case <-ready:
		t.Fatal("woken by what it does not watch")
	default:
	}
	e.put(e.pods, "a", "")
	select {
	case <-ready:
	case <-time.After(patience):
		t.Fatal("not woken")
	}
	select {
	case <-w.Ready():
	default:
		t.Fatal("Ready forgot that there is something to read")
	}
	e.next(w, 1)
	testWatchCalls(t, e)
}

// calls count how often a waker is told, and keep with how many the last time.
type calls struct{ count, among atomic.Int64 }

// Wake implements store.Waker.
func (c *calls) Wake(among int) {
	c.count.Add(1)
	c.among.Store(int64(among))
}

// testWatchCalls holds that wakers are told once for each change that their watches see, until these stop or the store closes.
func testWatchCalls(t *testing.T, e *env) {
	calls := make([]calls, 5)
	var watches []*store.Watch
	for i, prefix := range []string{"", Pods + "default/", Pods + "default/", Pods + "other/"} {
		w := e.watch(e.pods, prefix, e.s.Revision())
		w.OnReady(&calls[i])
		watches = append(watches, w)
	}
	shared := []*store.Watch{e.watch(e.pods, Pods+"default/", e.s.Revision()), e.watch(e.pods, Pods+"default/", e.s.Revision())}
	for _, w := range shared {
		w.OnReady(&calls[4])
	}
	expect := func(what string, want ...int64) {
		t.Helper()
		for i := range calls {
			equal(t, fmt.Sprint("calls of watch ", i, " ", what), calls[i].count.Load(), want[i])
		}
	}
	e.put(e.pods, "called", "1")
	expect("after a change", 1, 1, 1, 0, 1)
	for i, want := range []int64{1, 3, 3, 0, 3} {
		equal(t, fmt.Sprint("wakers told with that of watch ", i), calls[i].among.Load(), want)
	}
	watches[1].Stop()
	shared[0].Stop()
	e.put(e.pods, "called", "2")
	expect("after others stopped", 2, 1, 2, 0, 2)
	shared[1].Stop()
	for i, want := range []string{"12", "", "12", ""} {
		got := ""
		for evs, err := watches[i].TryTake(1); len(evs) > 0; evs, err = watches[i].TryTake(1) {
			must(t, err)
			equal(t, "events taken at once", len(evs), 1)
			got += Content(evs[0].Record)
		}
		equal(t, fmt.Sprint("contents of watch ", i), got, want)
	}
	must(t, e.s.Close())
	expect("after the close", 3, 1, 3, 1, 2)
}

func testWatchProgress(t *testing.T, f Factory) {
	e := newEnv(t, f)
	at := e.s.Revision()
	w := e.watch(e.pods, "", at)
	a := e.put(e.pods, "a", "")
	equal(t, "with an unread event", w.Progress(), at)
	e.put(e.leases, "l", "")
	e.next(w, 1)
	equal(t, "idle", w.Progress(), e.s.Revision())
	e.put(e.leases, "l", "2")
	equal(t, "idle, other tables go on", w.Progress(), a.Revision+2)
	b := e.put(e.pods, "a", "2")
	equal(t, "behind", w.Progress(), b.Revision-1)
}

// testWatchMany lets many watches follow concurrent writers: each sees every change, in order, once.
func testWatchMany(t *testing.T, f Factory) {
	e := newEnv(t, f)
	const watchers, writers, each = 50, 4, 50
	at := e.s.Revision()
	var wg sync.WaitGroup
	for i := range watchers {
		w := e.watch(e.leases, "", at)
		wg.Add(1)
		go func() {
			defer wg.Done()
			ctx, cancel := context.WithTimeout(e.ctx, patience)
			defer cancel()
			last, versions, n := at, map[string]int64{}, 0
			for n < writers*each {
				evs, err := w.Next(ctx)
				if err != nil {
					t.Errorf("watch %d after %d events: %v", i, n, err)
					return
				}
				for _, ev := range evs {
					prev := int64(0)
					if ev.Prev != nil {
						prev = ev.Prev.Revision
					}
					if ev.Revision <= last || versions[ev.Record.Key] != prev {
						t.Errorf("watch %d: %s follows %d, has previous %d", i, describe([]store.Event{ev}), last, prev)
						return
					}
					last, versions[ev.Record.Key] = ev.Revision, ev.Revision
					n++
				}
			}
		}()
	}
	parallel(t, writers, each, func(w, i int) error {
		key, expect := fmt.Sprintf("%sdefault/w%d", Leases, w), int64(0)
		if r := e.leases.Get(key); r != nil {
			expect = r.Revision
		}
		_, err := e.s.Txn(e.ctx, store.Op{Table: e.leases, Key: key, Object: Object("w", fmt.Sprint(i)), Expect: expect})
		return err
	})
	wg.Wait()
}

func testExpiry(t *testing.T, f Factory) {
	e := newEnv(t, f)
	put := func(name string, ttl time.Duration, expect int64) *store.Record {
		t.Helper()
		out, err := e.s.Txn(e.ctx, store.Op{Table: e.leases, Key: Leases + name, Object: Object(name, name), TTL: ttl, Expect: expect})
		must(t, err)
		return out[0]
	}
	w := e.watch(e.leases, "", e.s.Revision())
	put("long", time.Hour, 0)
	short := put("short", 10*time.Second, 0)
	kept := put("kept", 10*time.Second, 0)
	put("kept", 0, kept.Revision)
	extended := put("extended", 10*time.Second, 0)
	put("extended", 30*time.Minute, extended.Revision)
	e.next(w, 6)
	equal(t, "expiry", short.Expires.Sub(e.clock.Now()), 10*time.Second)
	e.clock.Advance(9 * time.Second)
	e.noEvents(w)
	var evs []store.Event
	read := func() bool {
		more, err := w.TryNext()
		must(t, err)
		evs = append(evs, more...)
		return len(evs) > 0
	}
	e.advanceUntil(time.Second, read)
	equal(t, "expired", describe(evs[:1]), fmt.Sprintf("DELETED %sshort@%d=short; ", Leases, evs[0].Revision))
	equal(t, "previous", evs[0].Prev, short)
	e.clock.Advance(2 * time.Second)
	equal(t, "left", e.leases.Len(), 3)
	evs = nil
	e.advanceUntil(time.Minute, read)
	equal(t, "next", evs[0].Record.Key, Leases+"extended")
}

func testExpiryReopen(t *testing.T, f Factory) {
	e := newEnv(t, f)
	if e.traits.OwnExpiry {
		t.Skip("the engine expires by its own clock; its package tests that")
	}
	for i := range 300 {
		_, err := e.s.Txn(e.ctx, store.Op{Table: e.leases, Key: fmt.Sprint(Leases, "e", i), Object: Object("e", ""), TTL: time.Minute})
		must(t, err)
	}
	e.put(e.leases, "stays", "")
	must(t, e.s.Close())
	e.clock.Advance(30 * time.Second)
	e.open()
	equal(t, "not yet expired", e.leases.Len(), 301)
	must(t, e.s.Close())
	e.clock.Advance(time.Hour)
	e.open()
	e.advanceUntil(time.Second, func() bool { return e.leases.Len() == 1 })
}
