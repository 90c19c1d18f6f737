package pki

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
)

// Paths of JoinHandler. They are answered before any authentication of the API: they bring their own.
const (
	CAPath   = "/knarr/v1/ca"
	JoinPath = "/knarr/v1/join"
)

// maxJoinBody bounds a join request and its answer, in bytes.
const maxJoinBody = 64 << 10

// maxNodeNames bounds the names and addresses of one node's certificate.
const maxNodeNames = 64

// joinRequest is what a node sends to JoinPath.
type joinRequest struct {
	Node      string   `json:"node"`
	Addresses []string `json:"addresses"`
	// Secret is the node's own, made at its first join: see claimNode.
	Secret string `json:"secret"`
	// ClientRequest and ServingRequest are PEM certificate requests; only their public keys count.
	ClientRequest  string `json:"clientRequest"`
	ServingRequest string `json:"servingRequest"`
}

// joinResponse is the answer.
type joinResponse struct {
	ClientCert  string `json:"clientCert"`
	ServingCert string `json:"servingCert"`
	ServerCA    string `json:"serverCA"`
	ClientCA    string `json:"clientCA"`
	// Cluster is what the server wants its nodes to know (ranges, DNS address, ...).
	Cluster json.RawMessage `json:"cluster"`
}

// JoinHandler serves CAPath (anybody may read the server authority's certificate; the token's hash says whether to believe
// it) and JoinPath (certificates for a node, against the join token, or against the node's present certificate to renew
// it). cluster is sent along to nodes as JSON.
func (a *Authority) JoinHandler(cluster any) (http.Handler, error) {
	info, err := json.Marshal(cluster)
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+CAPath, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/x-pem-file")
		w.Write(a.ServerCAPEM())
	})
	mux.HandleFunc("POST "+JoinPath, func(w http.ResponseWriter, r *http.Request) { a.join(w, r, info) })
	return mux, nil
}

func (a *Authority) join(w http.ResponseWriter, r *http.Request, info json.RawMessage) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxJoinBody))
	if err != nil {
		http.Error(w, "the request is too large", http.StatusRequestEntityTooLarge)
		return
	}
	var q joinRequest
	if err := json.Unmarshal(body, &q); err != nil {
		http.Error(w, "the request is no JSON of a join: "+err.Error(), http.StatusBadRequest)
		return
	}
	if !a.mayJoin(r, q.Node) {
		http.Error(w, "the join token is not valid: `knarr token` on the server prints the present one", http.StatusUnauthorized)
		return
	}
	answer, status, err := a.admit(q)
	if err != nil {
		http.Error(w, err.Error(), status)
		return
	}
	answer.Cluster = info
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(answer)
}

// mayJoin accepts the join token, and for a renewal the node's own valid certificate.
func (a *Authority) mayJoin(r *http.Request, node string) bool {
	if secret, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); ok && a.checkSecret(secret) {
		return true
	}
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return false
	}
	c := r.TLS.PeerCertificates[0]
	_, err := c.Verify(x509.VerifyOptions{Roots: a.ClientCAPool(), CurrentTime: a.clock(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	return err == nil && c.Subject.CommonName == NodeUserPrefix+node
}

var nodeNamePattern = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$`)

// admit issues a node's certificates. The status goes with the error.
func (a *Authority) admit(q joinRequest) (*joinResponse, int, error) {
	if !nodeNamePattern.MatchString(q.Node) {
		return nil, http.StatusBadRequest, fmt.Errorf("%q is not a node name", q.Node)
	}
	if len(q.Addresses) > maxNodeNames || len(q.Secret) < secretBytes {
		return nil, http.StatusBadRequest, errors.New("too many addresses or too short a node secret")
	}
	clientKey, err := requestKey(q.ClientRequest)
	if err != nil {
		return nil, http.StatusBadRequest, err
	}
	servingKey, err := requestKey(q.ServingRequest)
	if err != nil {
		return nil, http.StatusBadRequest, err
	}
	if err := a.claimNode(q.Node, q.Secret); err != nil {
		if errors.Is(err, errNodeTaken) {
			return nil, http.StatusConflict, fmt.Errorf("node %q: %w", q.Node, err)
		}
		return nil, http.StatusInternalServerError, err
	}
	name, now := NodeUserPrefix+q.Node, a.clock()
	client, err := issueFor(a.clientCA, request{name: name, groups: []string{NodeGroup}, usage: x509.ExtKeyUsageClientAuth, life: leafLife}, now, clientKey, nil)
	if err != nil {
		return nil, http.StatusInternalServerError, err
	}
	serving, err := issueFor(a.serverCA, request{name: name, groups: []string{NodeGroup}, usage: x509.ExtKeyUsageServerAuth,
		names: append([]string{q.Node}, q.Addresses...), life: leafLife}, now, servingKey, nil)
	if err != nil {
		return nil, http.StatusInternalServerError, err
	}
	return &joinResponse{ClientCert: string(client.CertPEM()), ServingCert: string(serving.CertPEM()),
		ServerCA: string(a.ServerCAPEM()), ClientCA: string(a.ClientCAPEM())}, http.StatusOK, nil
}

// requestKey returns the public key of a certificate request whose signature proves that its sender has the private one.
func requestKey(text string) (*ecdsa.PublicKey, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil || block.Type != pemRequest {
		return nil, errors.New("no certificate request in PEM form found")
	}
	q, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, err
	}
	if err := q.CheckSignature(); err != nil {
		return nil, err
	}
	key, ok := q.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		return nil, errors.New("the certificate request has no ECDSA key")
	}
	return key, nil
}
