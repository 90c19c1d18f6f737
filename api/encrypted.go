package api

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/apiserver/pkg/storage/value"

	"knarr/store"
)

// rewriters bounds the objects that Rewrite writes at once: enough that a commit of the store serves many.
const rewriters = 32

// errEnough ends a look at stored values; it never leaves this file.
var errEnough = errors.New("seen enough")

// StoredKeys counts the stored objects of the kind by the key that they are encrypted with, written provider/key; "" counts those that are
// not encrypted.
func (k *Kind) StoredKeys(ctx context.Context) (map[string]int, error) {
	out := map[string]int{}
	err := k.store.ReadStored(ctx, k.prefix, func(_ string, data []byte) error {
		out[encryptedWith(data)]++
		return nil
	})
	return out, err
}

// encryptedWith reads upstream's envelope, k8s:enc:PROVIDER:VERSION:KEY:.
func encryptedWith(data []byte) string {
	const mark, longest = "k8s:enc:", 256 // bytes
	head := string(data[:min(len(data), longest)])
	if !strings.HasPrefix(head, mark) {
		return ""
	}
	if parts := strings.SplitN(head[len(mark):], ":", 4); len(parts) == 4 {
		return parts[0] + "/" + parts[2]
	}
	return "unknown"
}

// Rewrite writes every object anew that is not stored as it would be now: encrypted with another key than the first. It returns how many
// it wrote, and only when nothing is left. Objects are changed by nothing but their resourceVersion. It may be broken off at any time and
// called again. Called after the keys have changed, it first waits for the writes under way.
func (k *Kind) Rewrite(ctx context.Context) (int, error) {
	if k.transformer == nil {
		return 0, nil
	}
	k.store.Settle()
	var written atomic.Int64
	for {
		stale, err := k.staleKeys(ctx)
		if err != nil || len(stale) == 0 {
			return int(written.Load()), err
		}
		g, ctx := errgroup.WithContext(ctx)
		g.SetLimit(rewriters)
		for _, key := range stale {
			g.Go(func() error {
				done, err := k.rewrite(ctx, key)
				if done {
					written.Add(1)
				}
				return err
			})
		}
		if err := g.Wait(); err != nil {
			return int(written.Load()), err
		}
	}
}

func (k *Kind) staleKeys(ctx context.Context) (stale []string, err error) {
	err = k.store.ReadStored(ctx, k.prefix, func(key string, data []byte) error {
		_, old, err := k.transformer.TransformFromStorage(ctx, data, value.DefaultContext(key))
		if old {
			stale = append(stale, key)
		}
		return err
	})
	return stale, err
}

// rewrite writes one object as it is; one that changes meanwhile is encrypted anew by that.
func (k *Kind) rewrite(ctx context.Context, key string) (done bool, err error) {
	rec := k.Table.Get(key)
	if rec == nil {
		return false, nil
	}
	op := store.Op{Table: k.Table, Key: key, Object: rec.Object.DeepCopyObject(), Expect: rec.Revision}
	if !rec.Expires.IsZero() {
		op.TTL = max(time.Until(rec.Expires), time.Second)
	}
	_, err = k.store.Txn(ctx, op)
	var conflict *store.ConflictError
	if errors.As(err, &conflict) {
		return false, nil
	}
	return err == nil, err
}

// stale says that a record's stored bytes are not what would be written now, so that even an update that changes nothing has to write.
func (k *Kind) stale(ctx context.Context, rec *store.Record) bool {
	if k.transformer == nil {
		return false
	}
	old := false
	err := k.store.ReadStored(ctx, rec.Key, func(key string, data []byte) error {
		if key == rec.Key {
			_, stale, err := k.transformer.TransformFromStorage(ctx, data, value.DefaultContext(key))
			old = stale && err == nil
		}
		return errEnough // a longer key comes after it
	})
	return old && errors.Is(err, errEnough)
}
