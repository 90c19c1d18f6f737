package agent_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	cryptorand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	restclient "k8s.io/client-go/rest"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	utilexec "k8s.io/client-go/util/exec"
	statsapi "k8s.io/kubelet/pkg/apis/stats/v1alpha1"

	"knarr/node/agent"
)

// authority is a certificate authority for one test.
type authority struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t testing.TB) *authority {
	key, err := ecdsa.GenerateKey(elliptic.P256(), cryptorand.Reader)
	require.NoError(t, err)
	a := &authority{t: t, key: key}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(cryptorand.Reader, tmpl, tmpl, &key.PublicKey, key)
	require.NoError(t, err)
	a.cert, err = x509.ParseCertificate(der)
	require.NoError(t, err)
	return a
}

func (a *authority) issue(name string, groups ...string) tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), cryptorand.Reader)
	require.NoError(a.t, err)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name, Organization: groups},
		NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(cryptorand.Reader, tmpl, a.cert, &key.PublicKey, a.key)
	require.NoError(a.t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func (a *authority) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.cert)
	return p
}

// config is a client's configuration with a certificate of the authority.
func (a *authority) config(host, name string, groups ...string) *restclient.Config {
	cert := a.issue(name, groups...)
	der, err := x509.MarshalECPrivateKey(cert.PrivateKey.(*ecdsa.PrivateKey))
	require.NoError(a.t, err)
	block := func(kind string, b []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}) }
	return &restclient.Config{Host: "https://" + host, TLSClientConfig: restclient.TLSClientConfig{
		CAData: block("CERTIFICATE", a.cert.Raw), CertData: block("CERTIFICATE", cert.Certificate[0]), KeyData: block("EC PRIVATE KEY", der)}}
}

func TestNodeAPI(t *testing.T) {
	ca := newAuthority(t)
	n := newNode(t, func(o *agent.Options) {
		o.ServingTLS = &tls.Config{Certificates: []tls.Certificate{ca.issue("node")}, ClientCAs: ca.pool()}
		o.ListenAddress = "127.0.0.1:0"
	})
	n.create(pod("api", "echo begin; echo oops >&2; while [ ! -e /tmp/go ]; do sleep 0.05; done; echo end; echo forwarded > /tmp/index.html; exec httpd -f -p 8080 -h /tmp"))
	n.until("api", "running", running)
	require.Eventually(t, func() bool { return n.agent.Address() != "" }, wait, time.Millisecond)
	master := ca.config(n.agent.Address(), "apiserver", "system:masters")
	client, err := restclient.HTTPClientFor(master)
	require.NoError(t, err)
	for name, test := range map[string]func(*testing.T, *node, *restclient.Config, *http.Client){
		"logs": testLogs, "exec": testExec, "portforward": testForward, "stats": testStats,
	} {
		t.Run(name, func(t *testing.T) {
			sub := *n
			sub.t = t
			test(t, &sub, master, client)
		})
	}
	t.Run("access", func(t *testing.T) { testAccess(t, n, ca) })
}

func fetch(t *testing.T, c *http.Client, u string) (int, string) {
	resp, err := c.Get(u)
	require.NoError(t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp.StatusCode, string(b)
}

func testLogs(t *testing.T, n *node, cfg *restclient.Config, c *http.Client) {
	base := cfg.Host + "/containerLogs/default/api/main"
	require.Eventually(t, func() bool {
		_, body := fetch(t, c, base)
		return strings.Contains(body, "begin") && strings.Contains(body, "oops")
	}, wait, 10*time.Millisecond)
	_, body := fetch(t, c, base+"?stream=Stderr")
	require.Equal(t, "oops\n", body)
	_, body = fetch(t, c, base+"?tailLines=1&timestamps=true")
	require.Regexp(t, `^20\S+Z (begin|oops|end)\n$`, body)
	_, body = fetch(t, c, base+"?limitBytes=3&stream=Stdout")
	require.Equal(t, "beg", body)
	code, body := fetch(t, c, base+"?previous=true")
	require.Equal(t, http.StatusBadRequest, code)
	require.Equal(t, `previous terminated container "main" in pod "api" not found`, strings.TrimSpace(body))
	code, _ = fetch(t, c, cfg.Host+"/containerLogs/default/none/main")
	require.Equal(t, http.StatusNotFound, code)

	resp, err := c.Get(base + "?follow=true&sinceSeconds=1000")
	require.NoError(t, err)
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() && lines.Text() != "begin" {
	}
	n.exec("api", "main", "touch", "/tmp/go")
	begin := time.Now()
	for lines.Scan() && lines.Text() != "end" {
	}
	require.Equal(t, "end", lines.Text())
	require.Less(t, time.Since(begin), 2*time.Second)
}

func execURL(host, name string, cmd ...string) *url.URL {
	u, _ := url.Parse(host + "/exec/default/" + name + "/main")
	u.RawQuery = url.Values{"command": cmd, "input": {"1"}, "output": {"1"}, "error": {"1"}}.Encode()
	return u
}

func testExec(t *testing.T, _ *node, cfg *restclient.Config, _ *http.Client) {
	e, err := remotecommand.NewSPDYExecutor(cfg, "POST", execURL(cfg.Host, "api", "sh", "-c", "cat; echo err >&2; exit 3"))
	require.NoError(t, err)
	var stdout, stderr bytes.Buffer
	err = e.StreamWithContext(context.Background(), remotecommand.StreamOptions{Stdin: strings.NewReader("typed"), Stdout: &stdout, Stderr: &stderr})
	var exit utilexec.ExitError
	require.ErrorAs(t, err, &exit)
	require.Equal(t, 3, exit.ExitStatus())
	require.Equal(t, "typed", stdout.String())
	require.Equal(t, "err\n", stderr.String())
	e, err = remotecommand.NewSPDYExecutor(cfg, "POST", execURL(cfg.Host, "none", "true"))
	require.NoError(t, err)
	require.ErrorContains(t, e.StreamWithContext(context.Background(), remotecommand.StreamOptions{Stdin: strings.NewReader(""), Stdout: &stdout, Stderr: &stderr}), `pod "none" does not exist`)
}

func testForward(t *testing.T, n *node, cfg *restclient.Config, _ *http.Client) {
	n.exec("api", "main", "sh", "-c", "touch /tmp/go; until wget -qO- http://127.0.0.1:8080/; do sleep 0.05; done")
	transport, upgrader, err := spdy.RoundTripperFor(cfg)
	require.NoError(t, err)
	u, _ := url.Parse(cfg.Host + "/portForward/default/api")
	stop, ready := make(chan struct{}), make(chan struct{})
	f, err := portforward.New(spdy.NewDialer(upgrader, &http.Client{Transport: transport}, "POST", u), []string{"0:8080"}, stop, ready, io.Discard, io.Discard)
	require.NoError(t, err)
	done := make(chan error, 1)
	go func() { done <- f.ForwardPorts() }()
	defer func() { close(stop); <-done }()
	select {
	case <-ready:
	case err := <-done:
		t.Fatal(err)
	}
	ports, err := f.GetPorts()
	require.NoError(t, err)
	resp, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/", ports[0].Local))
	require.NoError(t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.Equal(t, "forwarded\n", string(b))
}

func testStats(t *testing.T, _ *node, cfg *restclient.Config, c *http.Client) {
	code, body := fetch(t, c, cfg.Host+"/stats/summary")
	require.Equal(t, http.StatusOK, code, body)
	var sum statsapi.Summary
	require.NoError(t, json.Unmarshal([]byte(body), &sum))
	require.Len(t, sum.Pods, 1)
	require.Positive(t, *sum.Pods[0].Containers[0].Memory.WorkingSetBytes)
	require.Positive(t, *sum.Pods[0].Containers[0].CPU.UsageCoreNanoSeconds)
	require.Positive(t, *sum.Node.CPU.UsageCoreNanoSeconds)
	_, body = fetch(t, c, cfg.Host+"/metrics/resource")
	require.Contains(t, body, `container_memory_working_set_bytes{container="main",namespace="default",pod="api"}`)
	require.Contains(t, body, "resource_scrape_error 0")
	_, body = fetch(t, c, cfg.Host+"/pods")
	var pods v1.PodList
	require.NoError(t, json.Unmarshal([]byte(body), &pods))
	require.Equal(t, "api", pods.Items[0].Name)
	code, body = fetch(t, c, cfg.Host+"/healthz")
	require.Equal(t, http.StatusOK, code)
	require.Equal(t, "ok", body)
}

// testAccess: who has no certificate needs a token; what they may do, the API says.
func testAccess(t *testing.T, n *node, ca *authority) {
	n.client.PrependReactor("create", "tokenreviews", func(a clienttesting.Action) (bool, runtime.Object, error) {
		r := a.(clienttesting.CreateAction).GetObject().(*authenticationv1.TokenReview).DeepCopy()
		r.Status.Authenticated, r.Status.User.Username = r.Spec.Token == "good", "metrics"
		return true, r, nil
	})
	n.client.PrependReactor("create", "subjectaccessreviews", func(a clienttesting.Action) (bool, runtime.Object, error) {
		r := a.(clienttesting.CreateAction).GetObject().(*authorizationv1.SubjectAccessReview).DeepCopy()
		at := r.Spec.ResourceAttributes
		r.Status.Allowed = r.Spec.User == "metrics" && at.Resource == "nodes" && at.Subresource == "metrics" && at.Verb == "get" && at.Name == nodeName
		return true, r, nil
	})
	c := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: ca.pool()}}}
	defer c.CloseIdleConnections()
	get := func(path, token string) int {
		req, err := http.NewRequest("GET", "https://"+n.agent.Address()+path, nil)
		require.NoError(t, err)
		if token != "" {
			req.Header.Set("Authorization", "Bearer "+token)
		}
		resp, err := c.Do(req)
		require.NoError(t, err)
		_ = resp.Body.Close()
		return resp.StatusCode
	}
	require.Equal(t, http.StatusUnauthorized, get("/pods", ""))
	require.Equal(t, http.StatusUnauthorized, get("/pods", "bad"))
	require.Equal(t, http.StatusForbidden, get("/pods", "good"))
	require.Equal(t, http.StatusOK, get("/metrics/resource", "good"))
	client, err := restclient.HTTPClientFor(ca.config(n.agent.Address(), "someone"))
	require.NoError(t, err)
	code, body := fetch(t, client, "https://"+n.agent.Address()+"/pods")
	require.Equal(t, http.StatusForbidden, code)
	require.Contains(t, body, "Forbidden (user=someone, verb=get, resource=nodes, subresource(s)=[pods proxy])")
}
