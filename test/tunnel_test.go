package test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"k8s.io/client-go/util/cert"

	"knarr/internal/rig"
	"knarr/network/netns"
)

// wallTable is the firewall of a node that nobody can dial.
const wallTable = "knarr-e2e-wall"

// TestNodeBehindAWall: the server cannot dial the node nor its pods, only the node can dial the server. All that streams
// works, over WebSockets and over SPDY; without a tunnel it fails and says why; it works again with the server that comes back.
func TestNodeBehindAWall(t *testing.T) {
	c := theCluster(t)
	w := behindWall(t, c)
	w.inbound(t)
	spdy := *c
	spdy.Env = append([]string{"KUBECTL_REMOTE_COMMAND_WEBSOCKETS=false", "KUBECTL_PORT_FORWARD_WEBSOCKETS=false"}, c.Env...)
	t.Run("WebSockets", func(t *testing.T) { w.streams(t, c) })
	t.Run("SPDY", func(t *testing.T) { w.streams(t, &spdy) })
	t.Run("proxies", func(t *testing.T) { w.proxies(t, c) })
	t.Run("webhook", func(t *testing.T) { w.webhook(t, c) })

	w.outbound(t)
	server := part(t, c, "server", "")
	require.NoError(t, syscall.Kill(server.PID, syscall.SIGKILL))
	_, err := c.Up(t.Context(), nodes)
	require.NoError(t, err)
	_, err = spdy.Kubectl(t.Context(), "exec", "-n", w.ns, "web", "--", "true") // over WebSockets, kubectl would try twice
	require.ErrorContains(t, err, fmt.Sprintf("node %q cannot be reached directly, and its agent keeps no tunnel to this server", w.node))

	w.nft(t, "delete chain inet "+wallTable+" outbound")
	eventually(t, settle, "the agent's tunnel is back", func() (bool, string) {
		_, err := c.Kubectl(t.Context(), "exec", "-n", w.ns, "web", "--", "true")
		return err == nil, fmt.Sprint(err)
	})
	t.Run("WebSockets, after a restart", func(t *testing.T) { w.streams(t, c) })
	t.Run("proxies, after a restart", func(t *testing.T) { w.proxies(t, c) })
}

// runDir is where knarr keeps the namespaces of nodes.
const runDir = "/run/knarr"

// wall is a node with a firewall, and a pod on it.
type wall struct {
	netns, node, ns string
	nodeIP, podIP   string
}

// behindWall starts a pod and its service on the cluster's second node, which has no wall yet.
func behindWall(t *testing.T, c *rig.Cluster) *wall {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(runDir, "*", c.Name, "netns", "1"))
	require.NoError(t, err)
	require.Len(t, found, 1)
	w := &wall{netns: found[0], node: c.Name + "-1", ns: namespace(t, c)}
	_, err = c.KubectlStdin(t.Context(), strings.NewReader(fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  nodeName: %s
  terminationGracePeriodSeconds: 0
  containers:
  - name: web
    image: busybox:1
    command: [sh, -c, "mkdir -p /www; echo served > /www/index.html; httpd -p 8080 -h /www; while true; do echo tick; sleep 0.2; done"]
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
`, w.node)), "apply", "-n", w.ns, "-f", "-")
	require.NoError(t, err)
	mustBeReady(t, c, w.ns)
	w.podIP = must(t, c, "get", "pod", "web", "-n", w.ns, "-o", "jsonpath={.status.podIP}")
	w.nodeIP = must(t, c, "get", "node", w.node, "-o", `jsonpath={.status.addresses[?(@.type=="InternalIP")].address}`)
	return w
}

// nft changes the rules of the node's namespace.
func (w *wall) nft(t *testing.T, rules string) {
	t.Helper()
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules)
	var said bytes.Buffer
	cmd.Stderr = &said
	require.NoError(t, netns.Run(t.Context(), w.netns, cmd), said.String())
}

// inbound lets nobody dial the node or its pods; the wall is gone at the test's end.
func (w *wall) inbound(t *testing.T) {
	t.Helper()
	w.nft(t, "table inet "+wallTable+` {
		chain inbound { type filter hook prerouting priority -150; iifname "eth0" ct state new drop; }
	}`)
	t.Cleanup(func() {
		require.NoError(t, netns.Run(context.Background(), w.netns, exec.Command("nft", "delete", "table", "inet", wallTable)))
	})
	for _, address := range []string{w.nodeIP + ":" + kubeletPort, w.podIP + ":8080"} {
		_, err := net.DialTimeout("tcp", address, 300*time.Millisecond)
		require.ErrorContains(t, err, "timeout", "the machine must not reach %s", address)
	}
}

// outbound lets the node dial no server.
func (w *wall) outbound(t *testing.T) {
	t.Helper()
	w.nft(t, "table inet "+wallTable+` {
		chain outbound { type filter hook output priority 0; tcp dport `+apiPort+` ct state new drop; }
	}`)
}

// streams uses each way of streaming once.
func (w *wall) streams(t *testing.T, c *rig.Cluster) {
	t.Helper()
	data := make([]byte, 300<<10)
	_, err := rand.Read(data)
	require.NoError(t, err)
	text := base64.StdEncoding.EncodeToString(data)
	echoed, err := c.KubectlStdin(t.Context(), strings.NewReader(text), "exec", "-i", "-n", w.ns, "web", "--", "cat")
	require.NoError(t, err)
	require.Equal(t, text, echoed, "what goes in comes out, all of it")
	_, err = c.Kubectl(t.Context(), "exec", "-n", w.ns, "web", "--", "sh", "-c", "exit 7")
	require.ErrorContains(t, err, "exit code 7")

	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "a"), data, 0o600))
	must(t, c, "cp", "-n", w.ns, filepath.Join(dir, "a"), "web:/tmp/a")
	must(t, c, "cp", "-n", w.ns, "web:/tmp/a", filepath.Join(dir, "b"))
	copied, err := os.ReadFile(filepath.Join(dir, "b"))
	require.NoError(t, err)
	require.Equal(t, data, copied)

	require.Equal(t, "tick", firstLine(t, c, nil, "logs", "-f", "-n", w.ns, "web"))
	require.Equal(t, "tick", firstLine(t, c, nil, "attach", "-n", w.ns, "web"))
	firstLine(t, c, func(line string) {
		local, _, ok := strings.Cut(strings.TrimPrefix(line, "Forwarding from "), " ->")
		require.True(t, ok, line)
		require.Equal(t, "served\n", httpGet(t, "http://"+local+"/"))
	}, "port-forward", "-n", w.ns, "pod/web", "--address", "127.0.0.1", ":8080")
}

func httpGet(t *testing.T, url string) string {
	t.Helper()
	client := &http.Client{Timeout: settle, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get(url)
	require.NoError(t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return string(b)
}

// firstLine runs a kubectl that does not end by itself until it has said a line and then has done.
func firstLine(t *testing.T, c *rig.Cluster, then func(string), args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), settle)
	defer cancel()
	cmd := c.KubectlCommand(ctx, args...)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	defer cmd.Wait()
	defer cancel()
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err, said.String())
	line = strings.TrimSpace(line)
	if then != nil {
		then(line)
	}
	return line
}

// proxies uses the API server's own proxies, to the node, a pod and a service.
func (w *wall) proxies(t *testing.T, c *rig.Cluster) {
	t.Helper()
	for path, want := range map[string]string{
		"/api/v1/nodes/" + w.node + "/proxy/healthz":                  "ok",
		"/api/v1/nodes/" + w.node + ":" + kubeletPort + "/proxy/pods": `"name":"web"`,
		"/api/v1/namespaces/" + w.ns + "/pods/web:8080/proxy/":        "served",
		"/api/v1/namespaces/" + w.ns + "/services/web:80/proxy/":      "served",
	} {
		require.Contains(t, must(t, c, "get", "--raw", path), want, path)
	}
}

// webhook asks a webhook whose pod is on the node.
func (w *wall) webhook(t *testing.T, c *rig.Cluster) {
	t.Helper()
	_, err := c.Run(t.Context(), "image build", "-t", "hook:1", "testdata/hook")
	require.NoError(t, err)
	host := "hook." + w.ns + ".svc"
	certificate, key, err := cert.GenerateSelfSignedCertKey(host, nil, []string{host})
	require.NoError(t, err)
	dir := t.TempDir()
	crt, private := filepath.Join(dir, "crt"), filepath.Join(dir, "key")
	require.NoError(t, os.WriteFile(crt, certificate, 0o600))
	require.NoError(t, os.WriteFile(private, key, 0o600))
	must(t, c, "create", "secret", "tls", "hook", "-n", w.ns, "--cert", crt, "--key", private)
	t.Cleanup(func() {
		if _, err := c.Kubectl(context.Background(), "delete", "validatingwebhookconfiguration", w.ns, "--ignore-not-found"); err != nil {
			t.Error(err)
		}
	})
	apply := func(format string, args ...any) {
		_, err := c.KubectlStdin(t.Context(), strings.NewReader(fmt.Sprintf(format, args...)), "apply", "-n", w.ns, "-f", "-")
		require.NoError(t, err)
	}
	apply(`
apiVersion: v1
kind: Pod
metadata: {name: hook, labels: {app: hook}}
spec:
  nodeName: %s
  terminationGracePeriodSeconds: 0
  containers: [{name: hook, image: "hook:1", volumeMounts: [{name: tls, mountPath: /tls}]}]
  volumes: [{name: tls, secret: {secretName: hook}}]
---
apiVersion: v1
kind: Service
metadata: {name: hook}
spec: {selector: {app: hook}, ports: [{port: 443, targetPort: 8443}]}
`, w.node)
	mustBeReady(t, c, w.ns)
	apply(`
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: {name: %[1]s}
webhooks:
- name: hook.example.com
  admissionReviewVersions: [v1]
  sideEffects: None
  failurePolicy: Fail
  clientConfig: {caBundle: %[2]s, service: {namespace: %[1]s, name: hook}}
  rules: [{apiGroups: [""], apiVersions: [v1], resources: [configmaps], operations: [CREATE]}]
  namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: %[1]s}}
`, w.ns, base64.StdEncoding.EncodeToString(certificate))
	eventually(t, settle, "the webhook is asked", func() (bool, string) {
		_, err := c.Kubectl(t.Context(), "create", "configmap", "x", "-n", w.ns, "--dry-run=server")
		return err != nil && strings.Contains(err.Error(), "the webhook was asked"), fmt.Sprint(err)
	})
}
