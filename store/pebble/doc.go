// Package pebble is the store's engine for one machine: a Pebble LSM tree in one directory, owned by one process.
//
// The store's memory decides compares (store.Host.Current); a key with a write under way is waited for, so no write is ever based on
// one that may still fail. One goroutine, the committer, takes everything that waits, gives it revisions, writes it as one batch,
// syncs once, and publishes: that is group commit and publication in revision order in one.
//
// Safety classes. A batch with a Durable write is synced. A batch of Lossy writes only goes the same way, except that the log
// file skips this one sync (walFile): the bytes are with the operating system then, and there is one log with one order, so what
// is found after a crash is always a prefix of what was written. A log file is always synced before it is closed. Pebble's
// NoSync would not do: its log writer keeps such records in its own memory until a block of 32 KiB is full. Pebble's newer log format
// records in each chunk how far the log was synced before, which would be wrong here; so the format version stays below it.
//
// Revisions. A block of revisions is reserved within the batch that first needs it, and that batch is synced. A clean stop writes down
// the last revision; after an unclean one the counter starts above the reserved block, and histories of Lossy tables begin there.
//
// A full disk. The file system wrapper (spaceFS) holds an operation that found no space, and tries again every spaceRetry, so Pebble never sees the
// error, which it could not recover from. Meanwhile Commit refuses with *store.UnavailableError; what was under way completes when there is space
// again, and is published then. Other errors of the disk stop all writes until a restart: acknowledged data is safe.
//
// Measured and dropped (on a busy machine with two processors, where equal runs differ by a factor of two): a second goroutine that waits for the sync while
// the committer writes the next group (1, 8 and 32 writers: no difference beyond the noise, and a failing disk then meets a log in use); every
// writer entering Pebble's commit pipeline itself, in revision order (one writer: no difference; 32 writers: 11 to 18 thousand
// transactions per second against 8 to 13), because a writer that waits within Pebble cannot return when the disk is full, and the API
// server in front needs more time per write than either.
//
// Nothing runs while nothing is written: no health-check tickers, and a compaction scheduler without Pebble's 100 ms tick.
//
// FORMAT.md describes the bytes on disk.
package pebble
