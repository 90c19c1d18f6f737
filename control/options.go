package control

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/metadata/metadatainformer"
	"k8s.io/client-go/rest"
	certutil "k8s.io/client-go/util/cert"
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

// KeyPair names the PEM files of a certificate and its key (one file may hold both). They are read again when they change.
type KeyPair struct{ CertFile, KeyFile string }

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

	// RootCA is published into every namespace for clients to trust the API by: PEM certificates and nothing else.
	RootCA []byte
	// ClientSigner signs approved certificate requests of clients, ServingSigner those of kubelets' servers; an empty one: none are signed.
	ClientSigner, ServingSigner KeyPair
	// ServiceAccountKey signs the tokens of service-account token secrets.
	ServiceAccountKey crypto.PrivateKey

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
	need(o.ServiceAccountKey != nil, "ServiceAccountKey")
	if err := onlyCertificates(o.RootCA); err != nil {
		errs = append(errs, fmt.Errorf("control: Options.RootCA: %w", err))
	}
	for _, p := range []KeyPair{o.ClientSigner, o.ServingSigner} {
		if (p.CertFile == "") != (p.KeyFile == "") {
			errs = append(errs, errors.New("control: a signer needs both of CertFile and KeyFile, or none"))
		}
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

// onlyCertificates refuses everything that must not be read by every pod of the cluster.
func onlyCertificates(data []byte) error {
	found := false
	for rest := data; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != certutil.CertificateBlockType {
			return fmt.Errorf("it holds a %s and is for everybody to read: give certificates only", block.Type)
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return err
		}
		found = true
	}
	if !found {
		return errors.New("it holds no certificate in PEM form")
	}
	return nil
}
