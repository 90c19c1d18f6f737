package network

import (
	"context"
	"net/netip"

	v1 "k8s.io/api/core/v1"
)

// RouteProtocol marks every route that knarr installs (the "proto" of a route, `ip route show proto 75`), so that they are found and
// removed also after a crash. It is free in the list of well-known numbers (rtnetlink.h).
const RouteProtocol = 75

// HostPort is one port of a node that leads to a pod.
type HostPort struct {
	Protocol v1.Protocol    // TCP, UDP or SCTP; "" is TCP
	HostIP   netip.Addr     // only on this address of the node; the zero value or an unspecified address means all
	HostPort uint16         // the node's port, 1-65535
	Target   netip.AddrPort // the pod's address and container port
}

// HostPorts is who puts host ports into the data path: service.Proxy does. The owner is the pod sandbox.
type HostPorts interface {
	// SetHostPorts replaces the host ports of owner; it returns when packets follow them, or at once before Run's first pass.
	SetHostPorts(ctx context.Context, owner string, ports []HostPort) error
	// RemoveHostPorts takes all host ports of owner away; an unknown owner is no error.
	RemoveHostPorts(ctx context.Context, owner string) error
}
