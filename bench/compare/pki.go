package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// certificateLife is longer than any comparison.
const certificateLife = 24 * time.Hour

// authority issues the certificates of an upstream cluster into a directory, as <name>.crt and <name>.key.
type authority struct {
	dir, name string
	key       *ecdsa.PrivateKey
	cert      *x509.Certificate
}

func newAuthority(dir, name string) (*authority, error) {
	a := &authority{dir: dir, name: name}
	template := template(name)
	template.IsCA, template.KeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageDigitalSignature
	var err error
	if a.key, a.cert, err = a.sign(name, template); err != nil {
		return nil, err
	}
	return a, nil
}

func template(name string, groups ...string) *x509.Certificate {
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		panic(err) // the kernel has no randomness: nothing works
	}
	return &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: name, Organization: groups}, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(certificateLife), KeyUsage: x509.KeyUsageDigitalSignature}
}

// issue makes a certificate for clients, and for a server where it has addresses.
func (a *authority) issue(file, user, group string, names []string, addresses ...string) error {
	var groups []string
	if group != "" {
		groups = []string{group}
	}
	t := template(user, groups...)
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	t.DNSNames = names
	for _, ip := range addresses {
		t.IPAddresses = append(t.IPAddresses, net.ParseIP(ip))
		t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	}
	_, _, err := a.sign(file, t)
	return err
}

// sign makes a key and its certificate, signed by the authority or, where it has none yet, by itself.
func (a *authority) sign(file string, t *x509.Certificate) (*ecdsa.PrivateKey, *x509.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = t, key
	}
	der, err := x509.CreateCertificate(rand.Reader, t, parent, key.Public(), signer)
	if err != nil {
		return nil, nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, err
	}
	if err := writePEM(filepath.Join(a.dir, file+".crt"), "CERTIFICATE", der); err != nil {
		return nil, nil, err
	}
	return key, cert, writeKey(filepath.Join(a.dir, file+".key"), key)
}

func writeKey(file string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return writePEM(file, "EC PRIVATE KEY", der)
}

func writePEM(file, kind string, der []byte) error {
	return os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

// kubeconfig writes <file>.kubeconfig, for a user whose certificate it makes.
func (a *authority) kubeconfig(file, user, group, server string) error {
	if err := a.issue(file, user, group, nil); err != nil {
		return err
	}
	path := func(name string) string { return filepath.Join(a.dir, name) }
	c := clientcmdapi.NewConfig()
	c.Clusters["x"] = &clientcmdapi.Cluster{Server: server, CertificateAuthority: path(a.name + ".crt")}
	c.AuthInfos["x"] = &clientcmdapi.AuthInfo{ClientCertificate: path(file + ".crt"), ClientKey: path(file + ".key")}
	c.Contexts["x"] = &clientcmdapi.Context{Cluster: "x", AuthInfo: "x"}
	c.CurrentContext = "x"
	return clientcmd.WriteToFile(*c, path(file+".kubeconfig"))
}
