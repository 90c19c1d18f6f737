package pki

import (
	"crypto/tls"
	"sync"
	"time"
)

// Source is a certificate that is always fresh: each use may replace it when it is due or when its names have changed.
// All methods may be called concurrently. A failed renewal is no error as long as the old certificate is valid.
type Source struct {
	clock func() time.Time
	issue func() (*Pair, error)
	// names are the names that the certificate must cover now; nil where it has none.
	names func() []string

	mu      sync.Mutex
	current *Pair // guarded by mu
}

// Pair returns the current certificate, after renewing it where that is due.
func (s *Source) Pair() (*Pair, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.clock()
	if p := s.current; p != nil && !p.due(now) && (s.names == nil || covers(p.Leaf, s.names())) {
		return p, nil
	}
	p, err := s.issue()
	if err == nil {
		s.current = p
		return p, nil
	}
	if s.current != nil && now.Before(s.current.Leaf.NotAfter) {
		return s.current, nil
	}
	return nil, err
}

// GetCertificate serves the certificate: set it in a tls.Config of a server.
func (s *Source) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.tls() }

// GetClientCertificate shows the certificate: set it in a tls.Config of a client.
func (s *Source) GetClientCertificate(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	return s.tls()
}

func (s *Source) tls() (*tls.Certificate, error) {
	p, err := s.Pair()
	if err != nil {
		return nil, err
	}
	return p.TLS(), nil
}
