// Package image keeps the container images of one node: it imports, builds, pulls, lists and removes them, and
// prepares the writable root file systems of containers on top of them.
//
// # Design
//
// The package runs containerd's libraries in process, without a daemon: the local content store holds the blobs
// (manifests, configurations, compressed layers), the metadata database (bbolt) holds names, labels, leases and the
// references between them, the overlay snapshotter holds the unpacked layers and, on top of a layer chain, one writable
// snapshot per container. Where the kernel cannot mount overlay on the data directory, the native snapshotter (full
// copies) takes its place; the choice is made once, at the first Open, and kept.
//
//	<Root>/lock          exclusive lock of the process that has the store open
//	<Root>/running       present while a store is open: its presence at Open tells of an unclean stop
//	<Root>/meta.db       metadata database
//	<Root>/content/      blobs/sha256/<hex> and ingest/ (partial downloads; kept 24 h for resumption)
//	<Root>/overlay/      snapshots (or native/)
//
// Invariants:
//
//   - An image is named in the database only after all of its blobs are committed and all of its layers are unpacked.
//     So a kill at any time leaves either the whole image or no image. What was half done is collected at the next Open.
//   - While work on an image is under way, a lease protects its parts from garbage collection. Leases do not outlive
//     the process: Open deletes the ones that it finds.
//   - A writable root file system is a root of garbage collection of its own, and with it the layers below it:
//     removing an image never takes layers from under a container.
//   - Names, sizes and configurations are kept in memory (index.go), so that Resolve and List do no I/O.
//
// Nodes of one machine share blobs: with Options.SharedContent each committed blob gets a second hard link in the shared
// directory, and a node that needs a blob which is there links it instead of writing it. A shared blob disappears with
// the last node that has it.
//
// Nothing of the host is executed: layers are decompressed here (containerd's own helper would run unpigz when it
// finds one), mounts are system calls. The only exception is Build of a Go package, which runs the go command.
package image
