package store

import (
	"context"
	"time"
)

// Engine decides, keeps and orders transactions; the Store gives it decoded objects, memory, watches and indexes on top.
//
// The one rule that lets very different engines fit: the engine decides whether a transaction happens and when it becomes
// visible, and it calls Host.Publish for everything that becomes visible, in revision order, its own process's writes and
// others' alike.
//
//   - An embedded engine (store/pebble) takes the store's memory as the authority for compares (Host.Current, plus its own knowledge of
//     writes in flight), assigns revisions itself, makes a group of transactions durable with one sync, publishes the group.
//   - A shared engine (etcd: many servers on one cluster) sends Write.Expect as a compare on the key's mod revision; etcd decides and
//     gives the revision. Commit then waits until the engine's single watch of the cluster has delivered that revision, and
//     publishes what the watch delivers: for its own transaction the very *Proposal that Commit was given (so that the object is not
//     decoded again), for those of other servers a Proposal with Write.Value only, which the store decodes. On a
//     conflict Commit returns only after the conflicting revision was published, so that the store's memory holds the
//     current record. Load holds publication back, reads at the revision published last, and lets it go on after done.
//     One etcd transaction has one revision for all its keys: such an engine gives all Writes of a Proposal that revision (the
//     store keeps a proposal's events together, so resuming after it stays exact). Expiry: every server proposes the
//     deletion with Expect; one wins, the others see a conflict and stop.
type Engine interface {
	// Start is called once, before everything else. It returns the newest revision; every revision assigned later is larger.
	Start(ctx context.Context, host Host) (revision int64, err error)
	// Load calls fn for every entry under the prefix, in key order, and then, if there was no error, done once: before anything newer under the
	// prefix is published, so that the store sees every change either in an entry or by Publish. history is the revision from
	// which on that is so: a watch from an older revision is Gone. It is at least the revision of the last change; for a Lossy
	// table after an unclean stop it is larger than every revision given out before the stop. fn may keep nothing of
	// Entry.Value. Not called while this process has a transaction on the prefix under way.
	Load(ctx context.Context, prefix string, class Class, fn func(Entry) error, done func(history int64)) error
	// Commit decides the proposal and returns when it is published or refused. Errors: *RefusedError when an expectation does not
	// hold, *UnavailableError when the outcome is unknown or writes are not possible now, ErrClosed. Called concurrently.
	// An engine may publish a proposal later for which it returned *UnavailableError.
	Commit(ctx context.Context, p *Proposal) error
	// Close waits for commits under way, makes everything durable and frees all. Nothing is published afterwards.
	Close() error
}

// Host is what an engine may ask of and tell to its store.
type Host interface {
	// Current returns the published revision and creation revision of the write's key, zeros when absent.
	Current(w *Write) (revision, createRevision int64)
	// Publish makes proposals visible, in the given order. Revisions never go down, neither within a group nor from one call to the
	// next; calls never overlap. The engine has set Revision and CreateRevision of every Write.
	Publish(group []*Proposal)
}

// Entry is one stored object as an engine gives it back.
type Entry struct {
	Key                      string
	Value                    []byte
	Revision, CreateRevision int64
	Expires                  time.Time // zero: never
}

// Proposal is one transaction on its way through an engine: all of its writes happen, or none.
type Proposal struct {
	Writes []Write

	records []*Record // set by Publish, for Store.Txn
}

// Write is one operation of a Proposal.
type Write struct {
	Key    string
	Prefix string // of the table; an engine that publishes others' writes leaves it empty
	Class  Class
	Delete bool
	Value  []byte // encoded object; of a deletion empty
	Expect int64  // revision that the key must have; 0: absent
	// Expires is when the object goes by itself; zero: never. Kept with the value; the store does the deleting.
	Expires time.Time

	// Revision and CreateRevision are set by the engine. The create revision of a deletion is that of the deleted object.
	Revision, CreateRevision int64

	op *preparedOp // the store's own; nil for a write of another server
}

// RefusedError is Commit's answer when Writes[Index] did not find its expected revision.
type RefusedError struct{ Index int }

func (e *RefusedError) Error() string { return "an expected revision did not match" }
