package pki

import (
	"bytes"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Kubeconfig writes a kubeconfig with everything embedded: it works on any machine that reaches server.
func Kubeconfig(cluster, user, server string, serverCA []byte, p *Pair) []byte {
	b64 := base64.StdEncoding.EncodeToString
	var b bytes.Buffer
	fmt.Fprintf(&b, `apiVersion: v1
kind: Config
current-context: %[1]s
clusters:
- name: %[1]s
  cluster:
    server: %[3]s
    certificate-authority-data: %[4]s
users:
- name: %[2]s
  user:
    client-certificate-data: %[5]s
    client-key-data: %[6]s
contexts:
- name: %[1]s
  context:
    cluster: %[1]s
    user: %[2]s
`, strconv.Quote(cluster), strconv.Quote(user), strconv.Quote(server), b64(serverCA), b64(p.CertPEM()), b64(p.KeyPEM()))
	return b.Bytes()
}

// kubeconfigCert returns the client certificate of a kubeconfig of Kubeconfig. A non-empty server or serverCA that differs
// from the file's is an error.
func kubeconfigCert(path, server string, serverCA []byte) (*x509.Certificate, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	fields := map[string]string{}
	for line := range strings.Lines(string(data)) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), ": "); ok {
			fields[k] = v
		}
	}
	if server != "" && fields["server"] != strconv.Quote(server) {
		return nil, fmt.Errorf("%s is for server %s", path, fields["server"])
	}
	if len(serverCA) > 0 && fields["certificate-authority-data"] != base64.StdEncoding.EncodeToString(serverCA) {
		return nil, fmt.Errorf("%s is for another cluster", path)
	}
	der, err := base64.StdEncoding.DecodeString(fields["client-certificate-data"])
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	c, _, err := parseCert(der)
	return c, err
}
