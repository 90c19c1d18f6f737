package control

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	metadatafake "k8s.io/client-go/metadata/fake"
	"k8s.io/client-go/metadata/metadatainformer"
	"k8s.io/client-go/rest"
	"k8s.io/kubernetes/cmd/kube-controller-manager/app"
	"k8s.io/kubernetes/cmd/kube-controller-manager/names"
	"k8s.io/kubernetes/plugin/pkg/auth/authorizer/rbac/bootstrappolicy"

	"knarr/client"
	"knarr/system/pki"
)

// Every controller of upstream is in the table, or there is a reason why not.
func TestTableIsComplete(t *testing.T) {
	ours := map[string]bool{}
	for _, c := range controllers() {
		require.False(t, ours[c.name], "%s is there twice", c.name)
		ours[c.name] = true
		require.NotNil(t, app.NewControllerDescriptors()[c.name], "%s is no controller of upstream", c.name)
	}
	for name := range app.NewControllerDescriptors() {
		require.True(t, ours[name] != (notOurs()[name] != ""), "%s is neither in the table nor left out for a reason, or both", name)
	}
}

// emptyAPI has no nodes, and nothing else at all.
func emptyAPI(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/api/v1/nodes" {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = io.WriteString(w, `{"apiVersion":"v1","kind":"NodeList"}`)
}

// testOptions are complete options on a fake cluster that answers nothing.
func testOptions(t *testing.T) *Options {
	ca, err := pki.Load(t.TempDir(), pki.Options{})
	require.NoError(t, err)
	return &Options{
		Config:    func(u user.Info) *rest.Config { return client.Config(http.HandlerFunc(emptyAPI), u) },
		Informers: informers.NewSharedInformerFactory(fake.NewClientset(), 0),
		Metadata:  metadatainformer.NewSharedInformerFactory(metadatafake.NewSimpleMetadataClient(runtime.NewScheme()), 0),
		Changed:   func() <-chan struct{} { return nil },
		PodCIDR:   netip.MustParsePrefix("10.42.0.0/16"), ServiceCIDR: netip.MustParsePrefix("10.43.0.0/16"),
		RootCA: ca.ServerCAPEM(), ServiceAccountKey: ca.ServiceAccountKey(),
	}
}

// The inputs are exactly what the constructors ask for.
func TestInputs(t *testing.T) {
	needAPI := []string{"namespace-controller", "garbage-collector-controller", "resourcequota-controller"} // TestWorkloads runs these
	e, err := newEnvironment(testOptions(t))
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	rows := controllers()
	for i := range rows {
		row := &rows[i]
		if slices.Contains(needAPI, row.name) {
			continue
		}
		t.Run(row.name, func(t *testing.T) {
			s := e.scopeOf(row)
			asked := map[string]bool{}
			s.informers = client.Observe(e.options.Informers, func(obj runtime.Object) { asked[resourceName(obj)] = true; s.asked(obj) })
			build := row.build
			if build == nil {
				build = newUpstream
			}
			run, err := build(ctx, s)
			require.NoError(t, err)
			require.NoError(t, s.check())
			if run == nil {
				t.Skip("switched off by upstream's defaults")
			}
			over, end := context.WithCancel(ctx)
			end()
			run(over)                                                                                               // ends what the constructor has begun
			gated := map[string]bool{"podgroups.scheduling.k8s.io": true, "devicetaintrules.resource.k8s.io": true} // only with their feature gates
			for _, in := range row.inputs {
				require.True(t, asked[in] || gated[in], "%s is declared and never asked for", in)
			}
		})
	}
}

func TestUndeclaredInput(t *testing.T) {
	e, err := newEnvironment(testOptions(t))
	require.NoError(t, err)
	s := e.scopeOf(&controller{name: "x", inputs: list("pods")})
	s.informers.Core().V1().Pods().Informer()
	require.NoError(t, s.check())
	s.informers.Apps().V1().Deployments().Lister()
	require.ErrorContains(t, s.check(), "deployments.apps")
	all := e.scopeOf(&controller{name: "x", inputs: list(everything)})
	all.informers.Apps().V1().Deployments().Lister()
	require.NoError(t, all.check())
}

// The outputs are a part of what upstream's bootstrap policy allows the account to write.
func TestOutputs(t *testing.T) {
	rules := map[string][]rbacv1.PolicyRule{}
	for _, r := range bootstrappolicy.ControllerRoles() {
		rules[strings.TrimPrefix(r.Name, "system:controller:")] = r.Rules
	}
	namespaced := bootstrappolicy.NamespaceRoles()
	for _, ns := range slices.Sorted(maps.Keys(namespaced)) {
		for _, r := range namespaced[ns] {
			name := strings.TrimPrefix(r.Name, "system:controller:")
			rules[name] = append(rules[name], r.Rules...)
		}
	}
	for _, r := range bootstrappolicy.ClusterRoles() {
		if r.Name == managerUser {
			rules[""] = r.Rules
		}
	}
	e, err := newEnvironment(testOptions(t))
	require.NoError(t, err)
	r := &runner{environment: e}
	rows := controllers()
	for i := range rows {
		row := &rows[i]
		if !r.gatesOpen(row) {
			continue // upstream makes the role only with the gate
		}
		require.NotEmpty(t, row.outputs, row.name)
		for _, out := range row.outputs {
			require.True(t, mayWrite(rules[row.account], out), "%s may not write %s as %q", row.name, out, row.account)
		}
	}
}

// mayWrite says whether rules allow some write of resource.group/subresource.
func mayWrite(rules []rbacv1.PolicyRule, output string) bool {
	name, sub, _ := strings.Cut(output, "/")
	resource, group, _ := strings.Cut(name, ".")
	if sub != "" {
		resource += "/" + sub
	}
	for _, r := range rules {
		writes := slices.ContainsFunc(r.Verbs, func(v string) bool { return v != "get" && v != "list" && v != "watch" })
		groups := slices.Contains(r.APIGroups, group) || slices.Contains(r.APIGroups, "*")
		if writes && groups && (slices.Contains(r.Resources, resource) || slices.Contains(r.Resources, "*")) {
			return true
		}
	}
	return false
}

func TestOptionsAreChecked(t *testing.T) {
	require.NoError(t, testOptions(t).validate())
	err := Run(t.Context(), Options{NodeMask: 24, ClientSigner: KeyPair{CertFile: "x"}, Disabled: []string{"nonsense"}})
	for _, want := range []string{"Config", "Informers", "Metadata", "Changed", "PodCIDR", "ServiceCIDR", "RootCA", "ServiceAccountKey", "both of CertFile", `"nonsense"`} {
		require.ErrorContains(t, err, want)
	}
	o := testOptions(t)
	ca, err := pki.Load(t.TempDir(), pki.Options{})
	require.NoError(t, err)
	o.RootCA = append(slices.Clone(o.RootCA), ca.ServerCAKey().KeyPEM()...)
	require.ErrorContains(t, o.validate(), "PRIVATE KEY", "a private key would be published to every pod")
	o.RootCA = []byte("nothing")
	require.ErrorContains(t, o.validate(), "no certificate")
}

func TestComponentConfig(t *testing.T) {
	o := testOptions(t)
	for _, tc := range []struct {
		cidr string
		mask int
		want int32
	}{{"10.42.0.0/16", 0, 0}, {"10.42.0.0/16", 26, 26}, {"fd00:42::/48", 0, 64}} {
		o.PodCIDR, o.NodeMask = netip.MustParsePrefix(tc.cidr), tc.mask
		c, err := componentConfig(o)
		require.NoError(t, err)
		require.Equal(t, tc.want, c.NodeIPAMController.NodeCIDRMaskSize, "%s", tc.cidr)
		require.Equal(t, tc.cidr, c.KubeCloudShared.ClusterCIDR)
	}
}

// The graph of who reads and writes what, as people read it.
func ExampleGraph() {
	for _, line := range Graph()[:3] {
		fmt.Println(line)
	}
	// Output:
	// serviceaccount-controller: namespaces, serviceaccounts -> serviceaccounts
	// root-ca-certificate-publisher-controller: configmaps, namespaces -> configmaps
	// clusterrole-aggregation-controller: clusterroles.rbac.authorization.k8s.io -> clusterroles.rbac.authorization.k8s.io
}

// notOurs are upstream's controllers that the table leaves out, and why.
func notOurs() map[string]string {
	return map[string]string{
		"service-lb-controller":                        "needs a cloud; knarr's load balancer is part of network/",
		"node-route-controller":                        "needs a cloud",
		"cloud-node-lifecycle-controller":              "needs a cloud",
		names.SELinuxWarningController:                 "off by default upstream",
		names.StorageVersionGarbageCollectorController: "its feature gates are off by default upstream",
		names.StorageVersionMigratorController:         "its feature gates are off by default upstream",
	}
}
