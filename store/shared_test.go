package store_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"knarr/store"
	"knarr/store/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// cluster is a small etcd in memory: it decides, and tells every member.
type cluster struct {
	mu       sync.Mutex
	revision int64
	values   map[string]store.Entry
	log      []change
	changed  chan struct{}
}

// change is one transaction as the cluster's watch delivers it: encoded, all writes with one revision.
type change struct{ writes []store.Write }

// decide does a transaction if its expectations hold, and returns the revision that the answer is based on.
func (c *cluster) decide(p *store.Proposal) (int64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, w := range p.Writes {
		if c.values[w.Key].Revision != w.Expect {
			return c.revision, &store.RefusedError{Index: i}
		}
	}
	c.revision++
	var ch change
	for _, w := range p.Writes {
		create := c.values[w.Key].CreateRevision
		if create == 0 {
			create = c.revision
		}
		if w.Delete {
			delete(c.values, w.Key)
		} else {
			c.values[w.Key] = store.Entry{Key: w.Key, Value: w.Value, Revision: c.revision, CreateRevision: create, Expires: w.Expires}
		}
		ch.writes = append(ch.writes, store.Write{Key: w.Key, Delete: w.Delete, Value: w.Value, Expires: w.Expires, Revision: c.revision, CreateRevision: create})
	}
	c.log = append(c.log, ch)
	close(c.changed)
	c.changed = make(chan struct{})
	return c.revision, nil
}

// member is the engine of one server of the cluster.
type member struct {
	c    *cluster
	host store.Host
	stop chan struct{}
	done chan struct{}

	mu        sync.Mutex // held while publishing, and while loading
	published int        // length of the log that is published
	own       map[int64]*store.Proposal
	moved     chan struct{} // closed and replaced when published grows
}

func newMember(c *cluster) *member {
	return &member{c: c, stop: make(chan struct{}), done: make(chan struct{}), own: map[int64]*store.Proposal{}, moved: make(chan struct{})}
}

func (m *member) Start(_ context.Context, host store.Host) (int64, error) {
	m.host = host
	m.c.mu.Lock()
	defer m.c.mu.Unlock()
	m.published = len(m.c.log)
	go m.follow()
	return m.c.revision, nil
}

// follow is the member's one watch of the cluster.
func (m *member) follow() {
	defer close(m.done)
	for {
		m.c.mu.Lock()
		wait, log := m.c.changed, m.c.log
		m.c.mu.Unlock()
		m.mu.Lock()
		for ; m.published < len(log); m.published++ {
			writes := log[m.published].writes
			p := m.own[writes[0].Revision]
			if p == nil {
				p = &store.Proposal{Writes: append([]store.Write(nil), writes...)}
			}
			for i := range p.Writes {
				p.Writes[i].Revision, p.Writes[i].CreateRevision = writes[i].Revision, writes[i].CreateRevision
			}
			delete(m.own, writes[0].Revision)
			m.host.Publish([]*store.Proposal{p})
		}
		close(m.moved)
		m.moved = make(chan struct{})
		m.mu.Unlock()
		select {
		case <-wait:
		case <-m.stop:
			return
		}
	}
}

func (m *member) Load(_ context.Context, prefix string, _ store.Class, fn func(store.Entry) error, done func(int64)) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.c.mu.Lock()
	// The state as it was published last: the rest comes by publication.
	state, revision := map[string]store.Entry{}, int64(1)
	for _, ch := range m.c.log[:m.published] {
		for _, w := range ch.writes {
			revision = w.Revision
			if w.Delete {
				delete(state, w.Key)
			} else {
				state[w.Key] = store.Entry{Key: w.Key, Value: w.Value, Revision: w.Revision, CreateRevision: w.CreateRevision, Expires: w.Expires}
			}
		}
	}
	m.c.mu.Unlock()
	keys := slices.Sorted(maps.Keys(state))
	for _, k := range keys {
		if strings.HasPrefix(k, prefix) {
			if err := fn(state[k]); err != nil {
				return err
			}
		}
	}
	done(revision)
	return nil
}

func (m *member) Commit(ctx context.Context, p *store.Proposal) error {
	m.mu.Lock() // so that the own proposal is known before the watch delivers it
	rev, err := m.c.decide(p)
	if err == nil {
		m.own[rev] = p
	}
	m.mu.Unlock()
	for {
		m.mu.Lock()
		wait, reached := m.moved, m.published >= int(rev)-1
		m.mu.Unlock()
		if reached {
			return err
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (m *member) Close() error {
	close(m.stop)
	<-m.done
	return nil
}

// TestSharedEngine lets two stores work on one cluster: the Engine interface must carry that.
func TestSharedEngine(t *testing.T) {
	ctx := t.Context()
	c := &cluster{revision: 1, values: map[string]store.Entry{}, changed: make(chan struct{})}
	var tables [2]*store.Table
	var stores [2]*store.Store
	for i := range stores {
		s, err := store.Open(ctx, store.Options{Engine: newMember(c), Debug: true})
		require.NoError(t, err)
		defer s.Close()
		stores[i] = s
		tables[i], err = s.OpenTable(ctx, store.TableOptions{Prefix: storetest.Pods, Codec: storetest.Codec{}})
		require.NoError(t, err)
	}
	key, twin := storetest.Pods+"default/n", storetest.Pods+"default/twin"
	const each = 100
	increment := func(s *store.Store, tab *store.Table) error {
		for {
			r, r2 := tab.Get(key), tab.Get(twin)
			n, _ := strconv.Atoi(storetest.Content(r))
			op := store.Op{Table: tab, Key: key, Object: storetest.Object("n", strconv.Itoa(n+1))}
			op2 := store.Op{Table: tab, Key: twin, Object: storetest.Object("n", strconv.Itoa(n+1))}
			if r != nil {
				op.Expect = r.Revision
			}
			if r2 != nil {
				op2.Expect = r2.Revision
			}
			_, err := s.Txn(ctx, op, op2)
			var conflict *store.ConflictError
			if errors.As(err, &conflict) {
				if conflict.Current == nil || conflict.Key == key && conflict.Current.Revision <= op.Expect {
					return fmt.Errorf("expected %d, the conflict shows %+v", op.Expect, conflict.Current)
				}
				continue
			}
			return err
		}
	}
	var watches [2]*store.Watch
	results := make(chan error)
	for i := range stores {
		w, err := tables[i].Watch("", stores[i].Revision())
		require.NoError(t, err)
		defer w.Stop()
		watches[i] = w
		go func() {
			for range each {
				if err := increment(stores[i], tables[i]); err != nil {
					results <- err
					return
				}
			}
			results <- nil
		}()
	}
	// A third server comes while the others write: what it loads and what it is told must join without a gap.
	late, err := store.Open(ctx, store.Options{Engine: newMember(c), Debug: true})
	require.NoError(t, err)
	defer late.Close()
	lateTable, err := late.OpenTable(ctx, store.TableOptions{Prefix: storetest.Pods, Codec: storetest.Codec{}})
	require.NoError(t, err)
	loaded := lateTable.Snapshot()
	lateWatch, err := lateTable.Watch("", loaded.Revision())
	require.NoError(t, err)
	defer lateWatch.Stop()
	require.NoError(t, <-results)
	require.NoError(t, <-results)
	last, _ := strconv.Atoi(storetest.Content(loaded.Get(key)))
	for last < 2*each {
		evs, err := lateWatch.Next(ctx)
		require.NoError(t, err)
		for _, ev := range evs {
			if ev.Record.Key == key {
				last++
				require.Equal(t, strconv.Itoa(last), storetest.Content(ev.Record))
			}
		}
	}
	for i, w := range watches {
		for n := 0; n < 2*2*each; {
			evs, err := w.Next(ctx)
			require.NoError(t, err)
			for _, ev := range evs {
				require.Equal(t, strconv.Itoa(n/2+1), storetest.Content(ev.Record), "event %d of store %d", n, i)
				require.Equal(t, int64(n/2+2), ev.Revision)
				n++
			}
		}
		require.Equal(t, stores[i].Revision(), w.Progress())
		require.Equal(t, strconv.Itoa(2*each), storetest.Content(tables[i].Get(key)))
	}
}
