// Package store is the revisioned object store: it keeps every object of a cluster once, decoded and immutable, in memory, and lets
// all parts of the process read it; an Engine keeps the encoded form safe.
//
// # What holds
//
//   - There is one revision counter for the whole store. It only grows and never repeats, also across crashes. A revision is an object's
//     resourceVersion. Failed transactions and unclean stops leave gaps.
//
//   - Records are immutable. Options.Debug finds who writes to one.
//
//   - Txn returns after the write is as safe as the table's Class says and after everybody can see it. Publication is in
//     revision order, under one lock: trees, indexes, event windows and the expiry queue change together, then the revision
//     becomes visible, then watches are woken. So whoever was told a revision finds everything up to it in every table and index.
//
//   - A Snapshot is a copy-on-write copy of a table's B-tree: taken in constant time, never changing, and never in the way of writers.
//     While a table does not change, all callers get the same one.
//
//   - A Watch is a cursor into its table's window of recent events; it has no queue and no goroutine. What falls out of the window before a
//     watch has read it makes that watch Gone; never is there a gap or a repetition.
//
//   - Windows are memory: after a restart a watch of a Durable table goes on if nothing in the table changed after the revision it asks for,
//     else it is Gone (a kube-apiserver that was restarted answers the same); a Lossy one goes on only after a clean stop.
//
// # Outline
//
// Txn clears the resourceVersion of each object, encodes it, and hands a Proposal to the Engine, which compares, assigns revisions,
// makes it safe, and calls Publish (publish.go). Readers take Store.mu shared for as long as one tree lookup or one copy of a batch of
// events takes. Store.gate is held shared by transactions and exclusively by those who need that none is under way (Close,
// CloseTable). Lock order: gate, mu, watchGroup.mu. The engine's locks come between gate and mu.
//
// Watches of a table that ask for the same prefix share a watchGroup: one channel to close wakes all of them, and a change that no prefix of a
// group matches wakes nobody. A group remembers the last event that matched and the last matching event that was evicted; a
// cursor that has seen the former may jump to the end, a cursor before the latter is Gone. So a watch of a quiet prefix in a busy
// table neither wakes up nor falls out.
//
// One goroutine (keeper.go) sleeps until the next expiry, window trim or pin end; with none of them pending it sleeps for good.
//
// # Tried and dropped
//
// A lock per table: readers of several tables could then see a transaction half, and with one lock held for a few microseconds per commit nothing
// was gained. Compares against writes in flight: a caller cannot know the revision of an unpublished write, so the engine makes
// a second writer of the same key wait for the first instead, and a failed write never takes others with it.
package store
