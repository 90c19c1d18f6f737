package pki

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// Files of a node's identity.
const (
	nodeClientFile  = "client.pem"
	nodeServingFile = "serving.pem"
	nodeCAFile      = "ca.json" // nodeTrust
	nodeSecretFile  = "node-secret"
)

// Bounds of a join over the network.
const (
	joinTimeout = 10 * time.Second
	// renewRetry is the pause after a failed renewal; there are months left when the first one is tried.
	renewRetry = 10 * time.Minute
)

// JoinOptions say which node joins which server.
type JoinOptions struct {
	// Server is the API's URL.
	Server string
	// Token is the join token.
	Token Token
	// Node is the node's name.
	Node string
	// Addresses are what the node's streaming API is called by, besides its name.
	Addresses []string
	// Dir is where the node keeps its identity (0700, made where missing).
	Dir string
	// Clock is the source of time; nil means time.Now.
	Clock func() time.Time
}

// nodeTrust is what a node knows of its cluster.
type nodeTrust struct {
	ServerCA string          `json:"serverCA"`
	ClientCA string          `json:"clientCA"`
	Cluster  json.RawMessage `json:"cluster"`
}

// NodeIdentity is a joined node's certificates. All methods may be called concurrently.
type NodeIdentity struct {
	o        JoinOptions
	trust    nodeTrust
	serverCA *x509.Certificate
	clientCA *x509.Certificate

	mu      sync.Mutex // guards client and serving
	client  *Pair
	serving *Pair
}

// Join returns the node's identity: that on disk where it is good, without any call, so that a node restarts while its
// server is away; else a new one from the server. The server is known by the token's hash before the secret is sent.
func Join(ctx context.Context, o JoinOptions) (*NodeIdentity, error) {
	if o.Clock == nil {
		o.Clock = time.Now
	}
	if err := makeDir(o.Dir); err != nil {
		return nil, fmt.Errorf("join: %w", err)
	}
	n := &NodeIdentity{o: o}
	if n.load() == nil && !n.due() {
		return n, nil
	}
	ca, err := fetchCA(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("join %s: %w", o.Server, err)
	}
	n.serverCA = ca
	if err := n.enroll(ctx); err != nil {
		return nil, fmt.Errorf("join %s: %w", o.Server, err)
	}
	return n, nil
}

// load reads the identity from disk; one of another cluster or another node is an error.
func (n *NodeIdentity) load() error {
	data, err := os.ReadFile(filepath.Join(n.o.Dir, nodeCAFile))
	if err != nil {
		return err
	}
	if err := n.setTrust(data); err != nil {
		return err
	}
	client, err := readPair(filepath.Join(n.o.Dir, nodeClientFile))
	if err != nil {
		return err
	}
	serving, err := readPair(filepath.Join(n.o.Dir, nodeServingFile))
	if err != nil {
		return err
	}
	if client.Leaf.Subject.CommonName != NodeUserPrefix+n.o.Node {
		return fmt.Errorf("%s belongs to %s", n.o.Dir, client.Leaf.Subject.CommonName)
	}
	n.client, n.serving = client, serving
	return nil
}

func (n *NodeIdentity) setTrust(data []byte) error {
	if err := json.Unmarshal(data, &n.trust); err != nil {
		return err
	}
	var err error
	if n.serverCA, _, err = parseCert([]byte(n.trust.ServerCA)); err != nil {
		return err
	}
	if n.clientCA, _, err = parseCert([]byte(n.trust.ClientCA)); err != nil {
		return err
	}
	if fingerprint(n.serverCA) != n.o.Token.CAHash {
		return errors.New("the token is of another cluster")
	}
	return nil
}

// due says whether a certificate is to be renewed or lacks an address.
func (n *NodeIdentity) due() bool {
	now := n.o.Clock()
	return n.client.due(now) || n.serving.due(now) || !covers(n.serving.Leaf, n.o.Addresses)
}

// fetchCA gets the server's authority and checks it against the token: the one call that cannot verify the server yet,
// and which therefore sends nothing secret.
func fetchCA(ctx context.Context, o JoinOptions) (*x509.Certificate, error) {
	c := httpClient(&tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: true})
	defer c.CloseIdleConnections()
	body, err := call(ctx, c, http.MethodGet, o.Server, CAPath, nil, "")
	if err != nil {
		return nil, err
	}
	ca, _, err := parseCert(body)
	if err != nil {
		return nil, fmt.Errorf("%s answers, but not as a knarr server: %w", o.Server, err)
	}
	if fingerprint(ca) != o.Token.CAHash {
		return nil, errors.New("the server's authority is not the one that the token names: the token is of another cluster, or somebody stands in between")
	}
	return ca, nil
}

// enroll gets certificates for new keys from the server and puts them on disk.
func (n *NodeIdentity) enroll(ctx context.Context) error {
	secret, err := n.secret()
	if err != nil {
		return err
	}
	clientKey, clientRequest, err := newRequest()
	if err != nil {
		return err
	}
	servingKey, servingRequest, err := newRequest()
	if err != nil {
		return err
	}
	q, err := json.Marshal(joinRequest{Node: n.o.Node, Addresses: normalNames(n.o.Addresses), Secret: secret,
		ClientRequest: clientRequest, ServingRequest: servingRequest})
	if err != nil {
		return err
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: poolOf(n.serverCA)}
	if p := n.clientPair(); p != nil {
		config.Certificates = []tls.Certificate{*p.TLS()}
	}
	c := httpClient(config)
	defer c.CloseIdleConnections()
	body, err := call(ctx, c, http.MethodPost, n.o.Server, JoinPath, q, n.o.Token.Secret)
	if err != nil {
		return err
	}
	return n.accept(body, clientKey, servingKey)
}

// accept checks the server's answer, keeps it, and writes the trust last: load starts with it.
func (n *NodeIdentity) accept(body []byte, clientKey, servingKey *ecdsa.PrivateKey) error {
	var r joinResponse
	if err := json.Unmarshal(body, &r); err != nil {
		return err
	}
	client, err := parsePair(append([]byte(r.ClientCert), (&Pair{Key: clientKey}).KeyPEM()...))
	if err != nil {
		return err
	}
	serving, err := parsePair(append([]byte(r.ServingCert), (&Pair{Key: servingKey}).KeyPEM()...))
	if err != nil {
		return err
	}
	trust, err := json.Marshal(nodeTrust{ServerCA: r.ServerCA, ClientCA: r.ClientCA, Cluster: r.Cluster})
	if err != nil {
		return err
	}
	if err := errors.Join(
		writePair(filepath.Join(n.o.Dir, nodeClientFile), client),
		writePair(filepath.Join(n.o.Dir, nodeServingFile), serving),
		writeFile(filepath.Join(n.o.Dir, nodeCAFile), trust)); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.client, n.serving = client, serving
	if n.clientCA == nil { // the first time: nobody else knows n yet
		return n.setTrust(trust)
	}
	return nil
}

// secret is the node's own, made at its first join.
func (n *NodeIdentity) secret() (string, error) {
	path := filepath.Join(n.o.Dir, nodeSecretFile)
	b, err := os.ReadFile(path)
	if err == nil {
		return strings.TrimSpace(string(b)), nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	s, err := newSecret()
	if err != nil {
		return "", err
	}
	return s, writeFile(path, []byte(s+"\n"))
}

func newRequest() (*ecdsa.PrivateKey, string, error) {
	key, err := newKey()
	if err != nil {
		return nil, "", err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, "", err
	}
	return key, string(pem.EncodeToMemory(&pem.Block{Type: pemRequest, Bytes: der})), nil
}

func httpClient(c *tls.Config) *http.Client {
	return &http.Client{Timeout: joinTimeout, Transport: &http.Transport{TLSClientConfig: c}}
}

func call(ctx context.Context, c *http.Client, method, server, path string, body []byte, secret string) ([]byte, error) {
	u, err := url.JoinPath(server, path)
	if err != nil {
		return nil, err
	}
	r, err := http.NewRequestWithContext(ctx, method, u, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if secret != "" {
		r.Header.Set("Authorization", "Bearer "+secret)
	}
	resp, err := c.Do(r)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxJoinBody))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", resp.Status, strings.TrimSpace(string(answer)))
	}
	return answer, nil
}

func (n *NodeIdentity) clientPair() *Pair {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.client
}

func (n *NodeIdentity) servingPair() *Pair {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.serving
}

// Cluster is what the server told the node about the cluster, as JSON.
func (n *NodeIdentity) Cluster() json.RawMessage { return slices.Clone(n.trust.Cluster) }

// ServerCAPEM is the certificate by which the node knows the API.
func (n *NodeIdentity) ServerCAPEM() []byte { return certPEM(n.serverCA.Raw) }

// ClientCAPool verifies those who call the node's streaming API.
func (n *NodeIdentity) ClientCAPool() *x509.CertPool { return poolOf(n.clientCA) }

// ClientTLS is what the node calls the API with; renewals are seen by new connections.
func (n *NodeIdentity) ClientTLS() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{"h2", "http/1.1"},
		RootCAs:    poolOf(n.serverCA),
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return n.clientPair().TLS(), nil
		},
	}
}

// ServingTLS is what the node's streaming API listens with.
func (n *NodeIdentity) ServingTLS() *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS12,
		NextProtos:     []string{"h2", "http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return n.servingPair().TLS(), nil },
		ClientAuth:     tls.RequestClientCert,
		ClientCAs:      n.ClientCAPool(),
	}
}

// Kubeconfig is the node's own kubeconfig, for a cluster at its server.
func (n *NodeIdentity) Kubeconfig(cluster string) []byte {
	return Kubeconfig(cluster, NodeUserPrefix+n.o.Node, n.o.Server, n.ServerCAPEM(), n.clientPair())
}

// Maintain renews the node's certificates when they are due, until ctx ends. A server that cannot be reached is tried
// again; report is told of each failure.
func (n *NodeIdentity) Maintain(ctx context.Context, report func(error)) {
	for {
		next := renewAt(n.clientPair().Leaf)
		if s := renewAt(n.servingPair().Leaf); s.Before(next) {
			next = s
		}
		wait := next.Sub(n.o.Clock())
		if wait <= 0 {
			if err := n.enroll(ctx); err == nil {
				continue
			} else if report != nil && ctx.Err() == nil {
				report(fmt.Errorf("renew the certificates of node %s (the present ones end on %s): %w",
					n.o.Node, n.clientPair().Leaf.NotAfter.Format(time.DateOnly), err))
			}
			wait = renewRetry
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}
