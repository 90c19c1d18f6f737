// Package shim is the client side of knarr-shim, the one small process per node
// that parents every container: the wire protocol (PROTOCOL.md), a Client that
// starts or finds the shim and talks to it, and the types both sides share.
//
// The package imports neither Kubernetes nor libcontainer; the other side of
// the socket is package supervisor.
package shim
