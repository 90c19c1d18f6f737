package etcd

import (
	"cmp"
	"slices"

	"go.etcd.io/etcd/api/v3/mvccpb"

	"knarr/store"
)

// relist brings the store up to date when history was compacted before it was read: it reads everything and publishes the difference.
func (e *Engine) relist() error {
	if err := e.awaitBegin(); err != nil {
		return err
	}
	e.publishing.Lock()
	defer e.publishing.Unlock()
	d := difference{e: e, live: map[string]int64{}, own: map[string]int64{}}
	rev, err := e.read(e.ctx, e.opts.Prefix, 0, func(kv *mvccpb.KeyValue) error {
		d.look(kv)
		return nil
	})
	if err != nil {
		return err
	}
	for _, pd := range e.allPending() {
		<-pd.resolved // does not depend on publication; bounded by RequestTimeout
		if 0 < pd.revision && pd.revision <= rev {
			d.addOwn(pd)
		}
	}
	d.addChanged()
	d.addDeletions(rev)
	slices.SortStableFunc(d.out, func(a, b published) int { return cmp.Compare(a.p.Writes[0].Revision, b.p.Writes[0].Revision) })
	e.opts.Logger.Warn("etcd: history was compacted before it was read; watches see the sum of what changed", "to", rev, "changes", len(d.out))
	e.floor = max(e.floor, rev)
	e.publishHeld(d.out, rev)
	return nil
}

// allPending returns the transactions of our own that are under way or not published.
func (e *Engine) allPending() (out []*pending) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, list := range e.pending {
		out = append(out, list...)
	}
	return out
}

// difference collects what lies between what is published and what etcd holds.
type difference struct {
	e       *Engine
	live    map[string]int64   // creation revision of every key that etcd has
	changed []*mvccpb.KeyValue // those that are not published
	own     map[string]int64   // by key: newest revision that our own transactions gave it
	out     []published
}

// look compares one key that etcd has.
func (d *difference) look(kv *mvccpb.KeyValue) {
	d.live[string(kv.Key)] = kv.CreateRevision
	if rev, _ := d.e.host.Current(&store.Write{Key: string(kv.Key)}); rev != kv.ModRevision {
		d.changed = append(d.changed, kv)
	}
}

// addOwn takes one of our own transactions that happened: its very proposal is published.
func (d *difference) addOwn(pd *pending) {
	for i := range pd.p.Writes {
		w := &pd.p.Writes[i]
		w.Revision = pd.revision
		if !w.Delete {
			w.CreateRevision = d.createdBy(w)
			d.e.keys[w.Key] = struct{}{}
		}
		d.own[w.Key] = max(d.own[w.Key], pd.revision)
	}
	d.out = append(d.out, published{p: pd.p, own: pd})
}

// createdBy finds the creation revision of what one of our own writes left.
func (d *difference) createdBy(w *store.Write) int64 {
	if w.Expect == 0 {
		return w.Revision
	}
	if created, ok := d.live[w.Key]; ok && created <= w.Revision {
		return created
	}
	_, created := d.e.host.Current(w)
	return created
}

// addChanged adds the last states that are not published, and not by our own transactions either.
func (d *difference) addChanged() {
	for _, kv := range d.changed {
		key := string(kv.Key)
		if d.own[key] == kv.ModRevision {
			continue
		}
		if rev, created := d.e.host.Current(&store.Write{Key: key}); rev != 0 && created != kv.CreateRevision {
			d.addWrite(store.Write{Key: key, Delete: true, Revision: kv.CreateRevision - 1})
		}
		d.addWrite(store.Write{Key: key, Value: kv.Value, Revision: kv.ModRevision, CreateRevision: kv.CreateRevision})
	}
}

// addDeletions finds the keys that etcd no longer has.
func (d *difference) addDeletions(rev int64) {
	for key := range d.e.keys {
		if _, ok := d.live[key]; !ok {
			d.addWrite(store.Write{Key: key, Delete: true, Revision: rev})
		}
	}
}

func (d *difference) addWrite(w store.Write) {
	d.out = append(d.out, published{p: &store.Proposal{Writes: []store.Write{w}}})
}
