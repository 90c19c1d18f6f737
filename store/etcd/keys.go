package etcd

import (
	"context"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Get reads one key outside of the objects' prefix, for small things that servers tell each other. It returns nil and 0 when there is none.
// Errors: *store.UnavailableError.
func (e *Engine) Get(ctx context.Context, key string) (value []byte, revision int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, e.opts.RequestTimeout)
	defer cancel()
	resp, err := e.client.Get(ctx, key)
	if err != nil {
		return nil, 0, e.unavailable(err)
	}
	if len(resp.Kvs) == 0 {
		return nil, 0, nil
	}
	return resp.Kvs[0].Value, resp.Kvs[0].ModRevision, nil
}

// Put writes such a key if it is still at the revision that Get gave, and says whether it was. Errors: *store.UnavailableError.
func (e *Engine) Put(ctx context.Context, key string, value []byte, expect int64) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, e.opts.RequestTimeout)
	defer cancel()
	resp, err := e.client.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", expect)).Then(clientv3.OpPut(key, string(value))).Commit()
	if err != nil {
		return false, e.unavailable(err)
	}
	return resp.Succeeded, nil
}

// Read implements store.RawEngine.
func (e *Engine) Read(ctx context.Context, prefix string, fn func(key string, value []byte) error) error {
	_, err := e.read(ctx, prefix, 0, func(kv *mvccpb.KeyValue) error { return fn(string(kv.Key), kv.Value) })
	return err
}
