package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"slices"
	"sort"
	"time"
)

// Lifetimes. A certificate is renewed when less than renewAtPercent of its life is left.
const (
	caLife         = 10 * 365 * 24 * time.Hour
	leafLife       = 365 * 24 * time.Hour
	renewAtPercent = 30
	// clockSkew is how far the clock of a node may be behind that of the server.
	clockSkew = 5 * time.Minute
)

const (
	pemCertificate = "CERTIFICATE"
	pemKey         = "EC PRIVATE KEY"
	pemRequest     = "CERTIFICATE REQUEST"
)

// Pair is a certificate with its private key. It is immutable.
type Pair struct {
	Leaf *x509.Certificate
	Key  *ecdsa.PrivateKey
}

// CertPEM is the certificate in PEM.
func (p *Pair) CertPEM() []byte { return certPEM(p.Leaf.Raw) }

// KeyPEM is the private key in PEM (SEC 1).
func (p *Pair) KeyPEM() []byte {
	der, err := x509.MarshalECPrivateKey(p.Key)
	if err != nil {
		panic("pki: a P-256 key of ours does not marshal: " + err.Error())
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemKey, Bytes: der})
}

// TLS is the pair as crypto/tls takes it.
func (p *Pair) TLS() *tls.Certificate {
	return &tls.Certificate{Certificate: [][]byte{p.Leaf.Raw}, PrivateKey: p.Key, Leaf: p.Leaf}
}

// renewAt is the moment from which the pair is to be replaced.
func renewAt(c *x509.Certificate) time.Time {
	life := c.NotAfter.Sub(c.NotBefore)
	return c.NotAfter.Add(-life * renewAtPercent / 100)
}

func (p *Pair) due(now time.Time) bool { return !now.Before(renewAt(p.Leaf)) }

func certPEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: der})
}

func newKey() (*ecdsa.PrivateKey, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

// serialNumber is 127 random bits: never negative, never zero in practice.
func serialNumber() (*big.Int, error) {
	return rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
}

// request says what a leaf certificate is for.
type request struct {
	name   string
	groups []string
	usage  x509.ExtKeyUsage
	names  []string // DNS names and IP addresses
	life   time.Duration
}

func template(subject pkix.Name, now time.Time, life time.Duration) (*x509.Certificate, error) {
	serial, err := serialNumber()
	if err != nil {
		return nil, err
	}
	return &x509.Certificate{
		SerialNumber:          serial,
		Subject:               subject,
		NotBefore:             now.Add(-clockSkew).UTC(),
		NotAfter:              now.Add(life).UTC(),
		BasicConstraintsValid: true,
	}, nil
}

// newCA makes a self-signed authority.
func newCA(name string, now time.Time) (*Pair, error) {
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	t, err := template(pkix.Name{CommonName: name, Organization: []string{"knarr"}}, now, caLife)
	if err != nil {
		return nil, err
	}
	t.IsCA = true
	t.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature
	return sign(t, t, key, &key.PublicKey, key)
}

// issue makes a key and a certificate for it, signed by ca.
func issue(ca *Pair, r request, now time.Time) (*Pair, error) {
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	return issueFor(ca, r, now, &key.PublicKey, key)
}

// issueFor signs a certificate for a public key; key is nil where only its owner has the private one.
func issueFor(ca *Pair, r request, now time.Time, pub *ecdsa.PublicKey, key *ecdsa.PrivateKey) (*Pair, error) {
	t, err := template(pkix.Name{CommonName: r.name, Organization: r.groups}, now, r.life)
	if err != nil {
		return nil, err
	}
	t.KeyUsage = x509.KeyUsageDigitalSignature
	t.ExtKeyUsage = []x509.ExtKeyUsage{r.usage}
	for _, n := range normalNames(r.names) {
		if ip := net.ParseIP(n); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else {
			t.DNSNames = append(t.DNSNames, n)
		}
	}
	return sign(t, ca.Leaf, ca.Key, pub, key)
}

func sign(t, parent *x509.Certificate, signer *ecdsa.PrivateKey, pub *ecdsa.PublicKey, key *ecdsa.PrivateKey) (*Pair, error) {
	der, err := x509.CreateCertificate(rand.Reader, t, parent, pub, signer)
	if err != nil {
		return nil, fmt.Errorf("sign certificate %q: %w", t.Subject.CommonName, err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &Pair{Leaf: leaf, Key: key}, nil
}

// normalNames sorts, removes doubles and empty names, and writes addresses in their canonical form.
func normalNames(names []string) []string {
	out := make([]string, 0, len(names))
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			n = ip.String()
		}
		if n != "" {
			out = append(out, n)
		}
	}
	sort.Strings(out)
	return slices.Compact(out)
}

// covers says whether c is valid for every one of names.
func covers(c *x509.Certificate, names []string) bool {
	for _, n := range normalNames(names) {
		if ip := net.ParseIP(n); ip != nil {
			if !slices.ContainsFunc(c.IPAddresses, ip.Equal) {
				return false
			}
		} else if !slices.Contains(c.DNSNames, n) {
			return false
		}
	}
	return true
}

// readPair reads a file of writePair. A missing file is os.ErrNotExist.
func readPair(path string) (*Pair, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	p, err := parsePair(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return p, nil
}

func parsePair(data []byte) (*Pair, error) {
	leaf, rest, err := parseCert(data)
	if err != nil {
		return nil, err
	}
	key, err := parseKey(rest)
	if err != nil {
		return nil, err
	}
	if !key.PublicKey.Equal(leaf.PublicKey) {
		return nil, errors.New("the private key does not belong to the certificate")
	}
	return &Pair{Leaf: leaf, Key: key}, nil
}

func parseCert(data []byte) (*x509.Certificate, []byte, error) {
	block, rest := pem.Decode(data)
	if block == nil || block.Type != pemCertificate {
		return nil, nil, errors.New("no certificate in PEM form found")
	}
	c, err := x509.ParseCertificate(block.Bytes)
	return c, rest, err
}

func parseKey(data []byte) (*ecdsa.PrivateKey, error) {
	block, _ := pem.Decode(data)
	if block == nil || block.Type != pemKey {
		return nil, errors.New("no EC private key in PEM form found")
	}
	return x509.ParseECPrivateKey(block.Bytes)
}

func writePair(path string, p *Pair) error {
	return writeFile(path, append(p.CertPEM(), p.KeyPEM()...))
}
