// Package etcd is the store's engine of many machines: an external etcd, on which any number of knarr servers (and upstream's API
// servers) work at the same time.
//
// Keys and values are upstream's own, with nothing added: the value is what the table's codec gives, revision and creation revision
// are etcd's mod and create revision, so the store's revision is etcd's, and all writes of one transaction share one. An etcd that
// kube-apiserver wrote can be opened, and the reverse. Both classes of tables are durable.
//
// # How a write goes
//
// Commit registers the proposal, then asks etcd in one transaction: compare every key's mod revision, then write. etcd decides. The one watch
// of the prefix (follow.go) delivers every revision, own ones included, and publishes them in that order. Before it publishes a
// revision whose first key has transactions of our own under way, it waits for their answers: so it knows whether the revision is ours, and
// publishes the very proposal. Commit returns after that. A refused Commit returns after what refused it was published.
//
// # The watch
//
// It speaks etcd's gRPC protocol itself, because clientv3's watch buffers without bound for a slow reader: here nothing is read
// from the connection while the store is busy, and etcd keeps the rest. One revision that came in fragments is held together; more is not
// kept. When the stream breaks (restart, change of leader, a member without one) it begins anew after the last published revision, on the
// next endpoint. Waiting for a revision outside the prefix asks for progress notifications.
//
// When etcd has compacted what was not read yet, the missed changes cannot be had any more. The engine then reads everything
// anew and publishes the difference (relist.go): each object's last state, and deletions, a new life of a key as deletion and creation. It
// keeps the set of keys for that.
//
// # Reads of another server's writes
//
// A store reads its own memory, which follows etcd within milliseconds. Sync waits until it holds everything that any server had
// acknowledged before: what upstream does for a read without resourceVersion. It asks etcd for its revision; all who ask while one such
// question is under way share the next one.
//
// # Expiry
//
// An object with a TTL is attached to an etcd lease, several objects to one, by upstream's rule (lease.go): it goes up to a twentieth
// (at most a minute) late when only etcd is left to delete it. The server that wrote it deletes it exactly.
//
// # History
//
// A watch of a restarted server goes on if nothing under its table's prefix changed since: Start reads the last tailRevisions of etcd's history for deletions,
// which leave no other trace. Older ones are Gone.
//
// # Compaction
//
// As upstream, and in agreement with its servers by the same key: every CompactEvery one server compacts to the revision of one interval ago.
//
// # When etcd is away
//
// Writes fail with *store.UnavailableError after clientv3's own retries, or RequestTimeout at the latest. Reads and watches go on from memory.
// The watch reconnects with pauses from retryMin to retryMax, and writes work again with it.
//
// # Limits
//
// etcd refuses transactions of more than 128 operations or 1.5 MiB, unless it is told otherwise. It must be 3.4.31, 3.5.13 or later: older ones
// do not answer requests for progress reliably. An etcd whose revisions went back (restored from a backup) is found at the next
// write, which fails and says that the servers must be restarted.
//
// # Tests
//
// They build an etcd server from test/etcdserver, a Go module of its own, into the user's cache directory. Debian's etcd-server is 3.4: too
// old for progress requests that can be relied on.
package etcd
