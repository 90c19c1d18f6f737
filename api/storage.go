package api

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"syscall"
	"time"

	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/apiserver/pkg/storage"

	"knarr/store"
)

// Storage is the storage.Interface of one kind: what upstream's registry.Store and the REST types around it write through.
// Source: k8s.io/apiserver/pkg/storage/interfaces.go; behaviour as its etcd3 implementation.
//
// Every object that leaves or enters is a private copy. No lock is held while a caller's function runs: updates are
// optimistic, compared by revision in the store.
type Storage struct {
	kind      *Kind
	versioner storage.APIObjectVersioner
	newFunc   func() runtime.Object
	newList   func() runtime.Object
}

var _ storage.Interface = (*Storage)(nil)

// NewStorage gives the storage.Interface of a kind. newFunc and newList make empty objects of the version that the REST
// storage works with.
func NewStorage(kind *Kind, newFunc, newList func() runtime.Object) *Storage {
	return &Storage{kind: kind, newFunc: newFunc, newList: newList}
}

// Versioner implements storage.Interface.
func (s *Storage) Versioner() storage.Versioner { return s.versioner }

// key turns a REST storage's key (which lacks upstream's root) into the store's.
func (s *Storage) key(key string) (string, error) {
	if !strings.HasPrefix(key, "/") {
		key = "/" + key
	}
	for part := range strings.SplitSeq(key[1:], "/") {
		if part == "." || part == ".." {
			return "", fmt.Errorf("invalid key: %q", key)
		}
	}
	return KeyRoot + key, nil
}

// Create implements storage.Interface. ttl is in seconds; zero means that the object does not expire.
func (s *Storage) Create(ctx context.Context, key string, obj, out runtime.Object, ttl uint64) error {
	full, err := s.key(key)
	if err != nil {
		return err
	}
	if version, err := s.versioner.ObjectResourceVersion(obj); err == nil && version != 0 {
		return storage.ErrResourceVersionSetOnCreate
	}
	if o := s.outcome(ctx); o != nil && o.Check != nil {
		if err := o.Check(ctx, obj, nil); err != nil {
			return err
		}
	}
	if err := s.versioner.PrepareObjectForStorage(obj); err != nil {
		return fmt.Errorf("prepare object for storage: %w", err)
	}
	made, err := s.kind.form.toStored(obj, nil, s.outcome(ctx) != nil)
	if err != nil {
		return err
	}
	sealed, err := s.kind.codec.seal(ctx, full, made.data)
	if err != nil {
		return err
	}
	recs, err := s.commit(ctx, store.Op{Table: s.kind.Table, Key: full, Object: made.object, Value: sealed, TTL: seconds(ttl)})
	if err != nil {
		var conflict *store.ConflictError
		if errors.As(err, &conflict) {
			return storage.NewKeyExistsError(full, 0)
		}
		return err
	}
	return s.result(ctx, out, recs[0], made)
}

// commit writes and translates the store's own failures; a *store.ConflictError stays what it is.
func (s *Storage) commit(ctx context.Context, op store.Op) ([]*store.Record, error) {
	recs, err := s.kind.store.Txn(ctx, op)
	if err == nil {
		return recs, nil
	}
	var conflict *store.ConflictError
	if errors.As(err, &conflict) {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, storage.NewTimeoutError(op.Key, "request did not complete within requested timeout")
	}
	return nil, unavailable(err)
}

// unavailable gives the 503 of a store that takes no writes, with what to do about it.
func unavailable(err error) error {
	var u *store.UnavailableError
	switch {
	case errors.Is(err, syscall.ENOSPC):
		return apierrors.NewServiceUnavailable(fmt.Sprintf("the disk of the cluster's store is full: make room on it; reads go on, and writes will as soon as there is room (%v)", err))
	case errors.As(err, &u):
		return apierrors.NewServiceUnavailable(u.Error())
	case errors.Is(err, store.ErrClosed):
		return apierrors.NewServiceUnavailable("the server is shutting down")
	}
	return err
}

// into fills out with a private copy of the record's object.
func (s *Storage) into(out runtime.Object, rec *store.Record) error {
	if out == nil {
		return nil
	}
	obj, err := s.kind.form.fromStored(rec)
	if err != nil {
		return err
	}
	return assign(out, obj)
}

// assign puts the value of obj into the object that out points to.
func assign(out, obj runtime.Object) error {
	dst, src := reflect.ValueOf(out), reflect.ValueOf(obj)
	if dst.Kind() != reflect.Pointer || dst.Type() != src.Type() {
		return fmt.Errorf("cannot store a %T into a %T", obj, out)
	}
	dst.Elem().Set(src.Elem())
	return nil
}

// Get implements storage.Interface.
func (s *Storage) Get(ctx context.Context, key string, opts storage.GetOptions, out runtime.Object) error {
	full, err := s.key(key)
	if err != nil {
		return err
	}
	if err := s.kind.Fresh(ctx, opts.ResourceVersion); err != nil {
		return err
	}
	if err := s.kind.notNewer(s.versioner, opts.ResourceVersion); err != nil {
		return err
	}
	rec := s.kind.Table.Get(full)
	if rec != nil {
		obj, err := s.look(ctx, rec)
		if err != nil {
			return err
		}
		return assign(out, obj)
	}
	if opts.IgnoreNotFound {
		return runtime.SetZeroValue(out)
	}
	return storage.NewKeyNotFoundError(full, 0)
}

// notNewer fails when a client asks for a revision that the store has not reached.
func (k *Kind) notNewer(v storage.Versioner, resourceVersion string) error {
	if resourceVersion == "" || resourceVersion == "0" {
		return nil
	}
	want, err := v.ParseResourceVersion(resourceVersion)
	if err != nil {
		return apierrors.NewBadRequest(fmt.Sprintf("invalid resource version: %v", err))
	}
	if have := uint64(k.store.Revision()); want > have {
		return storage.NewTooLargeResourceVersionError(want, have, 1)
	}
	return nil
}

// Delete implements storage.Interface; out receives the deleted object with the revision of its deletion.
func (s *Storage) Delete(ctx context.Context, key string, out runtime.Object, preconditions *storage.Preconditions,
	validate storage.ValidateObjectFunc, _ runtime.Object, _ storage.DeleteOptions) error {
	full, err := s.key(key)
	if err != nil {
		return err
	}
	if o := s.outcome(ctx); o != nil && o.Deletion {
		o.Record = nil // of an update before: what counts is how this ends
	}
	for u := s.subject(full); ; {
		if err := s.mayDelete(ctx, u, preconditions, validate); err != nil {
			again, unsure := u.outdated(ctx)
			switch {
			case unsure != nil:
				return unsure
			case again:
				continue
			}
			return err
		}
		recs, err := s.commit(ctx, store.Op{Table: s.kind.Table, Key: full, Expect: u.rec.Revision})
		var conflict *store.ConflictError
		if errors.As(err, &conflict) {
			u.replace(conflict.Current)
			continue
		}
		if err != nil {
			return err
		}
		return s.gone(ctx, out, recs[0])
	}
}

// mayDelete checks what the caller asks of the object that is to go.
func (s *Storage) mayDelete(ctx context.Context, u *subject, preconditions *storage.Preconditions, validate storage.ValidateObjectFunc) error {
	if u.rec == nil {
		return storage.NewKeyNotFoundError(u.key, 0)
	}
	obj, err := s.look(ctx, u.rec)
	if err != nil {
		return err
	}
	if err := preconditions.Check(u.key, obj); err != nil {
		return err
	}
	return validate(ctx, obj)
}

// GuaranteedUpdate implements storage.Interface. A try that lost the race is made again on the newer object; a result
// equal to what is stored writes nothing and keeps the revision, as upstream's.
func (s *Storage) GuaranteedUpdate(ctx context.Context, key string, destination runtime.Object, ignoreNotFound bool,
	preconditions *storage.Preconditions, tryUpdate storage.UpdateFunc, _ runtime.Object) error {
	full, err := s.key(key)
	if err != nil {
		return err
	}
	for u := s.subject(full); ; {
		if err := ctx.Err(); err != nil {
			return storage.NewTimeoutError(full, "request did not complete within requested timeout")
		}
		made, ttl, err := s.try(ctx, full, u.rec, ignoreNotFound, preconditions, tryUpdate)
		idle := err == nil && u.rec != nil && s.unchanged(made, u.rec) && !s.kind.stale(ctx, u.rec)
		if err != nil || idle {
			again, unsure := u.outdated(ctx)
			switch {
			case unsure != nil:
				return unsure
			case again:
				continue
			case err != nil:
				return err
			}
			return s.result(ctx, destination, u.rec, encoded{})
		}
		sealed, err := s.kind.codec.seal(ctx, full, made.data)
		if err != nil {
			return err
		}
		op := store.Op{Table: s.kind.Table, Key: full, Object: made.object, Value: sealed, TTL: ttl}
		if u.rec != nil {
			op.Expect = u.rec.Revision
		}
		recs, err := s.commit(ctx, op)
		var conflict *store.ConflictError
		if errors.As(err, &conflict) {
			u.replace(conflict.Current)
			continue
		}
		if err != nil {
			return err
		}
		return s.result(ctx, destination, recs[0], made)
	}
}

// try runs one round of an update and gives the object to store, with its plain encoding, and the time it has left to live
// (zero: for ever).
func (s *Storage) try(ctx context.Context, key string, rec *store.Record, ignoreNotFound bool, preconditions *storage.Preconditions,
	tryUpdate storage.UpdateFunc) (encoded, time.Duration, error) {
	current, res, left, err := s.current(ctx, key, rec, ignoreNotFound)
	if err != nil {
		return encoded{}, 0, err
	}
	if err := preconditions.Check(key, current); err != nil {
		return encoded{}, 0, err
	}
	updated, newTTL, err := tryUpdate(current, res)
	if err != nil {
		return encoded{}, 0, err
	}
	if o := s.outcome(ctx); o != nil && o.Check != nil {
		if err := o.Check(ctx, updated, current); err != nil {
			return encoded{}, 0, err
		}
	}
	if err := s.versioner.PrepareObjectForStorage(updated); err != nil {
		return encoded{}, 0, fmt.Errorf("prepare object for storage: %w", err)
	}
	var old runtime.Object
	if rec != nil {
		old = rec.Object
	}
	made, err := s.kind.form.toStored(updated, old, s.outcome(ctx) != nil)
	if err != nil {
		return encoded{}, 0, err
	}
	if newTTL != nil {
		left = seconds(*newTTL)
	}
	return made, left, nil
}

// current gives a private copy of the object to update (or, where the caller only reads it, itself), or an empty one where the caller accepts absence.
func (s *Storage) current(ctx context.Context, key string, rec *store.Record, ignoreNotFound bool) (runtime.Object, storage.ResponseMeta, time.Duration, error) {
	if rec == nil {
		if !ignoreNotFound {
			return nil, storage.ResponseMeta{}, 0, storage.NewKeyNotFoundError(key, 0)
		}
		if o := s.outcome(ctx); o != nil {
			o.Before = nil // of a try before
		}
		return s.newFunc(), storage.ResponseMeta{}, 0, nil
	}
	obj, err := s.given(ctx, rec)
	if err != nil {
		return nil, storage.ResponseMeta{}, 0, err
	}
	res := storage.ResponseMeta{ResourceVersion: uint64(rec.Revision)}
	var left time.Duration
	if !rec.Expires.IsZero() {
		left = max(time.Until(rec.Expires), time.Second)
		res.TTL = int64(left / time.Second)
	}
	return obj, res, left, nil
}

// unchanged reports whether an update would store what is stored already.
func (s *Storage) unchanged(made encoded, rec *store.Record) bool {
	if s.kind.codec.transformer == nil && !rec.EncodedAs(made.data) {
		return false
	}
	m, err := meta.Accessor(made.object)
	if err != nil {
		return false
	}
	m.SetResourceVersion(strconv.FormatInt(rec.Revision, 10))
	same := apiequality.Semantic.DeepEqual(made.object, rec.Object)
	m.SetResourceVersion("")
	return same
}

func seconds(ttl uint64) time.Duration { return time.Duration(ttl) * time.Second }

// Watch implements storage.Interface.
func (s *Storage) Watch(ctx context.Context, key string, opts storage.ListOptions) (watch.Interface, error) {
	prefix, err := s.listKey(key, opts.Recursive)
	if err != nil {
		return nil, err
	}
	if err := s.kind.Fresh(ctx, opts.ResourceVersion); err != nil {
		return nil, err
	}
	return s.watch(ctx, prefix, opts)
}

// listKey gives the key prefix that a list or watch covers; an exact key when not recursive.
func (s *Storage) listKey(key string, recursive bool) (string, error) {
	full, err := s.key(key)
	if err == nil && recursive && !strings.HasSuffix(full, "/") {
		full += "/"
	}
	return full, err
}

// Stats implements storage.Interface.
func (s *Storage) Stats(context.Context) (storage.Stats, error) {
	return storage.Stats{ObjectCount: int64(s.kind.Table.Snapshot().Len())}, nil
}

// ReadinessCheck implements storage.Interface: a table is loaded before it is handed out.
func (s *Storage) ReadinessCheck() error { return nil }

// RequestWatchProgress implements storage.Interface: a watch here is never behind its table.
func (s *Storage) RequestWatchProgress(context.Context) error { return nil }

// GetCurrentResourceVersion implements storage.Interface.
func (s *Storage) GetCurrentResourceVersion(ctx context.Context) (uint64, error) {
	if err := s.kind.Fresh(ctx, ""); err != nil {
		return 0, err
	}
	return uint64(s.kind.store.Revision()), nil
}

// EnableResourceSizeEstimation implements storage.Interface; sizes serve upstream's etcd lists, which we do not make.
func (s *Storage) EnableResourceSizeEstimation(storage.KeysFunc) error { return nil }

// CompactRevision implements storage.Interface: there is no compaction.
func (s *Storage) CompactRevision() int64 { return 0 }
