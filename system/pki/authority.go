package pki

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// Names of files in the directory of an Authority.
const (
	serverCAFile   = "server-ca.pem"
	clientCAFile   = "client-ca.pem"
	proxyCAFile    = "front-proxy-ca.pem"
	serviceKeyFile = "service-account.key"
	apiFile        = "api.pem"
	tokenFile      = "join-token"
	oldTokenFile   = "join-token.old"
	nodesDir       = "nodes"
)

// Names that certificates carry; Kubernetes gives them their meaning.
const (
	AdminUser          = "system:admin"
	AdminGroup         = "system:masters"
	NodeUserPrefix     = "system:node:"
	NodeGroup          = "system:nodes"
	FrontProxyUser     = "system:auth-proxy"
	KubeletClientUser  = "kube-apiserver-kubelet-client"
	defaultServiceAddr = "10.43.0.1"
	defaultDomain      = "cluster.local"
)

// Options of Load. The zero value is useful.
type Options struct {
	// Clock is the source of time; nil means time.Now.
	Clock func() time.Time
	// Domain is the DNS domain of services; empty means cluster.local.
	Domain string
	// ServiceAddress is the first address of the service range; empty means 10.43.0.1.
	ServiceAddress string
	// ServerNames are further DNS names and addresses that the API is called by.
	ServerNames []string
}

// Authority is a cluster's authorities and what they issue. All methods may be called concurrently.
type Authority struct {
	dir        string
	clock      func() time.Time
	serverCA   *Pair
	clientCA   *Pair
	proxyCA    *Pair
	serviceKey *ecdsa.PrivateKey
	api        *Source

	mu    sync.Mutex
	names []string // what the API's certificate covers; guarded by mu
}

// Load reads the authorities in dir and makes what is missing. An authority that is there but damaged is an error: a new
// one in its place would lock everybody out, so putting back a copy of the file or a new directory is up to a person.
func Load(dir string, o Options) (*Authority, error) {
	if o.Clock == nil {
		o.Clock = time.Now
	}
	if err := makeDir(filepath.Join(dir, nodesDir)); err != nil {
		return nil, fmt.Errorf("certificates: %w", err)
	}
	if err := os.Chmod(dir, dirMode); err != nil {
		return nil, fmt.Errorf("certificates: %w", err)
	}
	a := &Authority{dir: dir, clock: o.Clock, names: serverNames(o)}
	var g errgroup.Group // the files' fsyncs overlap
	g.Go(func() (err error) { a.serverCA, err = a.loadCA(serverCAFile, "knarr server CA"); return err })
	g.Go(func() (err error) { a.clientCA, err = a.loadCA(clientCAFile, "knarr client CA"); return err })
	g.Go(func() (err error) { a.proxyCA, err = a.loadCA(proxyCAFile, "knarr front-proxy CA"); return err })
	g.Go(func() (err error) { a.serviceKey, err = loadServiceKey(filepath.Join(dir, serviceKeyFile)); return err })
	g.Go(a.loadToken)
	if err := g.Wait(); err != nil {
		return nil, fmt.Errorf("certificates: %w", err)
	}
	a.loadAPI()
	if _, err := a.api.Pair(); err != nil {
		return nil, fmt.Errorf("certificates: %w", err)
	}
	return a, nil
}

// Open reads the authorities of a cluster and makes nothing: it is for commands beside a running server. A cluster that
// was never started is an error that wraps fs.ErrNotExist.
func Open(dir string) (*Authority, error) {
	for _, f := range []string{serverCAFile, clientCAFile, proxyCAFile, serviceKeyFile, apiFile, tokenFile} {
		if _, err := os.Stat(filepath.Join(dir, f)); err != nil {
			return nil, fmt.Errorf("certificates: %w", err)
		}
	}
	a := &Authority{dir: dir, clock: time.Now}
	for _, ca := range []struct {
		file string
		to   **Pair
	}{{serverCAFile, &a.serverCA}, {clientCAFile, &a.clientCA}, {proxyCAFile, &a.proxyCA}} {
		p, err := readPair(filepath.Join(dir, ca.file))
		if err != nil {
			return nil, fmt.Errorf("certificates: %w", err)
		}
		*ca.to = p
	}
	var err error
	if a.serviceKey, err = loadServiceKey(filepath.Join(dir, serviceKeyFile)); err != nil {
		return nil, fmt.Errorf("certificates: %w", err)
	}
	api, err := readPair(filepath.Join(dir, apiFile))
	if err != nil {
		return nil, fmt.Errorf("certificates: %w", err)
	}
	a.api = &Source{clock: a.clock, current: api, issue: func() (*Pair, error) { return readPair(filepath.Join(dir, apiFile)) }}
	return a, nil
}

func serverNames(o Options) []string {
	domain := cmpOr(o.Domain, defaultDomain)
	names := []string{"localhost", "127.0.0.1", "::1", "kubernetes", "kubernetes.default", "kubernetes.default.svc",
		"kubernetes.default.svc." + domain, cmpOr(o.ServiceAddress, defaultServiceAddr)}
	if host, err := os.Hostname(); err == nil {
		names = append(names, host)
	}
	addrs, err := net.InterfaceAddrs()
	if err == nil {
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
				names = append(names, n.IP.String())
			}
		}
	}
	return normalNames(append(names, o.ServerNames...))
}

func cmpOr(s, otherwise string) string {
	if s != "" {
		return s
	}
	return otherwise
}

func (a *Authority) loadCA(file, name string) (*Pair, error) {
	path := filepath.Join(a.dir, file)
	p, err := readPair(path)
	switch {
	case err == nil && !a.clock().Before(p.Leaf.NotAfter):
		return nil, fmt.Errorf("%s expired on %s", path, p.Leaf.NotAfter.Format(time.DateOnly))
	case err == nil:
		return p, os.Chmod(path, fileMode)
	case !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	if p, err = newCA(name, a.clock()); err != nil {
		return nil, err
	}
	return p, writePair(path, p)
}

func loadServiceKey(path string) (*ecdsa.PrivateKey, error) {
	data, err := os.ReadFile(path)
	if err == nil {
		key, err := parseKey(data)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		return key, os.Chmod(path, fileMode)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, err
	}
	return key, writeFile(path, pem.EncodeToMemory(&pem.Block{Type: pemKey, Bytes: der}))
}

// loadAPI takes the API's certificate from its file where our authority signed it, so that a restart changes nothing for
// clients that remember it.
func (a *Authority) loadAPI() {
	path := filepath.Join(a.dir, apiFile)
	a.api = &Source{clock: a.clock, names: a.apiNames, issue: func() (*Pair, error) {
		p, err := issue(a.serverCA, request{name: "kube-apiserver", usage: x509.ExtKeyUsageServerAuth, names: a.apiNames(), life: leafLife}, a.clock())
		if err != nil {
			return nil, err
		}
		return p, writePair(path, p)
	}}
	if p, err := readPair(path); err == nil && p.Leaf.CheckSignatureFrom(a.serverCA.Leaf) == nil {
		a.api.current = p
	}
}

func (a *Authority) apiNames() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.names
}

// AddServerNames makes the API's certificate valid for further names and addresses, from the next handshake on.
func (a *Authority) AddServerNames(names ...string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.names = normalNames(append(slices.Clone(a.names), names...))
}

// ServerTLS is what the API listens with: it asks callers for a certificate but accepts those without one (tokens). Which
// authority a caller's certificate must come from is for the API's authenticators to say.
// An address of this machine that a caller reached us by becomes a name of the certificate by itself.
func (a *Authority) ServerTLS() *tls.Config {
	pool := a.ClientCAPool()
	pool.AddCert(a.proxyCA.Leaf)
	c := listenTLS(a.api, pool)
	c.GetCertificate = func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
		if tcp, ok := h.Conn.LocalAddr().(*net.TCPAddr); ok && !tcp.IP.IsLoopback() {
			a.addLocal(tcp.IP.String())
		}
		return a.api.GetCertificate(h)
	}
	return c
}

// maxServerNames bounds the names of the API's certificate that come from the addresses of callers' connections.
const maxServerNames = 256

func (a *Authority) addLocal(ip string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, found := slices.BinarySearch(a.names, ip); !found && len(a.names) < maxServerNames {
		a.names = normalNames(append(slices.Clone(a.names), ip))
	}
}

func listenTLS(s *Source, clients *x509.CertPool) *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS12,
		NextProtos:     []string{"h2", "http/1.1"},
		GetCertificate: s.GetCertificate,
		ClientAuth:     tls.RequestClientCert,
		ClientCAs:      clients,
	}
}

// ServerCAPEM is the certificate by which everybody knows the API and the nodes.
func (a *Authority) ServerCAPEM() []byte { return a.serverCA.CertPEM() }

// ClientCAPEM is the certificate by which callers of the API and of the nodes are known.
func (a *Authority) ClientCAPEM() []byte { return a.clientCA.CertPEM() }

// FrontProxyCAPEM is the certificate by which the front proxy (aggregation) is known.
func (a *Authority) FrontProxyCAPEM() []byte { return a.proxyCA.CertPEM() }

// ServerCAPool holds the server authority alone.
func (a *Authority) ServerCAPool() *x509.CertPool { return poolOf(a.serverCA.Leaf) }

// ClientCAPool holds the client authority alone.
func (a *Authority) ClientCAPool() *x509.CertPool { return poolOf(a.clientCA.Leaf) }

// FrontProxyCAPool holds the front-proxy authority alone.
func (a *Authority) FrontProxyCAPool() *x509.CertPool { return poolOf(a.proxyCA.Leaf) }

func poolOf(c *x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(c)
	return p
}

// ServiceAccountKey signs service-account tokens (ES256); its public half verifies them.
func (a *Authority) ServiceAccountKey() *ecdsa.PrivateKey { return a.serviceKey }

// ServerCAKey and ClientCAKey return the pairs that the certificate signing controllers sign with.
func (a *Authority) ServerCAKey() *Pair { return a.serverCA }

// ClientCAKey: see ServerCAKey.
func (a *Authority) ClientCAKey() *Pair { return a.clientCA }

// NewClientCert issues a certificate for a user of the API with the given groups. The caller renews it; a long-lived one
// comes from ClientSource.
func (a *Authority) NewClientCert(name string, groups ...string) (*Pair, error) {
	return issue(a.clientCA, request{name: name, groups: groups, usage: x509.ExtKeyUsageClientAuth, life: leafLife}, a.clock())
}

// NewServingCert issues a certificate for something that listens on names (DNS names and addresses).
func (a *Authority) NewServingCert(name string, groups []string, names ...string) (*Pair, error) {
	return issue(a.serverCA, request{name: name, groups: groups, usage: x509.ExtKeyUsageServerAuth, names: names, life: leafLife}, a.clock())
}

// ClientSource is NewClientCert kept fresh.
func (a *Authority) ClientSource(name string, groups ...string) *Source {
	return &Source{clock: a.clock, issue: func() (*Pair, error) { return a.NewClientCert(name, groups...) }}
}

// FrontProxySource is the client certificate that aggregated APIs believe user headers from.
func (a *Authority) FrontProxySource() *Source {
	return &Source{clock: a.clock, issue: func() (*Pair, error) {
		return issue(a.proxyCA, request{name: FrontProxyUser, usage: x509.ExtKeyUsageClientAuth, life: leafLife}, a.clock())
	}}
}

// KubeletClientSource is the client certificate that the API calls nodes with.
func (a *Authority) KubeletClientSource() *Source {
	return a.ClientSource(KubeletClientUser, AdminGroup)
}

// NodeClientSource is the certificate of a node as a client of the API.
func (a *Authority) NodeClientSource(node string) *Source {
	return a.ClientSource(NodeUserPrefix+node, NodeGroup)
}

// NodeServingTLS is what the streaming API of a node in the server's process listens with; names is asked at each
// handshake and returns the node's addresses as they are then.
func (a *Authority) NodeServingTLS(node string, names func() []string) *tls.Config {
	all := func() []string { return append(slices.Clone(names()), node) }
	s := &Source{clock: a.clock, names: all, issue: func() (*Pair, error) {
		return a.NewServingCert(NodeUserPrefix+node, []string{NodeGroup}, all()...)
	}}
	return listenTLS(s, a.ClientCAPool())
}

// AdminKubeconfig is a kubeconfig with all rights for the API at server (a URL).
func (a *Authority) AdminKubeconfig(cluster, server string) ([]byte, error) {
	p, err := a.NewClientCert(AdminUser, AdminGroup)
	if err != nil {
		return nil, err
	}
	return Kubeconfig(cluster, AdminUser, server, a.ServerCAPEM(), p), nil
}

// WriteAdminKubeconfig makes path the admin's kubeconfig unless it already is a good one: of this authority, for this
// server, and not due for renewal.
func (a *Authority) WriteAdminKubeconfig(path, cluster, server string) error {
	if c, err := kubeconfigCert(path, server, a.ServerCAPEM()); err == nil && a.clock().Before(renewAt(c)) && c.CheckSignatureFrom(a.clientCA.Leaf) == nil {
		return os.Chmod(path, fileMode)
	}
	data, err := a.AdminKubeconfig(cluster, server)
	if err != nil {
		return err
	}
	return writeFile(path, data)
}

// Maintain keeps the admin's kubeconfig at path fresh until ctx ends. It sleeps until the renewal is due.
func (a *Authority) Maintain(ctx context.Context, path, cluster, server string) error {
	for {
		if err := a.WriteAdminKubeconfig(path, cluster, server); err != nil {
			return err
		}
		c, err := kubeconfigCert(path, server, a.ServerCAPEM())
		if err != nil {
			return err
		}
		timer := time.NewTimer(renewAt(c).Sub(a.clock()) + time.Second)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
	}
}

// fingerprint is the SHA-256 of a certificate, in hex.
func fingerprint(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:])
}

// Certificate is one line of an expiry listing.
type Certificate struct {
	Name     string    `json:"name"`
	Subject  string    `json:"subject"`
	NotAfter time.Time `json:"notAfter"`
	// RenewAt is when it is replaced by itself; the zero time for an authority, which is not.
	RenewAt time.Time `json:"renewAt,omitzero"`
}

// Expiries lists every certificate that lies in dir (one level) and its admin kubeconfigs, soonest first.
func Expiries(dirs ...string) ([]Certificate, error) {
	var out []Certificate
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			c, err := fileCert(filepath.Join(dir, e.Name()))
			if c == nil || err != nil {
				continue
			}
			l := Certificate{Name: filepath.Join(dir, e.Name()), Subject: c.Subject.CommonName, NotAfter: c.NotAfter}
			if !c.IsCA {
				l.RenewAt = renewAt(c)
			}
			out = append(out, l)
		}
	}
	slices.SortFunc(out, func(a, b Certificate) int { return a.NotAfter.Compare(b.NotAfter) })
	return out, nil
}

func fileCert(path string) (*x509.Certificate, error) {
	switch {
	case strings.HasSuffix(path, ".pem"):
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		c, _, err := parseCert(data)
		return c, err
	case strings.HasSuffix(path, ".kubeconfig"):
		return kubeconfigCert(path, "", nil)
	}
	return nil, nil
}

// ServerCAFile and ClientCAFile are the files of these authorities, each with certificate and key, for upstream's signers.
func (a *Authority) ServerCAFile() string { return filepath.Join(a.dir, serverCAFile) }

// ClientCAFile is described at ServerCAFile.
func (a *Authority) ClientCAFile() string { return filepath.Join(a.dir, clientCAFile) }
