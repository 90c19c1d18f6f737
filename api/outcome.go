package api

import (
	"context"

	"k8s.io/apimachinery/pkg/runtime"

	"knarr/store"
)

// Outcome receives what a write of one kind has stored, so that the answer can be made from the record that everybody reads. Where one is
// in the context, Storage leaves the object that it was given for the result empty: it is for callers of REST storage
// types that hand the result on without looking at it.
type Outcome struct {
	// Kind is whose write is meant; writes of other kinds under the same context are none of its business.
	Kind *Kind
	// Record is what is stored after the write; nil until it succeeded.
	Record *store.Record
}

type outcomeKey struct{}

// WithOutcome gives a context in which a write of the outcome's kind reports to it.
func WithOutcome(ctx context.Context, o *Outcome) context.Context {
	return context.WithValue(ctx, outcomeKey{}, o)
}

// result hands a record to who wrote it: as a record where an outcome waits for it, else as an object in out.
func (s *Storage) result(ctx context.Context, out runtime.Object, rec *store.Record) error {
	if o, _ := ctx.Value(outcomeKey{}).(*Outcome); o != nil && o.Kind == s.kind {
		o.Record = rec
		return nil
	}
	return s.into(out, rec)
}
