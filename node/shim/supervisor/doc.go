// Package supervisor is knarr-shim itself: the parent of every container of a
// node. It answers the protocol of package shim on a unix socket, starts
// containers with libcontainer in its own process, writes their logs, notes
// how they ended, and takes over the containers of a shim that died.
//
// Ownership. A Supervisor owns a table of containers; each container has one
// goroutine per output stream, one that waits for its end and one that listens
// for out-of-memory kills, all parked in the runtime's poller and none on a
// thread. Nothing here calls wait4(-1): libcontainer waits for its own helpers,
// so only processes that are registered, or that belong to nobody, are reaped
// (see reaper).
//
// Survival. Everything that a later shim must know is in
// <dir>/containers/<id>/: start.json (how to run and log it), status.json (how
// it is or how it ended) and the FIFOs that are its stdio. The container holds
// the write side of its output FIFOs itself, read-write, so the death of the
// shim neither kills it with SIGPIPE nor gives it an error; it blocks when 64
// KiB are unread and goes on when the next shim reads.
package supervisor
