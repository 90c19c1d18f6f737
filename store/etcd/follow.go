package etcd

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"

	"knarr/store"
)

// compactedError says that etcd has dropped the history up to a revision.
type compactedError struct{ revision int64 }

func (e *compactedError) Error() string {
	return fmt.Sprintf("etcd has compacted its history up to revision %d", e.revision)
}

// follow is the engine's one watch of the cluster: it publishes everything, and connects again until Close.
func (e *Engine) follow() {
	defer e.running.Done()
	for pause := retryMin; e.ctx.Err() == nil; pause = min(2*pause, retryMax) {
		progress, err := e.stream()
		if e.ctx.Err() != nil {
			return
		}
		if progress {
			pause = retryMin
		}
		var compacted *compactedError
		if errors.As(err, &compacted) {
			if err = e.catchUp(compacted.revision); err == nil {
				continue
			}
		}
		e.opts.Logger.Warn("etcd: the watch broke, it goes on after a pause", "error", err, "pause", pause)
		select {
		case <-time.After(pause):
		case <-e.ctx.Done():
		}
	}
}

// catchUp goes on after a compaction: without the history that Start would have liked to read, or, when changes were missed, with a
// new list.
func (e *Engine) catchUp(compacted int64) error {
	e.publishing.Lock()
	e.mu.Lock()
	early := e.published < e.first
	e.mu.Unlock()
	if early {
		e.floor = max(e.floor, min(compacted, e.first))
		e.advance(e.floor)
	}
	e.publishing.Unlock()
	if early {
		return nil
	}
	return e.relist()
}

// stream follows one watch stream from the last published revision on until it breaks. It returns whether it was of use.
func (e *Engine) stream() (progress bool, err error) {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(e.ctx))
	defer cancel()
	w, err := pb.NewWatchClient(e.client.ActiveConnection()).Watch(ctx, grpc.MaxCallRecvMsgSize(maxMessage))
	if err != nil {
		return false, err
	}
	e.mu.Lock()
	next := e.published + 1
	e.mu.Unlock()
	err = w.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
		Key:            []byte(e.opts.Prefix),
		RangeEnd:       []byte(clientv3.GetPrefixRangeEnd(e.opts.Prefix)),
		StartRevision:  next,
		ProgressNotify: true,
		Fragment:       true,
	}}})
	if err != nil {
		return false, err
	}
	stopped := make(chan struct{})
	defer func() { cancel(); <-stopped }()
	go func() {
		defer close(stopped)
		e.sendProgressRequests(ctx, w)
	}()
	var rest []*mvccpb.Event // of a revision that may not be complete
	for {
		resp, err := w.Recv()
		switch {
		case err != nil:
			return progress, err
		case resp.CompactRevision > 0:
			return progress, &compactedError{resp.CompactRevision}
		case resp.Canceled:
			return progress, fmt.Errorf("etcd ended the watch: %s", resp.CancelReason)
		case resp.Created:
			continue
		}
		progress = true
		if rest, err = e.deliver(append(rest, resp.Events...), resp); err != nil {
			return progress, err
		}
	}
}

// sendProgressRequests sends what askProgress asks for. Only it sends on the stream.
func (e *Engine) sendProgressRequests(ctx context.Context, w pb.Watch_WatchClient) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-e.wantProgress:
			// An error ends Recv, too.
			_ = w.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}})
		}
	}
}

// deliver publishes complete revisions and returns the events of the last one if more of it may come.
func (e *Engine) deliver(events []*mvccpb.Event, resp *pb.WatchResponse) (rest []*mvccpb.Event, err error) {
	if len(events) == 0 { // a progress notification: everything up to the header's revision was delivered
		return nil, e.publish(nil, resp.Header.Revision)
	}
	if resp.Fragment {
		last := events[len(events)-1].Kv.ModRevision
		n := slices.IndexFunc(events, func(ev *mvccpb.Event) bool { return ev.Kv.ModRevision == last })
		events, rest = events[:n], slices.Clone(events[n:])
	}
	if len(events) == 0 {
		return rest, nil
	}
	n := 0 // events of the history before Start
	for n < len(events) && events[n].Kv.ModRevision <= e.first {
		n++
	}
	if n > 0 {
		e.noteHistory(events[:n])
	}
	if n == len(events) {
		return rest, nil
	}
	events = events[n:]
	return rest, e.publish(e.proposals(events), events[len(events)-1].Kv.ModRevision)
}

// noteHistory remembers deletions that happened before Start.
func (e *Engine) noteHistory(events []*mvccpb.Event) {
	e.publishing.Lock()
	defer e.publishing.Unlock()
	for _, ev := range events {
		if ev.Type == mvccpb.DELETE {
			e.noteDeletion(string(ev.Kv.Key), ev.Kv.ModRevision)
		}
	}
	e.advance(events[len(events)-1].Kv.ModRevision)
}

// proposals makes one proposal of each revision: our own where it is ours.
func (e *Engine) proposals(events []*mvccpb.Event) (out []published) {
	for len(events) > 0 {
		rev := events[0].Kv.ModRevision
		n := 1
		for n < len(events) && events[n].Kv.ModRevision == rev {
			n++
		}
		own := e.ownOf(string(events[0].Kv.Key), rev)
		out = append(out, published{own: own, p: proposalOf(events[:n], own)})
		events = events[n:]
	}
	return out
}

// published is a proposal on its way to the store; own is nil for another server's.
type published struct {
	p   *store.Proposal
	own *pending
}

// ownOf finds our own transaction of a revision, waiting for the answers of those under way that may be it.
func (e *Engine) ownOf(key string, rev int64) *pending {
	e.mu.Lock()
	candidates := slices.Clone(e.pending[key])
	e.mu.Unlock()
	for _, pd := range candidates {
		<-pd.resolved // bounded by RequestTimeout
		if pd.revision == rev {
			return pd
		}
	}
	return nil
}

// proposalOf turns the events of one revision into a proposal, or completes our own with the revisions.
func proposalOf(events []*mvccpb.Event, own *pending) *store.Proposal {
	rev := events[0].Kv.ModRevision
	if own == nil {
		p := &store.Proposal{Writes: make([]store.Write, len(events))}
		for i, ev := range events {
			p.Writes[i] = store.Write{
				Key: string(ev.Kv.Key), Delete: ev.Type == mvccpb.DELETE, Value: ev.Kv.Value, Revision: rev, CreateRevision: ev.Kv.CreateRevision,
			}
		}
		return p
	}
	created := make(map[string]int64, len(events))
	for _, ev := range events {
		created[string(ev.Kv.Key)] = ev.Kv.CreateRevision
	}
	for i := range own.p.Writes {
		w := &own.p.Writes[i]
		w.Revision, w.CreateRevision = rev, created[w.Key]
	}
	return own.p
}

// publish makes proposals visible, and moves on to a revision that is not below theirs.
func (e *Engine) publish(group []published, upTo int64) error {
	if upTo > e.first {
		if err := e.awaitBegin(); err != nil {
			return err
		}
	}
	e.publishing.Lock()
	defer e.publishing.Unlock()
	e.publishHeld(group, upTo)
	return nil
}

// awaitBegin waits until the store has taken note of Start's revision: nothing newer may be published before.
func (e *Engine) awaitBegin() error {
	e.publishing.Lock()
	e.advance(e.first)
	e.publishing.Unlock()
	select {
	case <-e.begin:
		return nil
	case <-e.ctx.Done():
		return e.ctx.Err()
	}
}

// publishHeld is publish with publishing held.
func (e *Engine) publishHeld(group []published, upTo int64) {
	e.mu.Lock()
	now := e.published
	e.mu.Unlock()
	if upTo <= now {
		return
	}
	proposals := make([]*store.Proposal, 0, len(group)+1)
	last := e.first
	created := map[string]int64{} // of keys written within this group
	for _, g := range group {
		for i := range g.p.Writes {
			e.note(&g.p.Writes[i], created)
			last = g.p.Writes[i].Revision
		}
		proposals = append(proposals, g.p)
	}
	if upTo > last { // a write to no table tells the store the revision
		proposals = append(proposals, &store.Proposal{Writes: []store.Write{{Delete: true, Revision: upTo}}})
	}
	if len(proposals) > 0 {
		e.host.Publish(proposals)
	}
	e.advance(upTo)
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, g := range group {
		if g.own != nil {
			e.forgetLocked(g.own)
			close(g.own.done)
		}
	}
}

// note keeps the engine's own books about a write, and completes a deletion with the creation revision of what it deletes.
func (e *Engine) note(w *store.Write, created map[string]int64) {
	if !w.Delete {
		e.keys[w.Key] = struct{}{}
		created[w.Key] = w.CreateRevision
		return
	}
	delete(e.keys, w.Key)
	e.noteDeletion(w.Key, w.Revision)
	var ok bool
	if w.CreateRevision, ok = created[w.Key]; !ok {
		_, w.CreateRevision = e.host.Current(w)
	}
}

// advance notes that everything up to a revision is published. Called with publishing held.
func (e *Engine) advance(rev int64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if rev > e.published {
		e.published = rev
		close(e.moved)
		e.moved = make(chan struct{})
	}
}
