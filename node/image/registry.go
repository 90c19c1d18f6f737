package image

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
)

const (
	// lookupTimeout bounds the DNS lookup of a registry: without a network it fails soon instead of by retries.
	lookupTimeout = 4 * time.Second
	// dialTimeout bounds one connection attempt.
	dialTimeout = 10 * time.Second
	// headerTimeout bounds the wait for the answer to a request.
	headerTimeout = 30 * time.Second
	// userAgent names this client to registries.
	userAgent = "knarr"

	dockerHub     = "docker.io"
	dockerHubHost = "registry-1.docker.io"
	anyRegistry   = "*"
)

// Auth is what a registry is told about who pulls. The zero value is anonymous. It is sent to the registry that the
// image's name has in it (and its token server), never to mirrors, which have their own in RegistryConfig.
type Auth struct {
	Username, Password string
	// Auth is base64 of "user:password", used where Username is empty.
	Auth string
	// IdentityToken is exchanged for an access token at the registry's token server.
	IdentityToken string
	// RegistryToken is sent to the registry as it is, as a bearer token.
	RegistryToken string
	// ServerAddress is the registry that this is for, as a host or URL. Empty: whichever the image's name has in it.
	ServerAddress string
}

// credentials returns what the authorizer of containerd takes: an empty user name makes the secret an identity token.
func (a Auth) credentials() (user, secret string, err error) {
	switch {
	case a.Username != "":
		return a.Username, a.Password, nil
	case a.IdentityToken != "":
		return "", a.IdentityToken, nil
	case a.Auth != "":
		raw, err := base64.StdEncoding.DecodeString(a.Auth)
		if err != nil {
			return "", "", fmt.Errorf("credentials of the registry: auth is not base64: %w", err)
		}
		user, secret, ok := strings.Cut(strings.TrimRight(string(raw), "\x00"), ":")
		if !ok {
			return "", "", errors.New("credentials of the registry: auth is not user:password")
		}
		return user, secret, nil
	}
	return "", "", nil
}

// fingerprint tells credentials apart without keeping them.
func (a Auth) fingerprint() string {
	sum := sha256.Sum256([]byte(strings.Join([]string{a.Username, a.Password, a.Auth, a.IdentityToken, a.RegistryToken, a.ServerAddress}, "\x00")))
	return hex.EncodeToString(sum[:])
}

// isFor reports whether the credentials are meant for the registry host.
func (a Auth) isFor(host string) bool {
	if a.ServerAddress == "" {
		return true
	}
	addr := a.ServerAddress
	if u, err := url.Parse(addr); err == nil && u.Host != "" {
		addr = u.Host
	} else {
		addr, _, _ = strings.Cut(addr, "/")
	}
	hub := func(h string) bool { return h == dockerHub || h == dockerHubHost || h == "index.docker.io" }
	return addr == host || hub(addr) && hub(host)
}

// RegistryConfig says where images are pulled from.
type RegistryConfig struct {
	// Registries maps the host of image names ("docker.io", "registry.example.com:5000", "*" for all without an entry
	// of their own) to the endpoints that are asked in turn. The registry itself comes last where it is not among them.
	Registries map[string][]Endpoint `json:"registries,omitempty"`
}

// Endpoint is a registry or a mirror.
type Endpoint struct {
	// URL is http:// or https://, host, and a path where the API is not at /v2.
	URL string `json:"url"`
	// CA are PEM certificates to trust for this endpoint, besides those of the system; CAFile is a file with such.
	CA     string `json:"ca,omitempty"`
	CAFile string `json:"caFile,omitempty"`
	// CertFile and KeyFile are the client certificate, where the endpoint wants one.
	CertFile string `json:"certFile,omitempty"`
	KeyFile  string `json:"keyFile,omitempty"`
	// Insecure takes any certificate.
	Insecure bool `json:"insecure,omitempty"`
	// Username and Password are sent to this endpoint in place of the pull's own credentials.
	Username string `json:"username,omitempty"`
	Password string `json:"password,omitempty"`
}

func (c RegistryConfig) validate() error {
	for host, endpoints := range c.Registries {
		for _, e := range endpoints {
			if _, err := e.parse(); err != nil {
				return fmt.Errorf("registry %s: %w", host, err)
			}
			if _, err := e.tls(); err != nil {
				return fmt.Errorf("registry %s: endpoint %s: %w", host, e.URL, err)
			}
		}
	}
	return nil
}

func (e Endpoint) parse() (*url.URL, error) {
	u, err := url.Parse(e.URL)
	if err != nil {
		return nil, fmt.Errorf("endpoint %q: %w", e.URL, err)
	}
	if u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("endpoint %q must be http://host or https://host", e.URL)
	}
	return u, nil
}

func (e Endpoint) tls() (*tls.Config, error) {
	c := &tls.Config{InsecureSkipVerify: e.Insecure, MinVersion: tls.VersionTLS12}
	pem := []byte(e.CA)
	if e.CAFile != "" {
		raw, err := os.ReadFile(e.CAFile)
		if err != nil {
			return nil, err
		}
		pem = append(append(pem, '\n'), raw...)
	}
	if len(pem) > 0 {
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		if !pool.AppendCertsFromPEM(pem) {
			return nil, errors.New("no PEM certificate in its CA")
		}
		c.RootCAs = pool
	}
	if e.CertFile != "" || e.KeyFile != "" {
		pair, err := tls.LoadX509KeyPair(e.CertFile, e.KeyFile)
		if err != nil {
			return nil, err
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c, nil
}

// hosts gives the resolver of one pull its endpoints. Connections live as long as the pull.
type hosts struct {
	config   RegistryConfig
	auth     Auth
	resolver *net.Resolver

	mu         sync.Mutex
	transports []*http.Transport
}

func newHosts(o Options, a Auth) *hosts {
	h := &hosts{config: o.Registries, auth: a, resolver: o.Resolver}
	if h.resolver == nil {
		h.resolver = net.DefaultResolver
	}
	return h
}

func (h *hosts) headers() http.Header { return http.Header{"User-Agent": {userAgent}} }

func (h *hosts) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, t := range h.transports {
		t.CloseIdleConnections()
	}
}

// of returns the endpoints for images whose name has the registry host, in the order in which they are asked.
func (h *hosts) of(host string) ([]docker.RegistryHost, error) {
	endpoints, ok := h.config.Registries[host]
	if !ok {
		endpoints = h.config.Registries[anyRegistry]
	}
	self := host
	if host == dockerHub {
		self = dockerHubHost
	}
	var list []docker.RegistryHost
	named := false
	for _, e := range endpoints {
		u, err := e.parse()
		if err != nil {
			return nil, err
		}
		r, err := h.endpoint(e, u, u.Host == self || u.Host == host)
		if err != nil {
			return nil, err
		}
		named = named || u.Host == self || u.Host == host
		list = append(list, r)
	}
	if named {
		return list, nil
	}
	u := &url.URL{Scheme: "https", Host: self}
	r, err := h.endpoint(Endpoint{}, u, true)
	if err != nil {
		return nil, err
	}
	if docker.IsLocalhost(host) {
		r.Client.Transport = docker.NewHTTPFallback(r.Client.Transport)
	}
	return append(list, r), nil
}

// endpoint makes what the resolver needs to talk to u. own: it is the registry of the image's name, not a mirror.
func (h *hosts) endpoint(e Endpoint, u *url.URL, own bool) (docker.RegistryHost, error) {
	conf, err := e.tls()
	if err != nil {
		return docker.RegistryHost{}, fmt.Errorf("endpoint %s: %w", e.URL, err)
	}
	t := h.newTransport(conf)
	h.mu.Lock()
	h.transports = append(h.transports, t)
	h.mu.Unlock()
	path := strings.TrimRight(u.Path, "/")
	if path == "" {
		path = "/v2"
	}
	client := &http.Client{Transport: t}
	return docker.RegistryHost{
		Client:       client,
		Authorizer:   h.authorizer(e, u.Host, own, client),
		Host:         u.Host,
		Scheme:       u.Scheme,
		Path:         path,
		Capabilities: docker.HostCapabilityPull | docker.HostCapabilityResolve,
	}, nil
}

func (h *hosts) authorizer(e Endpoint, host string, own bool, client *http.Client) docker.Authorizer {
	a := Auth{Username: e.Username, Password: e.Password}
	if e.Username == "" && own && h.auth.isFor(host) {
		a = h.auth
	}
	if a.RegistryToken != "" {
		return bearer{host: host, token: a.RegistryToken}
	}
	return docker.NewDockerAuthorizer(
		docker.WithAuthClient(client),
		docker.WithAuthHeader(h.headers()),
		docker.WithAuthCreds(func(challenger string) (string, string, error) {
			if challenger != host {
				return "", "", nil // a host that the registry redirected to
			}
			return a.credentials()
		}))
}

// bearer authorizes requests to host with a token that was given, not fetched.
type bearer struct{ host, token string }

func (b bearer) Authorize(_ context.Context, r *http.Request) error {
	if r.URL.Host == b.host {
		r.Header.Set("Authorization", "Bearer "+b.token)
	}
	return nil
}

func (b bearer) AddResponses(context.Context, []*http.Response) error {
	return fmt.Errorf("the registry refused the token: %w", docker.ErrInvalidAuthorization)
}

func (h *hosts) newTransport(conf *tls.Config) *http.Transport {
	return &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           h.dial,
		TLSClientConfig:       conf,
		TLSHandshakeTimeout:   dialTimeout,
		ResponseHeaderTimeout: headerTimeout,
		MaxIdleConns:          maxConcurrentLayers,
		IdleConnTimeout:       headerTimeout,
		ForceAttemptHTTP2:     true,
	}
}

// dialError says why there is no connection. It has no Timeout method, by which the registry client would take it for
// a short disturbance and try four more times before it tells the user.
type dialError struct{ err error }

func (e *dialError) Error() string { return e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

// dial connects like net.Dialer but gives up on DNS sooner. Its errors are dialErrors.
func (h *hosts) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	lookup, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	addrs, err := h.resolver.LookupHost(lookup, host)
	if err != nil {
		return nil, &dialError{&net.OpError{Op: "dial", Net: network, Err: err}}
	}
	d := net.Dialer{Timeout: dialTimeout}
	var errs []error
	for _, a := range addrs {
		conn, err := d.DialContext(ctx, network, net.JoinHostPort(a, port))
		if err == nil {
			return conn, nil
		}
		errs = append(errs, err)
	}
	return nil, &dialError{errors.Join(errs...)}
}
