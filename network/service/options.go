// Package service is the service data path of one node: ClusterIP, NodePort, LoadBalancer and external addresses, and host ports of pods, in one
// nftables table "knarr" of the inet family, programmed over netlink.
//
// # Shape of the rules
//
// No chain belongs to a service. A service port is an element of a verdict map, keyed by address, protocol and port, and its endpoints are elements of
// another map, keyed by the id of their list and a slot number:
//
//	svc4  { 10.43.0.7 . tcp . 80 : goto lb4-a3 }       which chain: it depends on the number of endpoints only
//	sid4  { 10.43.0.7 . tcp . 80 : 17 }                which list
//	ep4   { 17 . 0 : 10.42.0.5 . 8080, 17 . 1 : ... }  the list
//
// and the chain lb4-a3, shared by all services with three endpoints, holds one rule: look the list up in sid4, draw a number below three, look the
// pair up in ep4, translate. So a packet of a new connection costs the same few hash look-ups with five services and with fifty thousand, a packet of an
// established connection none, and a change of one endpoint is two or three map elements. Node ports and host ports are keys with the
// unspecified address, looked up for packets to addresses of the node. Node, pod range and service range sets complete the table; package file
// ruleset.go lists all of them.
//
// A change of a service is computed as a plan (plan.go, no side effects), rendered to elements (render.go), and the difference to the rendered
// old plan goes to the kernel in one transaction: no packet sees half of it. A start builds everything under names with a new generation suffix, then one
// transaction makes it live and deletes what was there before; so rules of a dead agent work until then, and the table's state
// is always known. The same is done when a transaction fails, for example because somebody flushed the ruleset.
//
// # What was tried and dropped
//
// A chain per service, as kube-proxy has: a chain and a rule cost the kernel and the transaction several times what two elements do. Packet marks for
// masquerading: they collide with other users of marks; the decision follows from addresses instead, see (*ruleset).postrouting.
package service

import (
	"errors"
	"log/slog"
	"net/netip"
	"time"

	"k8s.io/client-go/informers"

	"knarr/network/sysctl"
)

// TableName is the name of the table, of the inet family.
const TableName = "knarr"

// Bounds of the data path.
const (
	debounce         = 2 * time.Millisecond // how long changes are gathered after the first
	retryAfter       = time.Second          // pause before the table is built again after a failed transaction
	elementsPerMsg   = 500                  // elements in one netlink message, whose attribute holds 64 KiB at most
	elementsPerTx    = 1000                 // elements in one transaction while a generation is filled
	changesPerTx     = 20000                // elements in one transaction of live changes; a single service may exceed it
	socketBuffer     = 16 << 20             // bytes, of the netlink socket in each direction: holds a transaction and its acknowledgements
	maxAffinity      = 65536                // remembered clients per family
	maxEndpointsSlot = 1 << 16              // endpoints of one list; more are left out
)

// Options says what the data path of a node serves. All fields are read-only after New.
type Options struct {
	NodeName string       // name of this node's Node object
	NodeIPs  []netip.Addr // this node's addresses, where health check ports listen
	NetNS    string       // path of the node's network namespace; "" is that of the process

	ClusterCIDRs []netip.Prefix // pod ranges of the whole cluster
	ServiceCIDRs []netip.Prefix // service ranges, besides those of ServiceCIDR objects

	// MasqueradeSources are further ranges whose traffic to the outside of the cluster gets this node's address: the links of package nodens on a
	// machine that hosts nodes.
	MasqueradeSources []netip.Prefix
	// LocalAddresses are service addresses that a process of this node answers itself (the DNS server): no rule touches them.
	LocalAddresses []netip.Addr
	// NoLoopbackNodePorts leaves 127.0.0.1 out of node ports and host ports, and so route_localnet alone.
	NoLoopbackNodePorts bool

	Informers informers.SharedInformerFactory // Services, EndpointSlices, Nodes, ServiceCIDRs
	Sysctl    sysctl.Recorder                 // its NetNS is overwritten, its Owner gets the suffix .service
	Log       *slog.Logger                    // nil: slog.Default
}

func (o Options) validate() error {
	switch {
	case o.NodeName == "":
		return errors.New("services: no node name")
	case o.Informers == nil:
		return errors.New("services: no informers")
	}
	return nil
}
