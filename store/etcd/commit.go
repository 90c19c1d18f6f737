package etcd

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"knarr/store"
)

// pending is a transaction of our own between its request and its publication.
type pending struct {
	p        *store.Proposal
	resolved chan struct{} // closed when etcd has answered, or the answer is lost
	revision int64         // that etcd gave; 0: refused or unknown. Set before resolved is closed.
	done     chan struct{} // closed when published
}

func (pd *pending) key() string { return pd.p.Writes[0].Key }

// unavailable is the error of an etcd that does not do what it is asked.
func (e *Engine) unavailable(err error) error {
	hint := "writes work again as soon as it does"
	if errors.Is(err, rpctypes.ErrNoSpace) {
		hint = "its database is full: raise its quota or defragment it, then disarm its alarm"
	}
	return &store.UnavailableError{Err: fmt.Errorf("etcd at %s: %w (%s)", strings.Join(e.client.Endpoints(), ", "), err, hint)}
}

// refusedByLimits says that etcd will never take the request.
func refusedByLimits(err error) bool {
	return errors.Is(err, rpctypes.ErrTooManyOps) || errors.Is(err, rpctypes.ErrRequestTooLarge) || errors.Is(err, rpctypes.ErrDuplicateKey)
}

// Commit implements store.Engine. Once asked, etcd's answer is waited for, for RequestTimeout at most.
func (e *Engine) Commit(ctx context.Context, p *store.Proposal) error {
	if err := e.checkKeys(p); err != nil {
		return err
	}
	e.open()
	pd, err := e.register(p)
	if err != nil {
		return err
	}
	defer e.commits.Done()
	resp, err := e.request(context.WithoutCancel(ctx), p)
	if err != nil {
		e.settle(pd, 0)
		if refusedByLimits(err) {
			return fmt.Errorf("etcd takes no such transaction (its limits are 1.5 MiB and 128 operations unless set otherwise): %w", err)
		}
		return e.unavailable(err)
	}
	if !resp.Succeeded {
		e.settle(pd, 0)
		return e.refused(ctx, p, resp)
	}
	if err := e.checkForward(resp.Header.Revision); err != nil {
		e.settle(pd, 0)
		return err
	}
	e.settle(pd, resp.Header.Revision)
	return e.awaitOwn(pd)
}

// checkForward finds an etcd whose revisions went back. Called before settle: until then the watch cannot have published the revision.
func (e *Engine) checkForward(rev int64) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if rev > e.published {
		return nil
	}
	return e.unavailable(fmt.Errorf("it gave revision %d after %d; was it restored from a backup? Restart every knarr server", rev, e.published))
}

func (e *Engine) checkKeys(p *store.Proposal) error {
	for i := range p.Writes {
		if !strings.HasPrefix(p.Writes[i].Key, e.opts.Prefix) {
			return fmt.Errorf("etcd: key %s does not lie under the engine's prefix %s", p.Writes[i].Key, e.opts.Prefix)
		}
	}
	return nil
}

// register makes a proposal known to the watch, before etcd can know it.
func (e *Engine) register(p *store.Proposal) (*pending, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closing {
		return nil, store.ErrClosed
	}
	e.commits.Add(1)
	pd := &pending{p: p, resolved: make(chan struct{}), done: make(chan struct{})}
	e.pending[pd.key()] = append(e.pending[pd.key()], pd)
	return pd, nil
}

// settle notes etcd's answer. A transaction without a revision is forgotten: if it happened, it is published like another server's.
func (e *Engine) settle(pd *pending, rev int64) {
	if rev == 0 {
		e.mu.Lock()
		e.forgetLocked(pd)
		e.mu.Unlock()
	}
	pd.revision = rev
	close(pd.resolved)
}

func (e *Engine) forgetLocked(pd *pending) {
	rest := slices.DeleteFunc(e.pending[pd.key()], func(other *pending) bool { return other == pd })
	if len(rest) == 0 {
		delete(e.pending, pd.key())
		return
	}
	e.pending[pd.key()] = rest
}

// request asks etcd. A lease that has gone in the meantime is replaced once.
func (e *Engine) request(ctx context.Context, p *store.Proposal) (*clientv3.TxnResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, e.opts.RequestTimeout)
	defer cancel()
	for again := true; ; again = false {
		lease, err := e.leaseOf(ctx, p)
		if err != nil {
			return nil, err
		}
		compare := make([]clientv3.Cmp, len(p.Writes))
		then := make([]clientv3.Op, len(p.Writes))
		look := make([]clientv3.Op, len(p.Writes))
		for i := range p.Writes {
			w := &p.Writes[i]
			compare[i] = clientv3.Compare(clientv3.ModRevision(w.Key), "=", w.Expect)
			look[i] = clientv3.OpGet(w.Key, clientv3.WithKeysOnly())
			switch {
			case w.Delete:
				then[i] = clientv3.OpDelete(w.Key)
			case w.Expires.IsZero():
				then[i] = clientv3.OpPut(w.Key, string(w.Value))
			default:
				then[i] = clientv3.OpPut(w.Key, string(w.Value), clientv3.WithLease(lease))
			}
		}
		resp, err := e.client.Txn(ctx).If(compare...).Then(then...).Else(look...).Commit()
		if again && errors.Is(err, rpctypes.ErrLeaseNotFound) {
			e.leases.forget(lease)
			continue
		}
		return resp, err
	}
}

// leaseOf returns the lease for a proposal's expiring writes, by the latest of them; 0 when none expires.
func (e *Engine) leaseOf(ctx context.Context, p *store.Proposal) (clientv3.LeaseID, error) {
	var last time.Time
	for i := range p.Writes {
		if at := p.Writes[i].Expires; at.After(last) {
			last = at
		}
	}
	if last.IsZero() {
		return 0, nil
	}
	return e.leases.get(ctx, time.Until(last))
}

// refused finds the write that did not match, and waits until the store knows why.
func (e *Engine) refused(ctx context.Context, p *store.Proposal, resp *clientv3.TxnResponse) error {
	index, reason := 0, resp.Header.Revision
	for i, r := range resp.Responses {
		found := int64(0)
		if kvs := r.GetResponseRange().Kvs; len(kvs) > 0 {
			found = kvs[0].ModRevision
		}
		if found != p.Writes[i].Expect {
			index = i
			if found != 0 { // of an absent key only a bound is known
				reason = found
			}
			break
		}
	}
	if err := e.await(ctx, reason); err != nil {
		return err
	}
	return &store.RefusedError{Index: index}
}

// awaitOwn waits until a transaction that happened is published.
func (e *Engine) awaitOwn(pd *pending) error {
	timer := time.NewTimer(e.opts.RequestTimeout)
	defer timer.Stop()
	select {
	case <-pd.done:
		return nil
	case <-timer.C:
		return e.unavailable(fmt.Errorf("the write was made with revision %d, but the watch has not delivered it within %s", pd.revision, e.opts.RequestTimeout))
	}
}
