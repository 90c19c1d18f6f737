package clients

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// controllerRuntime is the module whose own tests run, with what its envtest calls an existing cluster.
const controllerRuntime = "sigs.k8s.io/controller-runtime"

// suite are the tests of a package of controller-runtime.
type suite struct {
	pkg string
	// skip are the tests that no whole cluster can pass, whoever made it, each with the reason in docs/clients.md:
	// regular expressions over the names that ginkgo gives.
	skip []string
	// without is the same for tests that are not ginkgo's.
	without string
}

var suites = []suite{
	{pkg: "internal/controller"},
	{pkg: "builder"},
	{pkg: "cache", skip: []string{
		"test multinamespaced cache for cluster scoped resources",
		"should be able to list objects that are configured to be watched",
		"Should list serviceaccounts and find exactly one",
	}},
	{pkg: "client"},
	{pkg: "client/apiutil", without: "/aggregatedDiscovery=false"},
	{pkg: "cluster"},
	{pkg: "controller"},
	{pkg: "controller/controllerutil"},
	{pkg: "envtest"},
	{pkg: "handler"},
	{pkg: "internal/recorder"},
	{pkg: "manager"},
	// Its two tests make an object of the same name, which only an envtest of its own forgets between them.
	{pkg: "manager/internal/integration", skip: []string{"warmup not enabled"}},
	{pkg: "manager/internal/integration", skip: []string{"warmup enabled"}},
	{pkg: "metrics/filters"},
	{pkg: "reconcile"},
	{pkg: "source"},
	{pkg: "webhook"},
}

// binary is where the compiled tests are.
func (s suite) binary() string {
	return filepath.Join(out, "controller-runtime", strings.ReplaceAll(s.pkg, "/", "-")+".test")
}

// TestControllerRuntime runs the integration tests of controller-runtime, each package's in the package's folder of the module.
func TestControllerRuntime(t *testing.T) {
	needsAll(t)
	config, err := theCluster(t).Kubeconfig(t.Context())
	require.NoError(t, err)
	dir, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", controllerRuntime).Output()
	require.NoError(t, err)
	holdControllers(t)
	own := everything(t)
	for _, s := range suites {
		t.Run(s.pkg, func(t *testing.T) {
			defer sweep(t, own)
			binary, err := filepath.Abs(s.binary())
			require.NoError(t, err)
			cmd := exec.CommandContext(t.Context(), binary, "-ginkgo.no-color", "-ginkgo.skip="+strings.Join(s.skip, "|"), "-test.skip="+s.without)
			cmd.Dir = filepath.Join(strings.TrimSpace(string(dir)), "pkg", s.pkg)
			cmd.Env = append(os.Environ(), "USE_EXISTING_CLUSTER=true", "KUBECONFIG="+config)
			said, err := cmd.CombinedOutput()
			require.NoError(t, err, "%s", said)
			t.Logf("%s", summary(string(said)))
		})
	}
}

// actors are the parts of a cluster that would write to the objects of these tests, by the names of their role bindings:
// envtest is an API server alone, and the tests race with whoever else reconciles their Deployments, binds their Pods and
// taints their Nodes.
var actors = []string{"system:kube-scheduler", "system:controller:deployment-controller", "system:controller:replicaset-controller",
	"system:controller:node-controller", "system:controller:ttl-controller"}

// holdControllers takes the rights of the actors away until the test ends.
func holdControllers(t *testing.T) {
	t.Helper()
	c := theCluster(t)
	bindings, err := c.Kubectl(t.Context(), append([]string{"get", "clusterrolebindings", "-o", "yaml"}, actors...)...)
	require.NoError(t, err)
	_, err = c.Kubectl(t.Context(), append([]string{"delete", "clusterrolebindings"}, actors...)...)
	require.NoError(t, err)
	t.Cleanup(func() {
		_, err := c.KubectlStdin(context.WithoutCancel(t.Context()), strings.NewReader(bindings), "create", "-f", "-")
		require.NoError(t, err)
	})
}

// kinds are what these tests make and leave: envtest throws its whole store away.
const kinds = "namespaces,nodes,crd,mutatingwebhookconfigurations,validatingwebhookconfigurations,deployments,replicasets,statefulsets,daemonsets,pods,services,configmaps,secrets,serviceaccounts"

// everything lists the objects of those kinds, as kind.group/namespace/name.
func everything(t *testing.T) []string {
	t.Helper()
	said, err := theCluster(t).Kubectl(context.WithoutCancel(t.Context()), "get", kinds, "-A", "--ignore-not-found", "-o",
		`jsonpath={range .items[*]}{.kind}/{.metadata.namespace}/{.metadata.name}{"\n"}{end}`)
	require.NoError(t, err)
	return strings.Fields(said)
}

// sweep deletes what is there besides own, so that each package finds the cluster as the first did.
func sweep(t *testing.T, own []string) {
	t.Helper()
	for _, object := range everything(t) {
		if slices.Contains(own, object) {
			continue
		}
		part := strings.Split(object, "/")
		args := []string{"delete", part[0], part[2], "--ignore-not-found", "--timeout=60s"}
		if part[1] != "" {
			args = append(args, "-n", part[1])
		}
		if part[0] == "Pod" { // no kubelet ever saw it
			args = append(args, "--force", "--grace-period=0")
		}
		_, err := theCluster(t).Kubectl(context.WithoutCancel(t.Context()), args...)
		require.NoError(t, err)
	}
}

// summary is ginkgo's last word, without the failures that come before it.
func summary(said string) string {
	var lines []string
	for line := range strings.Lines(said) {
		if strings.HasPrefix(line, "Ran ") || strings.Contains(line, " Passed ") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return strings.Join(lines, "; ")
}
