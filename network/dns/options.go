// Package dns is the cluster's DNS server, one on every node, answering from the node's informers: CoreDNS as a library, with a handler of our own
// for the cluster's names (the Kubernetes DNS specification 1.1.0) in front of its cache and forward plugins.
//
// The DNS service address (10.43.0.10) is an address of every node's loopback link: pods' queries end on their own node, whatever state the
// service rules are in. The Service kube-system/kube-dns only holds the address; give it to service.Options.LocalAddresses so that no rule touches it.
package dns

import (
	"errors"
	"log/slog"
	"net/netip"
	"time"

	"k8s.io/client-go/informers"
)

const (
	// DefaultZone is the cluster's domain.
	DefaultZone = "cluster.local"
	port        = 53
	answerTTL   = 5                // seconds that clients may keep an answer about the cluster
	specVersion = "1.1.0"          // of the Kubernetes DNS specification, answered for dns-version.<zone>
	maxCNAME    = 8                // length of a chain of ExternalName services
	upstreamTTL = 10 * time.Second // how long an idle connection to an upstream is kept
)

// Options says what a node's server answers. All fields are read-only after New.
type Options struct {
	Zone      string       // the cluster's domain; "" is DefaultZone
	Addresses []netip.Addr // where it listens, on port 53, and what the loopback link gets: the DNS service's addresses

	// AlsoListen are further addresses of the node that others bring up: a machine listens on its own pod range address for the nodes that it hosts.
	AlsoListen []netip.Addr
	NetNS      string // path of the node's network namespace; "" is that of the process

	Ranges []netip.Prefix // service and pod ranges: reverse names in them are never asked elsewhere

	// ResolvConf is the file that names the upstream servers; a missing file is fine. "" is /etc/resolv.conf, or where that only names loopback
	// addresses, systemd-resolved's list of the servers behind.
	ResolvConf string
	Upstreams  []string // "address:port" of upstream servers in place of ResolvConf's; nil: those of ResolvConf
	// InsteadOfLoopback replaces upstreams on loopback addresses, which a node in a namespace of its own cannot reach: the machine's AlsoListen address.
	// The zero value keeps them.
	InsteadOfLoopback netip.Addr

	Informers informers.SharedInformerFactory // Services, EndpointSlices, Namespaces
	Log       *slog.Logger                    // nil: slog.Default
}

func (o Options) validate() error {
	switch {
	case o.Informers == nil:
		return errors.New("dns: no informers")
	case len(o.Addresses)+len(o.AlsoListen) == 0:
		return errors.New("dns: no address to listen on")
	}
	return nil
}
