package image

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
)

const (
	// lookupTimeout bounds the DNS lookup of a registry: without a network it fails soon instead of by retries.
	lookupTimeout = 4 * time.Second
	// dialTimeout bounds one connection attempt where hosts.toml does not.
	dialTimeout = 10 * time.Second
	// headerTimeout bounds the wait for the answer to a request.
	headerTimeout = 30 * time.Second
	// userAgent names this client to registries.
	userAgent = "knarr"

	dockerHub     = "docker.io"
	dockerHubHost = "registry-1.docker.io"
)

// Auth is what a registry is told about who pulls. The zero value is anonymous. It is sent to the registry that the
// image's name has in it (and its token server), never to mirrors, whose own stand in hosts.toml.
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

// hosts gives the resolver of one pull its endpoints. The configuration is read once a pull; connections live as long as that.
type hosts struct {
	config   string // Options.RegistryConfigPath
	auth     Auth
	resolver *net.Resolver

	mu         sync.Mutex
	known      map[string][]docker.RegistryHost
	transports []*http.Transport
}

func newHosts(o Options, a Auth) *hosts {
	h := &hosts{config: o.RegistryConfigPath, auth: a, resolver: o.Resolver, known: map[string][]docker.RegistryHost{}}
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
	h.mu.Lock()
	defer h.mu.Unlock()
	if list, ok := h.known[host]; ok {
		return list, nil
	}
	endpoints, err := endpointsOf(h.config, host)
	if err != nil {
		return nil, err
	}
	list := make([]docker.RegistryHost, len(endpoints))
	for i, e := range endpoints {
		list[i] = h.host(e)
	}
	h.known[host] = list
	return list, nil
}

// host makes what the resolver needs to talk to e.
func (h *hosts) host(e endpoint) docker.RegistryHost {
	t := h.newTransport(e)
	h.transports = append(h.transports, t)
	client := &http.Client{Transport: t}
	if e.plainToo {
		client.Transport = docker.NewHTTPFallback(t)
	}
	return docker.RegistryHost{
		Client:       client,
		Authorizer:   h.authorizer(e, client),
		Host:         e.url.Host,
		Scheme:       e.url.Scheme,
		Path:         e.url.Path,
		Capabilities: e.capabilities,
		Header:       e.header,
	}
}

func (h *hosts) authorizer(e endpoint, client *http.Client) docker.Authorizer {
	host := e.url.Host
	a := Auth{}
	if e.own && h.auth.isFor(host) {
		a = h.auth
	}
	if a.RegistryToken != "" {
		return bearer{host: host, token: a.RegistryToken}
	}
	header := h.headers()
	maps.Copy(header, e.header)
	return docker.NewDockerAuthorizer(
		docker.WithAuthClient(client),
		docker.WithAuthHeader(header),
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

func (h *hosts) newTransport(e endpoint) *http.Transport {
	return &http.Transport{
		Proxy: http.ProxyFromEnvironment,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return h.dial(ctx, network, addr, e.dialTimeout)
		},
		TLSClientConfig:       e.tls,
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

// dial connects like net.Dialer but gives up on DNS sooner. limit bounds each attempt. Its errors are dialErrors.
func (h *hosts) dial(ctx context.Context, network, addr string, limit time.Duration) (net.Conn, error) {
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
	d := net.Dialer{Timeout: limit}
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
