package apiserver

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"time"

	apiextensionsinformers "k8s.io/apiextensions-apiserver/pkg/client/informers/externalversions"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/informers"
	restclient "k8s.io/client-go/rest"
	aggregatorinformers "k8s.io/kube-aggregator/pkg/client/informers/externalversions"

	"knarr/api"
	"knarr/apiserver/options"
)

const (
	// RequestTimeout bounds every request that is not long-running, as upstream's default.
	RequestTimeout = time.Minute
	// MinWatchTimeout is the least duration of a watch that names no timeout, as upstream's default.
	MinWatchTimeout = 30 * time.Minute
	// MaxRequestBodyBytes bounds a write, as upstream's default.
	MaxRequestBodyBytes = 3 << 20
	// MaxReadsInFlight and MaxWritesInFlight bound the requests that run at once, long-running ones aside.
	MaxReadsInFlight  = 400
	MaxWritesInFlight = 200
	// ServiceAccountIssuer names this cluster in service-account tokens.
	ServiceAccountIssuer = "https://kubernetes.default.svc.cluster.local"
)

// Config is what a Server is made of. Every field is required unless it says otherwise.
type Config struct {
	Registry *api.Registry

	// Loopback reaches this very server as system:apiserver (group system:masters).
	Loopback *restclient.Config
	// InProcessUser gives the identity that an in-process caller put into the request's context.
	InProcessUser func(context.Context) (user.Info, bool)

	Informers            informers.SharedInformerFactory
	ExtensionInformers   apiextensionsinformers.SharedInformerFactory
	AggregationInformers aggregatorinformers.SharedInformerFactory

	// ClientCA and RequestHeaderCA are PEM bundles: whose certificates name users, and whose may speak for users as a
	// front proxy.
	ClientCA        []byte
	RequestHeaderCA []byte
	// ProxyClientName is the common name, and ProxyClientCert the certificate, with which this server speaks for users to
	// aggregated servers.
	ProxyClientName string
	ProxyClientCert func(*tls.CertificateRequestInfo) (*tls.Certificate, error)
	// ServiceAccountKey signs service-account tokens; its public half verifies them.
	ServiceAccountKey crypto.Signer

	// KubeletTransport reaches the agents' HTTPS API, also by a node's name; ProxyTransport carries requests proxied to pods
	// and services, and its dialer those of webhooks and to aggregated servers.
	KubeletTransport http.RoundTripper
	ProxyTransport   *http.Transport

	// AdvertiseAddress and Port are where clients in the cluster reach this server.
	AdvertiseAddress net.IP
	Port             int
	ServiceCIDR      net.IPNet
	NodePorts        PortRange
	// Front wraps what connections from outside reach, before authentication; optional.
	Front func(http.Handler) http.Handler
	// Tunnels answers requests of TunnelPath. They are authenticated and last as long as the handler does; whether the caller may
	// is decided by the handler, from who the caller is. Optional.
	Tunnels http.Handler
	// Options are who is believed, who decides, which plugins see a write, and what is recorded. Nil means the defaults. Its encryption is
	// the Registry's business.
	Options *options.Options
	// StoreCheck tells why the store does not work, nil when it does; the health check named etcd asks it. Optional.
	StoreCheck func(context.Context) error
	// Extra are paths of the server's own, for those whom the authorizer lets; optional.
	Extra map[string]http.Handler
	// ClusterDNS is the address of the cluster's DNS service.
	ClusterDNS net.IP
}

// PortRange is an inclusive range of ports.
type PortRange struct{ First, Last int }

func (c *Config) options() *options.Options {
	if c.Options == nil {
		return options.New()
	}
	return c.Options
}

func (c *Config) validate() error {
	switch {
	case c.Registry == nil, c.Loopback == nil, c.InProcessUser == nil:
		return errors.New("apiserver: Registry, Loopback and InProcessUser are required")
	case c.Informers == nil, c.ExtensionInformers == nil, c.AggregationInformers == nil:
		return errors.New("apiserver: the three informer factories are required")
	case c.ServiceAccountKey == nil:
		return errors.New("apiserver: ServiceAccountKey is required")
	case !x509.NewCertPool().AppendCertsFromPEM(c.ClientCA):
		return errors.New("apiserver: ClientCA holds no certificate")
	case !x509.NewCertPool().AppendCertsFromPEM(c.RequestHeaderCA):
		return errors.New("apiserver: RequestHeaderCA holds no certificate")
	case c.KubeletTransport == nil || c.ProxyTransport == nil:
		return errors.New("apiserver: KubeletTransport and ProxyTransport are required")
	case c.ProxyClientName == "" || c.ProxyClientCert == nil:
		return errors.New("apiserver: ProxyClientName and ProxyClientCert are required")
	case c.AdvertiseAddress == nil || c.Port == 0:
		return errors.New("apiserver: AdvertiseAddress and Port are required")
	}
	return nil
}
