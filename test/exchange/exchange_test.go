package exchange

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"knarr/internal/rig"
)

const (
	startTimeout = 60 * time.Second
	adminToken   = "exchange-admin"
)

// resources are compared object by object. Controllers run in knarr only, so nothing that they would touch is among them.
var resources = []schema.GroupVersionResource{
	{Version: "v1", Resource: "configmaps"}, {Version: "v1", Resource: "secrets"}, {Version: "v1", Resource: "limitranges"},
	{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"},
	{Group: "ships.example.com", Version: "v1", Resource: "ships"},
	{Group: "policy", Version: "v1", Resource: "poddisruptionbudgets"},
	{Group: "scheduling.k8s.io", Version: "v1", Resource: "priorityclasses"},
	{Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "rolebindings"},
	{Group: "coordination.k8s.io", Version: "v1", Resource: "leases"},
}

// TestStoreMovesBothWays writes with upstream's server, reads and writes with knarr's, and reads with upstream's again.
func TestStoreMovesBothWays(t *testing.T) {
	dir := t.TempDir()
	programs := build(t, dir)
	etcd, err := rig.StartEtcd(programs.etcd, filepath.Join(dir, "etcd-data"), "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, etcd.Stop()) })

	upstream, stop := startUpstream(t, programs.upstream, dir, etcd.URL, "")
	written := objects("from-upstream")
	create(t, upstream, written)
	before := dump(t, upstream)
	stop()

	ours, stop := startKnarr(t, programs.knarr, dir, etcd.URL)
	after := dump(t, ours)
	for key, obj := range before {
		require.Equal(t, obj, after[key], key)
	}
	create(t, ours, objects("from-knarr")[1:]) // the definition is there
	before = dump(t, ours)
	stop()

	upstream, stop = startUpstream(t, programs.upstream, dir, etcd.URL, filepath.Join(dir, "knarr", "x", "server", "encryption.yaml"))
	defer stop()
	after = dump(t, upstream)
	for key, obj := range before {
		require.Equal(t, obj, after[key], key)
	}
	require.Contains(t, after, "secrets default/from-knarr")
}

type programs struct{ etcd, upstream, knarr string }

func build(t *testing.T, dir string) programs {
	t.Helper()
	p := programs{etcd: filepath.Join(dir, "etcd"), upstream: filepath.Join(dir, "kube-apiserver"), knarr: filepath.Join(rig.Bin("../../bin"), "knarr")}
	require.FileExists(t, p.knarr, "`make test` builds it")
	require.NoError(t, rig.BuildEtcd(t.Context(), "../etcdserver", p.etcd))
	cmd := exec.Command("go", "build", "-ldflags", "-s -w", "-o", p.upstream, "k8s.io/kubernetes/cmd/kube-apiserver")
	cmd.Dir = "../.."
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	return p
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	return strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
}

// run starts a server and gives what stops it; its log is shown when the test fails.
func run(t *testing.T, program string, args ...string) (stop func()) {
	t.Helper()
	log, err := os.CreateTemp(t.TempDir(), "log")
	require.NoError(t, err)
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = log, log
	require.NoError(t, cmd.Start())
	stopped := false
	stop = func() {
		if !stopped {
			stopped = true
			_ = cmd.Process.Signal(os.Interrupt)
			_ = cmd.Wait()
		}
	}
	t.Cleanup(func() {
		stop()
		if t.Failed() {
			data, _ := os.ReadFile(log.Name())
			t.Logf("%s:\n%s", filepath.Base(program), data[max(0, len(data)-4000):])
		}
	})
	return stop
}

func startUpstream(t *testing.T, program, dir, etcd, encryption string) (*dynamic.DynamicClient, func()) {
	t.Helper()
	key := filepath.Join(dir, "accounts.key")
	tokens := filepath.Join(dir, "tokens.csv")
	if _, err := os.Stat(key); err != nil {
		private, err := rsa.GenerateKey(rand.Reader, 2048)
		require.NoError(t, err)
		block := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(private)})
		require.NoError(t, os.WriteFile(key, block, 0o600))
		require.NoError(t, os.WriteFile(tokens, []byte(adminToken+`,admin,1,"system:masters"`), 0o600))
	}
	port := freePort(t)
	args := []string{"--etcd-servers", etcd, "--service-account-key-file", key, "--service-account-signing-key-file", key,
		"--service-account-issuer", "https://kubernetes.default.svc.cluster.local", "--cert-dir", filepath.Join(dir, "certs"), "--secure-port", port,
		"--bind-address", "127.0.0.1", "--service-cluster-ip-range", "10.43.0.0/16", "--token-auth-file", tokens, "--authorization-mode", "Node,RBAC",
		"--disable-admission-plugins", "ServiceAccount"}
	if encryption != "" {
		args = append(args, "--encryption-provider-config", encryption)
	}
	stop := run(t, program, args...)
	config := &rest.Config{Host: "https://127.0.0.1:" + port, BearerToken: adminToken, TLSClientConfig: rest.TLSClientConfig{Insecure: true}}
	return ready(t, config), stop
}

func startKnarr(t *testing.T, program, dir, etcd string) (*dynamic.DynamicClient, func()) {
	t.Helper()
	data := filepath.Join(dir, "knarr")
	stop := run(t, program, "server", "--no-agent", "--name", "x", "--data-dir", data, "--port", freePort(t), "--bind-address", "127.0.0.1",
		"--datastore-endpoint", etcd)
	file := filepath.Join(data, "x", "admin.kubeconfig")
	require.Eventually(t, func() bool { _, err := os.Stat(file); return err == nil }, startTimeout, 20*time.Millisecond)
	config, err := clientcmd.BuildConfigFromFlags("", file)
	require.NoError(t, err)
	return ready(t, config), stop
}

// ready waits until the server says so.
func ready(t *testing.T, config *rest.Config) *dynamic.DynamicClient {
	t.Helper()
	config.QPS = -1
	raw := rest.CopyConfig(config)
	raw.GroupVersion, raw.NegotiatedSerializer = &schema.GroupVersion{Version: "v1"}, scheme.Codecs.WithoutConversion()
	client, err := rest.UnversionedRESTClientFor(raw)
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		return client.Get().AbsPath("/readyz").Do(context.Background()).Error() == nil
	}, startTimeout, 50*time.Millisecond)
	return dynamic.NewForConfigOrDie(config)
}

// objects are one of each resource; the definition comes first.
func objects(name string) []*unstructured.Unstructured {
	of := func(apiVersion, kind, namespace string, rest map[string]any) *unstructured.Unstructured {
		u := &unstructured.Unstructured{Object: rest}
		u.SetAPIVersion(apiVersion)
		u.SetKind(kind)
		u.SetName(name)
		u.SetNamespace(namespace)
		return u
	}
	definition := of("apiextensions.k8s.io/v1", "CustomResourceDefinition", "", map[string]any{"spec": map[string]any{
		"group": "ships.example.com", "scope": "Namespaced", "names": map[string]any{"plural": "ships", "kind": "Ship"},
		"versions": []any{map[string]any{"name": "v1", "served": true, "storage": true, "schema": map[string]any{
			"openAPIV3Schema": map[string]any{"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}},
	}})
	definition.SetName("ships.ships.example.com")
	return []*unstructured.Unstructured{
		definition,
		of("v1", "ConfigMap", "default", map[string]any{"data": map[string]any{"a": "b"}}),
		of("v1", "Secret", "default", map[string]any{"stringData": map[string]any{"password": "p"}}),
		of("v1", "LimitRange", "default", map[string]any{"spec": map[string]any{"limits": []any{map[string]any{"type": "Pod", "max": map[string]any{"cpu": "64"}}}}}),
		of("ships.example.com/v1", "Ship", "default", map[string]any{"spec": map[string]any{"crew": int64(6), "holds": []any{"grain", 1.5}}}),
		of("scheduling.k8s.io/v1", "PriorityClass", "", map[string]any{"value": int64(7)}),
		of("rbac.authorization.k8s.io/v1", "RoleBinding", "default", map[string]any{
			"roleRef": map[string]any{"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "view"}}),
		of("coordination.k8s.io/v1", "Lease", "default", map[string]any{"spec": map[string]any{"renewTime": "2026-01-01T00:00:00.123456Z"}}),
	}
}

func create(t *testing.T, c *dynamic.DynamicClient, list []*unstructured.Unstructured) {
	t.Helper()
	ctx := context.Background()
	for _, obj := range list {
		gvr := schema.GroupVersionResource{}
		for _, r := range resources {
			if r.GroupVersion() == obj.GroupVersionKind().GroupVersion() && strings.HasPrefix(r.Resource, strings.ToLower(obj.GetKind())) ||
				obj.GetKind() == "PriorityClass" && r.Resource == "priorityclasses" {
				gvr = r
			}
		}
		var into dynamic.ResourceInterface = c.Resource(gvr)
		if obj.GetNamespace() != "" {
			into = c.Resource(gvr).Namespace(obj.GetNamespace())
		}
		require.Eventually(t, func() bool { // a resource is served a moment after its definition
			_, err := into.Create(ctx, obj, metav1.CreateOptions{})
			if err != nil {
				t.Logf("create %s %s: %v", obj.GetKind(), obj.GetName(), err)
			}
			return err == nil
		}, startTimeout, 200*time.Millisecond, obj.GetKind())
	}
}

// dump reads every object, whole.
func dump(t *testing.T, c *dynamic.DynamicClient) map[string]*unstructured.Unstructured {
	t.Helper()
	out := map[string]*unstructured.Unstructured{}
	for _, r := range resources {
		list, err := c.Resource(r).List(context.Background(), metav1.ListOptions{})
		require.NoError(t, err, r)
		for i := range list.Items {
			obj := &list.Items[i]
			if obj.GetNamespace() == "" || obj.GetNamespace() == corev1.NamespaceDefault {
				out[fmt.Sprintf("%s %s/%s", r.Resource, obj.GetNamespace(), obj.GetName())] = obj
			}
		}
	}
	return out
}
