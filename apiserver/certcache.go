package apiserver

import (
	"crypto/x509"
	"net/http"
	"sync"
	"time"

	"k8s.io/apiserver/pkg/authentication/authenticator"
)

// maxKnownCertificates bounds the client certificates whose verification is remembered.
const maxKnownCertificates = 4096

// certificateCache remembers what a client certificate proved: verifying its chain costs more than the rest of a small
// request. crypto/tls keeps one *x509.Certificate per distinct certificate while a connection uses it, so the pointer
// is the key. An entry is as good as the first verification until the certificate ends; the authorities are fixed
// for the life of the process.
type certificateCache struct {
	next authenticator.Request
	now  func() time.Time

	mu    sync.RWMutex
	known map[*x509.Certificate]*authenticator.Response // guarded by mu
}

func newCertificateCache(next authenticator.Request) *certificateCache {
	return &certificateCache{next: next, now: time.Now, known: map[*x509.Certificate]*authenticator.Response{}}
}

// AuthenticateRequest implements authenticator.Request.
func (c *certificateCache) AuthenticateRequest(req *http.Request) (*authenticator.Response, bool, error) {
	cert := soleCertificate(req)
	if cert == nil {
		return c.next.AuthenticateRequest(req)
	}
	now := c.now()
	c.mu.RLock()
	known := c.known[cert]
	c.mu.RUnlock()
	if known != nil && now.Before(cert.NotAfter) {
		return known, true, nil
	}
	response, ok, err := c.next.AuthenticateRequest(req)
	if err == nil && ok && now.Before(cert.NotAfter) {
		c.mu.Lock()
		if len(c.known) >= maxKnownCertificates {
			clear(c.known)
		}
		c.known[cert] = response
		c.mu.Unlock()
	}
	return response, ok, err
}

// soleCertificate gives the certificate of a request that brings no other proof of who it is from, else nil.
func soleCertificate(req *http.Request) *x509.Certificate {
	if req.TLS == nil || len(req.TLS.PeerCertificates) == 0 {
		return nil
	}
	h := req.Header
	if h["Authorization"] != nil || h["X-Remote-User"] != nil || h["Sec-Websocket-Protocol"] != nil {
		return nil
	}
	return req.TLS.PeerCertificates[0]
}
