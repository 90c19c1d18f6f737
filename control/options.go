package control

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/metadata/metadatainformer"
	"k8s.io/client-go/rest"
)

// Bounds of starting and stopping.
const (
	// buildRetry is the pause before a controller that could not be built is tried again; it doubles up to buildRetryMax.
	buildRetry    = time.Second
	buildRetryMax = 30 * time.Second
	// stopTimeout bounds the wait for controllers after the end of Run's context.
	stopTimeout = 15 * time.Second
)

// Controller is a controller that somebody else brings along.
type Controller struct {
	Name string
	// Run returns when ctx has ended; an earlier return is logged as an error. Informers that it wants must be started by itself.
	Run func(ctx context.Context) error
}

// Options are what the controllers of a cluster need. All fields are required where not said otherwise.
type Options struct {
	// Config gives the client configuration of an identity, such as client.Config with the API's handler.
	Config func(user.Info) *rest.Config
	// Informers and Metadata are the factories that the controllers read from. They must belong to the controllers alone, since Run starts
	// them with its own context and waits for their end.
	Informers informers.SharedInformerFactory
	Metadata  metadatainformer.SharedInformerFactory
	// Changed returns a channel that is closed the next time that the set of served resources changes (client.Tables.Changed).
	Changed func() <-chan struct{}

	// PodCIDR is divided among the nodes, by NodeMask bits each (0: 24 for IPv4, 64 for IPv6). ServiceCIDR is never given to a node.
	PodCIDR     netip.Prefix
	NodeMask    int
	ServiceCIDR netip.Prefix

	// RootCAFile (PEM) is published into every namespace for clients to trust the API by.
	RootCAFile string
	// SigningCertFile and SigningKeyFile sign approved certificate requests; both empty: none are signed.
	SigningCertFile, SigningKeyFile string
	// ServiceAccountKeyFile signs tokens of service-account token secrets.
	ServiceAccountKeyFile string

	// Disabled names controllers of the table that shall not run; optional.
	Disabled []string
	// Extra are run with the others; optional.
	Extra []Controller
}

func (o *Options) validate() error {
	var errs []error
	need := func(ok bool, what string) {
		if !ok {
			errs = append(errs, fmt.Errorf("control: Options.%s is required", what))
		}
	}
	need(o.Config != nil, "Config")
	need(o.Informers != nil, "Informers")
	need(o.Metadata != nil, "Metadata")
	need(o.Changed != nil, "Changed")
	need(o.PodCIDR.IsValid(), "PodCIDR")
	need(o.ServiceCIDR.IsValid(), "ServiceCIDR")
	need(o.RootCAFile != "", "RootCAFile")
	need(o.ServiceAccountKeyFile != "", "ServiceAccountKeyFile")
	if (o.SigningCertFile == "") != (o.SigningKeyFile == "") {
		errs = append(errs, errors.New("control: Options.SigningCertFile and SigningKeyFile belong together"))
	}
	known := map[string]bool{}
	for _, c := range controllers() {
		known[c.name] = true
	}
	for _, n := range o.Disabled {
		if !known[n] {
			errs = append(errs, fmt.Errorf("control: Options.Disabled names %q, which is no controller", n))
		}
	}
	return errors.Join(errs...)
}
