package api

import (
	"context"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"

	"knarr/store"
)

// Outcome receives what a write of one kind has stored, so that the answer can be made from the record that everybody reads. Where one is
// in the context, Storage leaves the object that it was given for the result empty: it is for callers of REST storage
// types that hand the result on without looking at it.
type Outcome struct {
	// Kind is whose write is meant; writes of other kinds under the same context are none of its business.
	Kind *Kind
	// Deletion says that the caller deletes an object; then a deletion reports, too, and the object that was given for it gets no more
	// than the identity of what is gone. What the caller reads of the object before shares all below its own fields with what everybody reads: upstream's
	// deletion sets fields of its metadata, and no more.
	Deletion bool
	// Reads says that the caller of an update only reads what it is given to update, which then shares all with the object that everybody reads. Such is a
	// custom resource's; it must not be set for other kinds. Where there is a Check, what it is given has no managed fields, which are costly to read off a
	// tree and would be, several times.
	Reads bool
	// Before is the whole object that an update which only reads is made of.
	Before runtime.Object
	// Check, where there is one, is asked about each try of an update at its end, and about a create: obj is what would be stored, old what is, nil for
	// nothing. Both are the try's own and no copies: Check may set the managed fields of obj, and else only read. Its error ends the write.
	Check func(ctx context.Context, obj, old runtime.Object) error
	// Record is what is stored after the write; nil until it succeeded.
	Record *store.Record
	// looked is what a deletion read last of a record, lookedAt that record.
	looked   runtime.Object
	lookedAt *store.Record
	// message is what the store got of the record's object; see Message.
	message []byte
}

type outcomeKey struct{}

// WithOutcome gives a context in which a write of the outcome's kind reports to it.
func WithOutcome(ctx context.Context, o *Outcome) context.Context {
	return context.WithValue(ctx, outcomeKey{}, o)
}

// outcome is who waits for the result of a write of the kind, nil if nobody does.
func (s *Storage) outcome(ctx context.Context) *Outcome {
	if o, _ := ctx.Value(outcomeKey{}).(*Outcome); o != nil && o.Kind == s.kind {
		return o
	}
	return nil
}

// look gives what a read, or who is to allow a deletion, gets of a record: a private copy, or what the deletion of an Outcome may share.
func (s *Storage) look(ctx context.Context, rec *store.Record) (runtime.Object, error) {
	o := s.outcome(ctx)
	form, ok := s.kind.form.(*hubForm)
	if !ok || o == nil || !o.Deletion {
		return s.kind.form.fromStored(rec)
	}
	if o.lookedAt != rec {
		obj, err := form.shared(rec)
		if err != nil {
			return nil, err
		}
		o.looked, o.lookedAt = obj, rec
	}
	return o.looked, nil
}

// gone hands a deleted object to who deleted it.
func (s *Storage) gone(ctx context.Context, out runtime.Object, rec *store.Record) error {
	o := s.outcome(ctx)
	if o == nil || !o.Deletion || out == nil {
		return s.into(out, rec)
	}
	from, err := meta.Accessor(rec.Object)
	if err != nil {
		return err
	}
	to, err := meta.Accessor(out)
	if err != nil {
		return err
	}
	to.SetName(from.GetName())
	to.SetNamespace(from.GetNamespace())
	to.SetUID(from.GetUID())
	to.SetResourceVersion(from.GetResourceVersion())
	o.Record = rec
	return nil
}

// result hands a record to who wrote it: as a record where an outcome waits for it, else as an object in out. made is what the record is made of; it is
// empty where that was there before.
func (s *Storage) result(ctx context.Context, out runtime.Object, rec *store.Record, made encoded) error {
	if o := s.outcome(ctx); o != nil {
		o.Record, o.message = rec, nil
		if made.same {
			o.message = ownBytes(made.data)
		}
		return nil
	}
	return s.into(out, rec)
}
