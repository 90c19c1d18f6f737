package etcd

import (
	"context"
	"strconv"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// compactKey is upstream's: its version is the logical time of compactions, its value the revision compacted to.
const compactKey = "compact_rev_key"

// compact compacts etcd's history every CompactEvery, taking turns with all other servers, upstream's included: who advances the key
// compacts to the revision that it saw one interval before.
func (e *Engine) compact() {
	defer e.running.Done()
	ticker := time.NewTicker(e.opts.CompactEvery)
	defer ticker.Stop()
	var turn, rev int64
	for {
		select {
		case <-e.ctx.Done():
			return
		case <-ticker.C:
		}
		e.askProgress() // so that a quiet prefix does not fall behind the compactions
		var err error
		if turn, rev, err = e.compactTurn(turn, rev); err != nil && e.ctx.Err() == nil {
			e.opts.Logger.Warn("etcd: compaction failed, it is tried again", "error", err, "after", e.opts.CompactEvery)
		}
	}
}

// compactTurn does one turn: turn is the key's version as last seen, rev the revision then. It returns both anew.
func (e *Engine) compactTurn(turn, rev int64) (newTurn, newRev int64, err error) {
	ctx, cancel := context.WithTimeout(e.ctx, e.opts.RequestTimeout)
	defer cancel()
	resp, err := e.client.Txn(ctx).
		If(clientv3.Compare(clientv3.Version(compactKey), "=", turn)).
		Then(clientv3.OpPut(compactKey, strconv.FormatInt(rev, 10))).
		Else(clientv3.OpGet(compactKey)).
		Commit()
	if err != nil {
		return turn, rev, err
	}
	newRev = resp.Header.Revision
	if !resp.Succeeded {
		if kvs := resp.Responses[0].GetResponseRange().Kvs; len(kvs) > 0 {
			newTurn = kvs[0].Version
		}
		return newTurn, newRev, nil
	}
	if rev > 0 {
		_, err = e.client.Compact(ctx, rev)
	}
	return turn + 1, newRev, err
}
