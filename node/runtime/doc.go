// Package runtime is knarr's embedded container runtime: CRI's RuntimeService
// as plain calls in the agent's process, over the shim (package shim), which
// parents the processes, and an image store.
//
// # What is where
//
//	<state>/shim/                       of the shim, see package supervisor
//	<state>/pods/<sandbox>/sandbox.json the record of a sandbox
//	<state>/pods/<sandbox>/ns/{net,ipc,uts,user}  its namespaces, pinned by bind mounts
//	<state>/pods/<sandbox>/shm          its /dev/shm (tmpfs)
//	<state>/pods/<sandbox>/{resolv.conf,hostname,hosts}
//	<state>/containers/<id>/container.json        the record of a container
//	<state>/containers/<id>/rootfs      its root file system, mounted
//
// A record is written (temporary file, fsync, rename) before what it describes
// is made, and removed after that is gone, so that a crash at any point leaves
// something that the next Open knows how to clean up. Whether a container runs
// and how it ended is not in its record but asked from the shim, which survives
// the agent; so nothing is written when a container starts.
//
// # Concurrency
//
// All methods may be called concurrently. The table (Runtime.mu) is only held
// to look up and to enter; operations on one sandbox or container that change
// it are serialised by its own lock, reads never wait for them.
//
// Errors carry grpc status codes as those of a remote runtime do.
package runtime
