package storetest

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"knarr/store"
)

var crashes = map[string]Crash{"ProcessDeath": ProcessDeath, "PowerLoss": PowerLoss}

// testWatchResumes checks which watches go on after a stop: those of Durable tables that have read everything.
func testWatchResumes(t *testing.T, f Factory) {
	rng := Seed(t)
	stops := map[string]func(*env){"clean": (*env).reopen}
	for name, how := range crashes {
		stops[name] = func(e *env) { e.crash(how, rng) }
	}
	for name, stop := range stops {
		e := newEnv(t, f)
		e.put(e.pods, "a", "")
		behind := e.put(e.pods, "b", "")
		deleted := e.del(e.pods, "a")
		lease := e.put(e.leases, "l", "")
		stop(e)
		_, err := e.pods.Watch("", behind.Revision)
		if !errors.Is(err, store.ErrGone) {
			t.Fatalf("%s stop: a watch that missed a deletion: %v", name, err)
		}
		w := e.watch(e.pods, "", deleted.Revision)
		c := e.put(e.pods, "c", "")
		equal(t, name+": first event", e.next(w, 1)[0].Revision, c.Revision)
		_, err = e.leases.Watch("", lease.Revision)
		if name == "clean" || e.traits.NothingLossy {
			must(t, err)
		} else if !errors.Is(err, store.ErrGone) {
			t.Fatalf("%s: a watch of a lossy table from before: %v", name, err)
		}
	}
}

func testLossyAfterCrash(t *testing.T, f Factory) {
	rng := Seed(t)
	for name, how := range crashes {
		e := newEnv(t, f)
		d := e.put(e.pods, "a", "durable")
		var last *store.Record
		for range 100 {
			last = e.put(e.leases, "l", "lossy")
		}
		e.crash(how, rng)
		equal(t, name+": durable", e.pods.Get(d.Key).Revision, d.Revision)
		if got := e.leases.Get(last.Key); how == ProcessDeath && (got == nil || got.Revision != last.Revision) {
			t.Fatalf("the death of the process lost a lossy write: got %+v, want revision %d", got, last.Revision)
		}
		if e.s.Revision() < last.Revision || e.s.Revision() == last.Revision && !e.traits.NothingLossy {
			t.Fatalf("%s: revision %d would be given again", name, last.Revision)
		}
	}
}

// testRevisionsAfterCrash crashes again and again, with few or many writes in between.
func testRevisionsAfterCrash(t *testing.T, f Factory) {
	rng := Seed(t)
	e := newEnv(t, f)
	seen := e.s.Revision()
	for range 20 {
		for range rng.IntN(4) {
			r := e.put([]*store.Table{e.pods, e.leases}[rng.IntN(2)], "a", "")
			if r.Revision <= seen {
				t.Fatalf("revision %d after %d", r.Revision, seen)
			}
			seen = r.Revision
		}
		if rng.IntN(3) == 0 {
			e.reopen()
		} else {
			e.crash(Crash(rng.IntN(2)), rng)
		}
		if e.s.Revision() < seen {
			t.Fatalf("the counter is at %d, %d was given out", e.s.Revision(), seen)
		}
		seen = e.s.Revision()
	}
}

// testPrefixAfterCrash writes much, in both classes, and loses power: what is left must be everything up to some revision, and every
// durable write must be below it.
func testPrefixAfterCrash(t *testing.T, f Factory) {
	rng := Seed(t)
	e := newEnv(t, f)
	for range 6 {
		start := e.s.Revision()
		var all []*store.Record
		durable := int64(0)
		for i := range 250 {
			tab := e.leases
			if rng.IntN(40) == 0 {
				tab = e.pods
			}
			r := e.put(tab, fmt.Sprint("r", start, ".", i), strings.Repeat("x", rng.IntN(40_000)))
			if tab == e.pods {
				durable = r.Revision
			}
			all = append(all, r)
		}
		e.crash(PowerLoss, rng)
		lost := int64(0)
		for _, r := range all {
			got := e.pods.Get(r.Key)
			if got == nil {
				got = e.leases.Get(r.Key)
			}
			switch {
			case got == nil && r.Revision <= durable:
				t.Fatalf("revision %d is lost, a durable write had %d", r.Revision, durable)
			case got == nil:
				lost = r.Revision
			case lost != 0:
				t.Fatalf("revision %d is lost, the later %d is there", lost, r.Revision)
			case got.Revision != r.Revision:
				t.Fatalf("%s has revision %d, was written with %d", r.Key, got.Revision, r.Revision)
			}
		}
	}
}
