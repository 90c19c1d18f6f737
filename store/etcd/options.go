package etcd

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

// Bounds and their defaults.
const (
	// DefaultPrefix is upstream's --etcd-prefix.
	DefaultPrefix = "/registry/"
	// DefaultRequestTimeout bounds one request to etcd, and the wait for its publication.
	DefaultRequestTimeout = 10 * time.Second
	// DefaultCompactEvery is upstream's --etcd-compaction-interval.
	DefaultCompactEvery = 5 * time.Minute

	// keepAlive and keepAliveTimeout find a connection that is dead without having been closed; upstream's values.
	keepAlive        = 30 * time.Second
	keepAliveTimeout = 10 * time.Second
	// dialTimeout bounds one attempt to connect.
	dialTimeout = 5 * time.Second
	// statusTimeout bounds the question for one member's version.
	statusTimeout = time.Second
	// retryMin and retryMax bound the pause before the connection and the watch are tried again.
	retryMin = 50 * time.Millisecond
	retryMax = 2 * time.Second
	// progressEvery is the pause between requests for a progress notification, while somebody waits for a revision.
	progressEvery = 50 * time.Millisecond
	// pageKeys bounds the keys of one page when a prefix is read.
	pageKeys = 500
	// maxMessage bounds one message of the watch, in bytes; etcd splits what is larger than its own request limit.
	maxMessage = 64 << 20
	// tailRevisions is how much of etcd's history Start reads.
	tailRevisions = 5000
	// maxDirs bounds the directories of keys whose last deletion is remembered.
	maxDirs = 8192
)

// Options of an engine. A bound of zero means its default.
type Options struct {
	// Endpoints of the cluster, such as "https://10.0.0.1:2379". Required.
	Endpoints []string
	// Prefix that all keys lie under; begins and ends with a slash.
	Prefix string
	// CAFile has the authorities that etcd's certificates come from; empty: the system's. CertFile and KeyFile are what the client shows; both
	// or none. They are read again at each new connection.
	CAFile, CertFile, KeyFile string
	// RequestTimeout bounds one request.
	RequestTimeout time.Duration
	// CompactEvery is the time between compactions; negative: somebody else compacts.
	CompactEvery time.Duration
	// Logger gets what happens to the connection; nil: nobody.
	Logger *slog.Logger
}

func (o *Options) setDefaults() error {
	if len(o.Endpoints) == 0 {
		return errors.New("etcd: no endpoint is given; name at least one, such as https://10.0.0.1:2379")
	}
	if o.Prefix == "" {
		o.Prefix = DefaultPrefix
	}
	if len(o.Prefix) < 2 || o.Prefix[0] != '/' || !strings.HasSuffix(o.Prefix, "/") {
		return fmt.Errorf("etcd: prefix %q must begin and end with a slash", o.Prefix)
	}
	if (o.CertFile == "") != (o.KeyFile == "") {
		return errors.New("etcd: a client certificate needs both its file and its key's")
	}
	if o.RequestTimeout <= 0 {
		o.RequestTimeout = DefaultRequestTimeout
	}
	if o.CompactEvery == 0 {
		o.CompactEvery = DefaultCompactEvery
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// dial makes the client; it connects when it is first used.
func (o *Options) dial() (*clientv3.Client, error) {
	cfg := clientv3.Config{
		Endpoints:            o.Endpoints,
		DialTimeout:          dialTimeout,
		DialKeepAliveTime:    keepAlive,
		DialKeepAliveTimeout: keepAliveTimeout,
		Logger:               zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: retryMin, Multiplier: 2, Jitter: 0.2, MaxDelay: retryMax},
			MinConnectTimeout: dialTimeout,
		})},
	}
	secure := o.CAFile != "" || o.CertFile != ""
	for _, ep := range o.Endpoints {
		secure = secure || strings.HasPrefix(ep, "https://")
		if strings.HasPrefix(ep, "http://") && (o.CAFile != "" || o.CertFile != "") {
			return nil, fmt.Errorf("etcd: endpoint %s is not encrypted, but certificates are given; use https://", ep)
		}
	}
	if secure {
		var err error
		if cfg.TLS, err = o.tls(); err != nil {
			return nil, err
		}
	}
	c, err := clientv3.New(cfg)
	if err != nil {
		return nil, fmt.Errorf("etcd: endpoints %v: %w", o.Endpoints, err)
	}
	return c, nil
}

func (o *Options) tls() (*tls.Config, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	if o.CAFile != "" {
		pem, err := os.ReadFile(o.CAFile)
		if err != nil {
			return nil, fmt.Errorf("etcd: read the authorities: %w", err)
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("etcd: %s has no PEM certificate", o.CAFile)
		}
	}
	if o.CertFile == "" {
		return cfg, nil
	}
	load := func() (*tls.Certificate, error) {
		cert, err := tls.LoadX509KeyPair(o.CertFile, o.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("etcd: client certificate %s with key %s: %w", o.CertFile, o.KeyFile, err)
		}
		return &cert, nil
	}
	if _, err := load(); err != nil {
		return nil, err
	}
	cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() }
	return cfg, nil
}
