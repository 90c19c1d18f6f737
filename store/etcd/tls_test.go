package etcd_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"knarr/store"
	"knarr/store/etcd"
	"knarr/store/storetest"
)

// authority makes certificates.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	a := &authority{t: t, dir: t.TempDir()}
	a.cert, a.key = a.issue("ca", &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	return a
}

// issue writes a certificate and its key to files of that name.
func (a *authority) issue(name string, template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	require.NoError(a.t, err)
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.Subject = pkix.Name{CommonName: name}
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := template, key
	if a.cert != nil {
		parent, signer = a.cert, a.key
	}
	der, err := x509.CreateCertificate(crand.Reader, template, parent, key.Public(), signer)
	require.NoError(a.t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(a.t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(a.t, err)
	a.write(name+".crt", "CERTIFICATE", der)
	a.write(name+".key", "PRIVATE KEY", keyDER)
	return cert, key
}

func (a *authority) write(name, kind string, der []byte) {
	a.t.Helper()
	require.NoError(a.t, os.WriteFile(a.file(name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
}

func (a *authority) file(name string) string { return filepath.Join(a.dir, name) }

func TestTLS(t *testing.T) {
	a := newAuthority(t)
	address := freshAddress()
	ip := net.ParseIP(strings.TrimSuffix(address, ":0"))
	usage := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	a.issue("server", &x509.Certificate{IPAddresses: []net.IP{ip}, ExtKeyUsage: usage})
	a.issue("client", &x509.Certificate{ExtKeyUsage: usage})
	s := &server{t: t, dir: t.TempDir(), args: []string{
		"-no-fsync", "-cert", a.file("server.crt"), "-key", a.file("server.key"), "-client-ca", a.file("ca.crt"),
	}}
	s.start(address)
	t.Cleanup(s.kill)
	o := etcd.Options{
		Endpoints: []string{s.url}, CAFile: a.file("ca.crt"), CertFile: a.file("client.crt"), KeyFile: a.file("client.key"),
	}
	engine, err := etcd.Open(t.Context(), o)
	require.NoError(t, err)
	st, tab := openOn(t, engine)
	_, err = st.Txn(t.Context(), store.Op{Table: tab, Key: storetest.Pods + "a", Object: storetest.Object("a", "")})
	require.NoError(t, err)
	o.RequestTimeout = 500 * time.Millisecond
	withoutCert, withoutCA := o, o
	withoutCert.CertFile, withoutCert.KeyFile = "", ""
	withoutCA.CAFile = ""
	for i, bad := range []etcd.Options{withoutCert, withoutCA} {
		_, err := etcd.Open(t.Context(), bad)
		require.ErrorContains(t, err, "certificate", fmt.Sprint("case ", i))
	}
}
