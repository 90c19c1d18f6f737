package api

import (
	"context"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apiserver/pkg/storage"

	"knarr/store"
)

// Shared reports whether other servers write this kind's objects, too. Where they do not, Fresh does nothing.
func (k *Kind) Shared() bool { return k.store.Shared() }

// Fresh makes sure that the table holds what a read at resourceVersion must see: for "" everything that any server was told is
// written before the call, for "0" nothing in particular, for a revision that one. Where nobody else writes the store it returns at
// once; else concurrent calls share their round trips. It does not judge resourceVersion, which the read itself does. Errors are API
// status errors: 503 where the store does not answer, 504 where ctx ended.
func (k *Kind) Fresh(ctx context.Context, resourceVersion string) error {
	if !k.store.Shared() || resourceVersion == "0" {
		return nil
	}
	if resourceVersion != "" {
		want, err := storage.APIObjectVersioner{}.ParseResourceVersion(resourceVersion)
		if err != nil || want <= uint64(k.store.Revision()) {
			return nil //nolint:nilerr // the read says what is wrong with it
		}
	}
	return k.sync(ctx)
}

func (k *Kind) sync(ctx context.Context) error {
	err := k.store.Sync(ctx)
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return apierrors.NewTimeoutError("the store's newest state was not reached in time", 1)
	}
	return unavailable(err)
}

// subject is the record that a write works on. The write is decided by the store, by the record's revision; a refusal, or the finding
// that nothing needs to be written, is decided here and must not rest on a record that another server has replaced.
type subject struct {
	storage *Storage
	key     string
	rec     *store.Record // nil: absent
	sure    bool          // the record was the newest at some time since the request came
}

func (s *Storage) subject(key string) *subject {
	return &subject{storage: s, key: key, rec: s.kind.Table.Get(key), sure: !s.kind.Shared()}
}

// replace takes the record that a conflict showed.
func (u *subject) replace(rec *store.Record) { u.rec, u.sure = rec, true }

// outdated says that there is another record by now, which the subject then has. Asked once, it knows.
func (u *subject) outdated(ctx context.Context) (bool, error) {
	if u.sure {
		return false, nil
	}
	if err := u.storage.kind.sync(ctx); err != nil {
		return false, err
	}
	old := u.rec
	u.replace(u.storage.kind.Table.Get(u.key))
	return u.rec != old, nil
}
