package storetest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"

	"knarr/store"
)

const (
	modelWriters = 4
	modelPairs   = 6  // pairs of keys that one writer owns
	modelRounds  = 15 // KNARR_ROUNDS overrides
	modelOps     = 60 // per writer and round, at most
)

// version is a state of a key: content "" is absent.
type version struct {
	content  string
	revision int64
}

// pair is two keys that their one writer always changes together, to the same content, so that half a transaction shows.
type pair struct {
	tables [2]*store.Table
	keys   [2]string
	lossy  bool // both tables are
}

// model is what a correct store may hold.
type model struct {
	t      testing.TB
	traits Traits

	mu      sync.Mutex
	crashed bool                // what is learned from now on is about a world that is gone
	acked   map[string]version  // by key: what was acknowledged last
	pending map[string]string   // by key: content of a transaction that may or may not have happened since
	history map[string][]string // by key: every content ever tried
	mirror  map[string]version  // both tables as their watchers see them
	at      map[string]int64    // by table prefix: revision that its watcher has reached
	seen    int64               // largest revision that anybody was told
}

// testModel runs random transactions and watches against a model, with random crashes and restarts.
func testModel(t *testing.T, f Factory) {
	rng := Seed(t)
	e := newEnv(t, f)
	rounds := modelRounds
	if s := os.Getenv("KNARR_ROUNDS"); s != "" {
		rounds, _ = strconv.Atoi(s)
	}
	m := &model{
		t: t, traits: e.traits, acked: map[string]version{}, pending: map[string]string{}, history: map[string][]string{},
		mirror: map[string]version{}, at: map[string]int64{},
	}
	m.list(e.pods)
	m.list(e.leases)
	for round := range rounds {
		clean, how := rng.IntN(4) == 0, Crash(rng.IntN(2))
		m.round(e, rng, round, clean, how)
		m.verify(e, clean, how)
		if t.Failed() {
			t.Fatalf("round %d (clean stop %v, crash %v)", round, clean, how)
		}
	}
}

// list starts a watcher's mirror anew.
func (m *model) list(tab *store.Table) {
	for key := range m.mirror {
		if len(key) > len(tab.Prefix()) && key[:len(tab.Prefix())] == tab.Prefix() {
			delete(m.mirror, key)
		}
	}
	sn := tab.Snapshot()
	m.at[tab.Prefix()] = sn.Revision()
	m.seen = max(m.seen, sn.Revision())
	sn.Ascend("", "", func(r *store.Record) bool {
		m.mirror[r.Key] = version{Content(r), r.Revision}
		return true
	})
}

func modelPair(e *env, writer, n int) pair {
	tables := [][2]*store.Table{{e.pods, e.pods}, {e.leases, e.leases}, {e.pods, e.leases}}[n%3]
	p := pair{tables: tables, lossy: n%3 == 1}
	for i, tab := range tables {
		p.keys[i] = fmt.Sprintf("%sw%d/p%d%c", tab.Prefix(), writer, n, 'a'+i)
	}
	return p
}

// round lets writers and watchers work, stops the store while they do (a crash) or after (a clean stop), and opens it again.
func (m *model) round(e *env, rng *rand.Rand, round int, clean bool, how Crash) {
	m.crashed = false
	stop := m.follow(e)
	var writers sync.WaitGroup
	wrote := make(chan struct{}, modelWriters*modelOps)
	for w := range modelWriters {
		wrng := rand.New(rand.NewPCG(rng.Uint64(), uint64(w)))
		writers.Add(1)
		go func() {
			defer writers.Done()
			for op := range modelOps {
				p := modelPair(e, w, wrng.IntN(modelPairs))
				if !m.write(e, p, wrng.IntN(4) == 0, fmt.Sprintf("r%d.w%d.o%d", round, w, op)) {
					return
				}
				wrote <- struct{}{}
			}
		}()
	}
	if clean {
		writers.Wait()
		stop(true)
		e.reopen()
		return
	}
	for range 1 + rng.IntN(modelWriters*modelOps/2) {
		<-wrote
	}
	m.mu.Lock() // nobody learns anything between here and the crash
	m.crashed = true
	e.h.Crash(how, rng)
	m.mu.Unlock()
	writers.Wait()
	stop(false)
	must(m.t, e.s.Close())
	e.open()
}

// write does one transaction; false when the store has crashed.
func (m *model) write(e *env, p pair, del bool, content string) bool {
	var ops []store.Op
	for i, key := range p.keys {
		op := store.Op{Table: p.tables[i], Key: key}
		if r := p.tables[i].Get(key); r != nil {
			op.Expect = r.Revision
		}
		if del && op.Expect != 0 {
			content = ""
		} else {
			op.Object = Object("x", content)
		}
		ops = append(ops, op)
	}
	m.mu.Lock()
	if m.crashed {
		m.mu.Unlock()
		return false
	}
	for _, key := range p.keys {
		m.pending[key] = content
		m.history[key] = append(m.history[key], content)
	}
	m.mu.Unlock()

	out, err := e.s.Txn(e.ctx, ops...)

	m.mu.Lock()
	defer m.mu.Unlock()
	if m.crashed {
		return false
	}
	if err != nil {
		m.t.Errorf("write of %v: %v", p.keys, err)
		return false
	}
	for i, r := range out {
		if r.Revision <= m.acked[r.Key].revision || i > 0 && r.Revision != out[0].Revision+e.traits.step() {
			m.t.Errorf("%s got revision %d after %d", r.Key, r.Revision, m.acked[r.Key].revision)
		}
		m.acked[r.Key] = version{content, r.Revision}
		m.seen = max(m.seen, r.Revision)
		delete(m.pending, r.Key)
	}
	return true
}

// follow starts a watcher per table; the returned function stops them, if asked to after they have read everything.
func (m *model) follow(e *env) (stop func(drain bool)) {
	ctx, cancel := context.WithCancel(e.ctx)
	var running sync.WaitGroup
	var watches []*store.Watch
	for _, tab := range []*store.Table{e.pods, e.leases} {
		w, err := tab.Watch("", m.at[tab.Prefix()])
		must(m.t, err)
		watches = append(watches, w)
		running.Add(1)
		go func() {
			defer running.Done()
			for {
				evs, err := w.Next(ctx)
				if err != nil {
					if ctx.Err() == nil {
						m.t.Errorf("watch: %v", err)
					}
					return
				}
				m.mu.Lock()
				m.learn(tab, w, evs)
				m.mu.Unlock()
			}
		}()
	}
	return func(drain bool) {
		cancel()
		running.Wait()
		for i, w := range watches {
			if drain {
				m.drain([]*store.Table{e.pods, e.leases}[i], w)
			}
			w.Stop()
		}
	}
}

// drain reads what there is.
func (m *model) drain(tab *store.Table, w *store.Watch) {
	for {
		evs, err := w.TryNext()
		must(m.t, err)
		m.learn(tab, w, evs)
		if len(evs) == 0 {
			return
		}
	}
}

// learn applies events to the mirror, and takes the watch's word for how far it is.
func (m *model) learn(tab *store.Table, w *store.Watch, evs []store.Event) {
	if m.crashed {
		return
	}
	for _, ev := range evs {
		old, prev := m.mirror[ev.Record.Key], int64(0)
		if ev.Prev != nil {
			prev = ev.Prev.Revision
		}
		if ev.Revision < m.at[tab.Prefix()]+m.traits.step() || old.revision != prev || (ev.Type == store.Added) != (prev == 0) || ev.Revision != ev.Record.Revision {
			m.t.Errorf("event %s (previous %d) does not follow %d and %+v", describe([]store.Event{ev}), prev, m.at[tab.Prefix()], old)
		}
		if ev.Type == store.Deleted {
			delete(m.mirror, ev.Record.Key)
		} else {
			m.mirror[ev.Record.Key] = version{Content(ev.Record), ev.Revision}
		}
		m.at[tab.Prefix()] = ev.Revision
	}
	m.at[tab.Prefix()] = max(m.at[tab.Prefix()], w.Progress())
	m.seen = max(m.seen, m.at[tab.Prefix()])
}

// verify compares the store, opened again, with the model, and brings the model up to what has become of the unknown.
func (m *model) verify(e *env, clean bool, how Crash) {
	if rev := e.s.Revision(); rev < m.seen || clean && rev != m.seen {
		m.t.Errorf("the store starts at revision %d, %d was seen", rev, m.seen)
	}
	for w := range modelWriters {
		for n := range modelPairs {
			p := modelPair(e, w, n)
			m.verifyPair(p, p.lossy && !clean && how == PowerLoss && !m.traits.NothingLossy)
		}
	}
	m.resume(e.pods, true)
	m.resume(e.leases, clean || m.traits.NothingLossy)
}

func (m *model) verifyPair(p pair, mayLose bool) {
	var got [2]version
	for i, key := range p.keys {
		if r := p.tables[i].Get(key); r != nil {
			got[i] = version{Content(r), r.Revision}
		}
	}
	if got[0].content != got[1].content || got[0].content != "" && got[1].revision != got[0].revision+m.traits.step() {
		m.t.Errorf("half a transaction: %v are %+v", p.keys, got)
	}
	for i, key := range p.keys {
		want := m.acked[key]
		pending, unknown := m.pending[key]
		ok := got[i].content == want.content && (got[i] == want || want.content == "") ||
			unknown && got[i].content == pending && (got[i].revision > want.revision || pending == "") ||
			mayLose && (got[i].content == "" || slices.Contains(m.history[key], got[i].content))
		if !ok {
			m.t.Errorf("%s is %+v, acknowledged was %+v, under way %q (%v)", key, got[i], want, pending, unknown)
		}
		m.acked[key] = got[i]
		delete(m.pending, key)
	}
}

// resume lets a table's watcher go on, by events if it can and by a new list otherwise, and compares its mirror.
func (m *model) resume(tab *store.Table, mayResume bool) {
	m.crashed = false
	at := m.at[tab.Prefix()]
	w, err := tab.Watch("", at)
	switch {
	case err == nil && !mayResume:
		m.t.Errorf("a watch of the lossy table %s resumes at %d after an unclean stop", tab.Prefix(), at)
	case err == nil:
		m.drain(tab, w)
		w.Stop()
	case errors.Is(err, store.ErrGone):
		if mayResume && tab.Revision() <= at {
			m.t.Errorf("the watch of %s had read everything up to %d, yet: %v", tab.Prefix(), at, err)
		}
		m.list(tab)
	default:
		m.t.Error(err)
	}
	sn := tab.Snapshot()
	sn.Ascend("", "", func(r *store.Record) bool {
		if m.mirror[r.Key] != (version{Content(r), r.Revision}) {
			m.t.Errorf("the watcher has %+v for %s, the store %s@%d", m.mirror[r.Key], r.Key, Content(r), r.Revision)
		}
		return true
	})
	n := 0
	for key := range m.mirror {
		if len(key) > len(tab.Prefix()) && key[:len(tab.Prefix())] == tab.Prefix() {
			n++
		}
	}
	if n != sn.Len() {
		m.t.Errorf("the watcher has %d objects of %s, the store %d", n, tab.Prefix(), sn.Len())
	}
}
