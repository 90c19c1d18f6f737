package storetest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"knarr/store"
)

// testBusy uses everything at once: its worth lies in the race detector, and in the comparison of the index with the table at the end.
func testBusy(t *testing.T, f Factory) {
	rng := Seed(t)
	e := newEnv(t, f, func(e *env) { e.window = 300 })
	must(t, e.leases.AddIndex("content", func(r *store.Record) []string { return []string{Content(r)} }))
	ctx, cancel := context.WithCancel(e.ctx)
	var readers sync.WaitGroup
	for range 2 {
		readers.Add(2)
		seed := rng.Uint64()
		go func() { defer readers.Done(); busyWatcher(ctx, t, e) }()
		go func() { defer readers.Done(); busyReader(ctx, t, e, rand.New(rand.NewPCG(seed, 1))) }()
	}
	readers.Add(1)
	go func() { defer readers.Done(); busyOpener(ctx, t, e) }()
	parallel(t, 4, 400, func(w, i int) error {
		key := fmt.Sprintf("%sdefault/k%d", Leases, (w*7+i)%40)
		op := store.Op{Table: e.leases, Key: key}
		if r := e.leases.Get(key); r != nil {
			op.Expect = r.Revision
		}
		if op.Expect == 0 || i%3 > 0 {
			op.Object = Object("x", fmt.Sprint("c", i%5))
			op.TTL = time.Duration(i%2) * time.Minute
		}
		_, err := e.s.Txn(ctx, op)
		var conflict *store.ConflictError
		if errors.As(err, &conflict) {
			return nil
		}
		if i%50 == 0 {
			e.clock.Advance(20 * time.Second)
		}
		return err
	})
	cancel()
	readers.Wait()
	// Expiry goes on by itself, so compare within one snapshot of both: until nothing changes in between.
	for {
		sn, indexed := e.leases.Snapshot(), 0
		for _, v := range e.leases.IndexValues("content") {
			for _, r := range e.leases.ByIndex("content", v) {
				if sn.Get(r.Key) == r && Content(r) == v {
					indexed++
				}
			}
		}
		if e.leases.Snapshot().Revision() == sn.Revision() {
			equal(t, "indexed records", indexed, sn.Len())
			return
		}
	}
}

// busyWatcher follows, and lists again when it is too slow.
func busyWatcher(ctx context.Context, t *testing.T, e *env) {
	for {
		sn := e.leases.Snapshot()
		mirror := map[string]int64{}
		sn.Ascend("", "", func(r *store.Record) bool { mirror[r.Key] = r.Revision; return true })
		w, err := e.leases.Watch(Leases+"default/", sn.Revision())
		for err == nil {
			var evs []store.Event
			evs, err = w.Next(ctx)
			for _, ev := range evs {
				if prev := ev.Prev; prev != nil && mirror[ev.Record.Key] != prev.Revision || prev == nil && mirror[ev.Record.Key] != 0 {
					t.Errorf("%s does not follow %d", describe([]store.Event{ev}), mirror[ev.Record.Key])
					return
				}
				mirror[ev.Record.Key] = ev.Revision
				if ev.Type == store.Deleted {
					delete(mirror, ev.Record.Key)
				}
			}
		}
		if w != nil {
			w.Stop()
		}
		if !errors.Is(err, store.ErrGone) {
			if ctx.Err() == nil {
				t.Error(err)
			}
			return
		}
	}
}

// busyReader reads in every other way.
func busyReader(ctx context.Context, t *testing.T, e *env, rng *rand.Rand) {
	var pinned []int64
	for ctx.Err() == nil {
		switch rng.IntN(4) {
		case 0:
			sn := e.leases.Snapshot()
			e.leases.Pin(sn)
			pinned = append(pinned, sn.Revision())
		case 1:
			if len(pinned) == 0 {
				continue
			}
			rev := pinned[rng.IntN(len(pinned))]
			sn, err := e.leases.SnapshotAt(rev)
			if err == nil && sn.Revision() != rev || err != nil && !errors.Is(err, store.ErrGone) {
				t.Errorf("SnapshotAt(%d): %v", rev, err)
			}
		case 2:
			for _, r := range e.leases.ByIndex("content", "c1") {
				if Content(r) != "c1" {
					t.Errorf("%s is in the wrong index", r.Key)
				}
			}
		case 3:
			if r := e.leases.Get(Leases + "default/k1"); r != nil {
				data, err := r.Encoding("x", func() ([]byte, error) { return []byte(Content(r)), nil })
				if err != nil || string(data) != Content(r) {
					t.Errorf("encoding of %s: %q, %v", r.Key, data, err)
				}
			}
		}
	}
}

// busyOpener opens and closes another table.
func busyOpener(ctx context.Context, t *testing.T, e *env) {
	const prefix = "/registry/busy/"
	for n := 0; ctx.Err() == nil; n++ {
		tab, err := e.s.OpenTable(e.ctx, store.TableOptions{Prefix: prefix, Codec: Codec{}, Class: store.Lossy})
		if err == nil && tab.Len() != n {
			err = fmt.Errorf("the table has %d objects after %d rounds", tab.Len(), n)
		}
		if err == nil {
			_, err = e.s.Txn(e.ctx, store.Op{Table: tab, Key: fmt.Sprint(prefix, n), Object: Object("x", "")})
		}
		if err != nil {
			t.Error(err)
			return
		}
		e.s.CloseTable(prefix)
	}
}
