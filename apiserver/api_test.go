package apiserver_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	crdclient "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/apiserver/pkg/storage/value"
	"k8s.io/apiserver/pkg/storage/value/encrypt/identity"
	"k8s.io/apiserver/pkg/storage/value/encrypt/secretbox"
	"k8s.io/utils/ptr"
)

const timeout = 20 * time.Second

// place makes a namespace for a test.
func place(t *testing.T, c *cluster) (context.Context, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	t.Cleanup(cancel)
	ns, err := c.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "t-"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	return ctx, ns.Name
}

func configMap(name string, labels map[string]string) *corev1.ConfigMap {
	return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}, Data: map[string]string{"k": "v"}}
}

func TestWritesFollowUpstream(t *testing.T) {
	c := theCluster(t)
	ctx, ns := place(t, c)
	maps := c.CoreV1().ConfigMaps(ns)
	created, err := maps.Create(ctx, configMap("a", nil), metav1.CreateOptions{FieldManager: "tester"})
	require.NoError(t, err)
	require.NotEmpty(t, created.UID)
	require.Equal(t, "tester", created.ManagedFields[0].Manager)

	t.Run("a second create is a conflict of names", func(t *testing.T) {
		_, err := maps.Create(ctx, configMap("a", nil), metav1.CreateOptions{})
		require.True(t, apierrors.IsAlreadyExists(err), err)
	})
	t.Run("an update without a change keeps the revision", func(t *testing.T) {
		same, err := maps.Update(ctx, created.DeepCopy(), metav1.UpdateOptions{FieldManager: "tester"})
		require.NoError(t, err)
		require.Equal(t, created.ResourceVersion, same.ResourceVersion)
	})
	t.Run("dry run changes nothing", func(t *testing.T) {
		change := created.DeepCopy()
		change.Data["k"] = "dry"
		answer, err := maps.Update(ctx, change, metav1.UpdateOptions{DryRun: []string{metav1.DryRunAll}})
		require.NoError(t, err)
		require.Equal(t, "dry", answer.Data["k"])
		got, err := maps.Get(ctx, "a", metav1.GetOptions{})
		require.NoError(t, err)
		require.Equal(t, "v", got.Data["k"])
	})
	t.Run("every kind of patch", func(t *testing.T) {
		for _, p := range []struct {
			kind types.PatchType
			body string
			opts metav1.PatchOptions
		}{
			{types.JSONPatchType, `[{"op":"add","path":"/data/json","value":"1"}]`, metav1.PatchOptions{}},
			{types.MergePatchType, `{"data":{"merge":"1"}}`, metav1.PatchOptions{}},
			{types.StrategicMergePatchType, `{"data":{"strategic":"1"}}`, metav1.PatchOptions{}},
			{types.ApplyPatchType, `{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"a"},"data":{"apply":"1"}}`, metav1.PatchOptions{FieldManager: "applier"}},
		} {
			_, err := maps.Patch(ctx, "a", p.kind, []byte(p.body), p.opts)
			require.NoError(t, err, p.kind)
		}
		got, err := maps.Get(ctx, "a", metav1.GetOptions{})
		require.NoError(t, err)
		require.Equal(t, map[string]string{"k": "v", "json": "1", "merge": "1", "strategic": "1", "apply": "1"}, got.Data)
	})
	t.Run("apply reports who owns a field", func(t *testing.T) {
		body := []byte(`{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"a"},"data":{"apply":"2"}}`)
		_, err := maps.Patch(ctx, "a", types.ApplyPatchType, body, metav1.PatchOptions{FieldManager: "other"})
		require.True(t, apierrors.IsConflict(err), err)
		require.ErrorContains(t, err, `conflict with "applier"`)
		_, err = maps.Patch(ctx, "a", types.ApplyPatchType, body, metav1.PatchOptions{FieldManager: "other", Force: ptr.To(true)})
		require.NoError(t, err)
	})
	t.Run("a stale update is refused", func(t *testing.T) {
		_, err := maps.Update(ctx, created, metav1.UpdateOptions{})
		require.True(t, apierrors.IsConflict(err), err)
	})
	t.Run("a delete with the wrong uid is refused", func(t *testing.T) {
		err := maps.Delete(ctx, "a", metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: ptr.To(types.UID("x"))}})
		require.True(t, apierrors.IsConflict(err), err)
	})
	t.Run("a finalizer holds an object", func(t *testing.T) {
		held := configMap("held", nil)
		held.Finalizers = []string{"example.com/hold"}
		_, err := maps.Create(ctx, held, metav1.CreateOptions{})
		require.NoError(t, err)
		require.NoError(t, maps.Delete(ctx, "held", metav1.DeleteOptions{}))
		got, err := maps.Get(ctx, "held", metav1.GetOptions{})
		require.NoError(t, err)
		require.NotNil(t, got.DeletionTimestamp)
		got.Finalizers = nil
		_, err = maps.Update(ctx, got, metav1.UpdateOptions{})
		require.NoError(t, err)
		_, err = maps.Get(ctx, "held", metav1.GetOptions{})
		require.True(t, apierrors.IsNotFound(err), err)
	})
	t.Run("delete of a collection", func(t *testing.T) {
		require.NoError(t, maps.DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{}))
		left, err := maps.List(ctx, metav1.ListOptions{})
		require.NoError(t, err)
		require.Empty(t, left.Items)
	})
}

func TestListsPageOverOneSnapshot(t *testing.T) {
	c := theCluster(t)
	ctx, ns := place(t, c)
	maps := c.CoreV1().ConfigMaps(ns)
	for i := range 5 {
		_, err := maps.Create(ctx, configMap(fmt.Sprintf("m%d", i), nil), metav1.CreateOptions{})
		require.NoError(t, err)
	}
	first, err := maps.List(ctx, metav1.ListOptions{Limit: 2})
	require.NoError(t, err)
	require.Len(t, first.Items, 2)
	require.EqualValues(t, 3, *first.RemainingItemCount)

	require.NoError(t, maps.Delete(ctx, "m3", metav1.DeleteOptions{}))
	_, err = maps.Create(ctx, configMap("m21", nil), metav1.CreateOptions{})
	require.NoError(t, err)

	rest, err := maps.List(ctx, metav1.ListOptions{Limit: 10, Continue: first.Continue})
	require.NoError(t, err)
	var names []string
	for _, m := range rest.Items {
		names = append(names, m.Name)
	}
	require.Equal(t, []string{"m2", "m3", "m4"}, names, "the page shows the state of the first")
	require.Equal(t, first.ResourceVersion, rest.ResourceVersion)

	_, err = maps.List(ctx, metav1.ListOptions{Continue: "nonsense"})
	require.True(t, apierrors.IsBadRequest(err), err)
	err = c.CoreV1().RESTClient().Get().Namespace(ns).Resource("configmaps").MaxRetries(0).
		Param("resourceVersion", "99999999").Param("resourceVersionMatch", "NotOlderThan").Do(ctx).Error()
	require.ErrorContains(t, err, "Too large resource version: 99999999")
}

func TestWatchesSeeEveryChangeOnce(t *testing.T) {
	c := theCluster(t)
	ctx, ns := place(t, c)
	maps := c.CoreV1().ConfigMaps(ns)
	before, err := maps.List(ctx, metav1.ListOptions{})
	require.NoError(t, err)
	w, err := maps.Watch(ctx, metav1.ListOptions{ResourceVersion: before.ResourceVersion, LabelSelector: "team=a"})
	require.NoError(t, err)
	defer w.Stop()

	m, err := maps.Create(ctx, configMap("x", map[string]string{"team": "b"}), metav1.CreateOptions{})
	require.NoError(t, err)
	step := func(team string) {
		m.Labels["team"] = team
		m, err = maps.Update(ctx, m, metav1.UpdateOptions{})
		require.NoError(t, err)
	}
	step("a")
	m.Data["k"] = "w"
	step("a")
	step("b")
	step("a")
	require.NoError(t, maps.Delete(ctx, "x", metav1.DeleteOptions{}))
	var got []string
	for range 5 {
		e := <-w.ResultChan()
		got = append(got, fmt.Sprint(e.Type, " ", e.Object.(*corev1.ConfigMap).Labels["team"]))
	}
	require.Equal(t, []string{"ADDED a", "MODIFIED a", "DELETED a", "ADDED a", "DELETED a"}, got)
}

func TestWatchSendsInitialEventsAndTheirEnd(t *testing.T) {
	c := theCluster(t)
	ctx, ns := place(t, c)
	maps := c.CoreV1().ConfigMaps(ns)
	_, err := maps.Create(ctx, configMap("x", nil), metav1.CreateOptions{})
	require.NoError(t, err)
	w, err := maps.Watch(ctx, metav1.ListOptions{
		SendInitialEvents: ptr.To(true), AllowWatchBookmarks: true, ResourceVersionMatch: metav1.ResourceVersionMatchNotOlderThan,
	})
	require.NoError(t, err)
	defer w.Stop()
	require.Equal(t, watch.Added, (<-w.ResultChan()).Type)
	end := <-w.ResultChan()
	require.Equal(t, watch.Bookmark, end.Type)
	require.Equal(t, "true", end.Object.(*corev1.ConfigMap).Annotations[metav1.InitialEventsAnnotationKey])
}

func TestFieldSelectors(t *testing.T) {
	c := theCluster(t)
	ctx, ns := place(t, c)
	_, err := c.CoreV1().ServiceAccounts(ns).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	for _, name := range []string{"p1", "p2"} {
		_, err := c.CoreV1().Pods(ns).Create(ctx, &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Spec:       corev1.PodSpec{NodeName: "node-" + name, Containers: []corev1.Container{{Name: "c", Image: "i"}}},
		}, metav1.CreateOptions{})
		require.NoError(t, err)
	}
	for selector, want := range map[string]string{
		"spec.nodeName=node-p2": "p2", "spec.nodeName!=node-p2": "p1", "spec.nodeName=": "", "spec.nodeName!=": "p1 p2", "metadata.name=p1": "p1",
		"metadata.name=p1,spec.nodeName=node-p2": "", "metadata.namespace=" + ns + ",spec.nodeName=node-p1": "p1", "metadata.namespace=x": "",
	} {
		for _, more := range []string{"", ",status.phase=Pending"} { // which only the pod as upstream sees it tells
			pods, err := c.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{FieldSelector: selector + more})
			require.NoError(t, err)
			var names []string
			for _, pod := range pods.Items {
				names = append(names, pod.Name)
			}
			require.Equal(t, want, strings.Join(names, " "), selector+more)
		}
	}
	_, err = c.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{FieldSelector: "spec.hostname=x"})
	require.True(t, apierrors.IsBadRequest(err), err)
}

func TestTables(t *testing.T) {
	c := theCluster(t)
	ctx, ns := place(t, c)
	_, err := c.CoreV1().ConfigMaps(ns).Create(ctx, configMap("x", nil), metav1.CreateOptions{})
	require.NoError(t, err)
	raw, err := c.CoreV1().RESTClient().Get().Namespace(ns).Resource("configmaps").
		SetHeader("Accept", "application/json;as=Table;v=v1;g=meta.k8s.io").Do(ctx).Raw()
	require.NoError(t, err)
	var table metav1.Table
	require.NoError(t, json.Unmarshal(raw, &table))
	require.Equal(t, "x", table.Rows[0].Cells[0])
}

func TestServicesGetAddressesAndPorts(t *testing.T) {
	c := theCluster(t)
	ctx, ns := place(t, c)
	service := func(name string) *corev1.Service {
		return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeNodePort, Ports: []corev1.ServicePort{{Port: 80}}}}
	}
	seen := map[int32]bool{}
	for i := range 11 { // the whole range of node ports
		s, err := c.CoreV1().Services(ns).Create(ctx, service(fmt.Sprintf("s%d", i)), metav1.CreateOptions{})
		require.NoError(t, err)
		require.True(t, strings.HasPrefix(s.Spec.ClusterIP, "10.43."), s.Spec.ClusterIP)
		require.False(t, seen[s.Spec.Ports[0].NodePort])
		seen[s.Spec.Ports[0].NodePort] = true
	}
	_, err := c.CoreV1().Services(ns).Create(ctx, service("full"), metav1.CreateOptions{})
	require.True(t, apierrors.IsInternalError(err) || apierrors.IsInvalid(err), err)
	require.NoError(t, c.CoreV1().Services(ns).Delete(ctx, "s0", metav1.DeleteOptions{}))
	_, err = c.CoreV1().Services(ns).Create(ctx, service("again"), metav1.CreateOptions{})
	require.NoError(t, err, "a deleted service gives its port back")
}

func TestRightsAreChecked(t *testing.T) {
	c := theCluster(t)
	ctx, ns := place(t, c)
	_, err := c.as("nobody").CoreV1().Secrets(ns).List(ctx, metav1.ListOptions{})
	require.True(t, apierrors.IsForbidden(err), err)
	require.ErrorContains(t, err, `User "nobody" cannot list resource "secrets"`)
	_, err = c.as("system:node:a", "system:nodes").CoreV1().Services(ns).List(ctx, metav1.ListOptions{})
	require.NoError(t, err)
	_, err = c.as("system:node:a", "system:nodes").CoreV1().Secrets(ns).Get(ctx, "s", metav1.GetOptions{})
	require.True(t, apierrors.IsForbidden(err), "a node sees only the secrets of its pods")
}

func TestPrivilegedPodsAreAllowed(t *testing.T) {
	c := theCluster(t)
	ctx, ns := place(t, c)
	container := corev1.Container{Name: "c", Image: "i", SecurityContext: &corev1.SecurityContext{Privileged: ptr.To(true)}}
	template := &corev1.PodTemplate{ObjectMeta: metav1.ObjectMeta{Name: "p"}, Template: corev1.PodTemplateSpec{Spec: corev1.PodSpec{Containers: []corev1.Container{container}}}}
	_, err := c.CoreV1().PodTemplates(ns).Create(ctx, template, metav1.CreateOptions{})
	require.NoError(t, err)
}

func TestTokensNameTheirServiceAccount(t *testing.T) {
	c := theCluster(t)
	ctx, ns := place(t, c)
	_, err := c.CoreV1().ServiceAccounts(ns).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "robot"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	token, err := c.CoreV1().ServiceAccounts(ns).CreateToken(ctx, "robot", &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	require.NoError(t, err)
	review := func() authenticationv1.TokenReviewStatus {
		r, err := c.AuthenticationV1().TokenReviews().Create(ctx, &authenticationv1.TokenReview{
			Spec: authenticationv1.TokenReviewSpec{Token: token.Status.Token}}, metav1.CreateOptions{})
		require.NoError(t, err)
		return r.Status
	}
	status := review()
	require.True(t, status.Authenticated, status.Error)
	require.Equal(t, "system:serviceaccount:"+ns+":robot", status.User.Username)
	discovery, err := c.CoreV1().RESTClient().Get().AbsPath("/.well-known/openid-configuration").DoRaw(ctx)
	require.NoError(t, err)
	require.Contains(t, string(discovery), `"jwks_uri":"https://192.0.2.1:6443/openid/v1/jwks"`, "where the keys are that verify tokens")
}

func TestCustomResources(t *testing.T) {
	c := theCluster(t)
	ctx, ns := place(t, c)
	definitions := crdclient.NewForConfigOrDie(restConfig(c)).ApiextensionsV1().CustomResourceDefinitions()
	group := ns + ".example.com"
	_, err := definitions.Create(ctx, definition(group), metav1.CreateOptions{})
	require.NoError(t, err)
	established, err := definitions.Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=ships." + group})
	require.NoError(t, err)
	for e := range established.ResultChan() {
		if crd, ok := e.Object.(*apiextensionsv1.CustomResourceDefinition); ok && len(crd.Status.Conditions) >= 2 && crd.Status.Conditions[1].Status == "True" {
			break
		}
	}
	established.Stop()
	ships := c.dynamic.Resource(schema.GroupVersionResource{Group: group, Version: "v1", Resource: "ships"}).Namespace(ns)
	ship := func(name string, crew int64) *unstructured.Unstructured {
		return &unstructured.Unstructured{Object: map[string]any{
			"apiVersion": group + "/v1", "kind": "Ship", "metadata": map[string]any{"name": name},
			"spec": map[string]any{"crew": crew, "unknown": "pruned"},
		}}
	}
	made, err := ships.Create(ctx, ship("knarr", 6), metav1.CreateOptions{})
	require.NoError(t, err)
	require.Equal(t, map[string]any{"crew": int64(6), "sail": "square"}, made.Object["spec"], "pruned and defaulted")
	_, err = ships.Create(ctx, ship("longship", 60), metav1.CreateOptions{})
	require.True(t, apierrors.IsInvalid(err), err)
	stray := ship("stray", 6)
	stray.Object["rudder"] = "unknown"
	body, err := json.Marshal(stray)
	require.NoError(t, err)
	_, err = ships.Patch(ctx, "stray", types.ApplyPatchType, body, metav1.PatchOptions{FieldManager: "test", FieldValidation: metav1.FieldValidationStrict})
	require.ErrorContains(t, err, ".rudder: field not declared in schema", "apply knows the schema")
	list, err := ships.List(ctx, metav1.ListOptions{})
	require.NoError(t, err)
	require.Len(t, list.Items, 1)
	require.NoError(t, definitions.Delete(ctx, "ships."+group, metav1.DeleteOptions{}))
	require.Eventually(t, func() bool {
		_, err := definitions.Get(ctx, "ships."+group, metav1.GetOptions{})
		return apierrors.IsNotFound(err)
	}, timeout, 20*time.Millisecond, "the definition goes with its instances")
}

func definition(group string) *apiextensionsv1.CustomResourceDefinition {
	sail := apiextensionsv1.JSON{Raw: []byte(`"square"`)}
	return &apiextensionsv1.CustomResourceDefinition{
		ObjectMeta: metav1.ObjectMeta{Name: "ships." + group},
		Spec: apiextensionsv1.CustomResourceDefinitionSpec{
			Group: group, Scope: apiextensionsv1.NamespaceScoped,
			Names: apiextensionsv1.CustomResourceDefinitionNames{Plural: "ships", Kind: "Ship"},
			Versions: []apiextensionsv1.CustomResourceDefinitionVersion{{Name: "v1", Served: true, Storage: true,
				Schema: &apiextensionsv1.CustomResourceValidation{OpenAPIV3Schema: &apiextensionsv1.JSONSchemaProps{
					Type: "object",
					Properties: map[string]apiextensionsv1.JSONSchemaProps{"spec": {
						Type: "object",
						Properties: map[string]apiextensionsv1.JSONSchemaProps{
							"crew": {Type: "integer"}, "sail": {Type: "string", Default: &sail},
						},
						XValidations: apiextensionsv1.ValidationRules{{Rule: "self.crew < 10", Message: "too many for a knarr"}},
					}},
				}}}},
		},
	}
}

// TestRestartKeepsEverything stops a server and starts another on the same files.
func TestRestartKeepsEverything(t *testing.T) {
	fs := vfs.NewMem()
	ctx := context.Background()
	box := secretbox.NewSecretboxTransformer([32]byte{1})
	transformers := map[schema.GroupResource]value.Transformer{{Resource: "secrets"}: value.NewPrefixTransformers(nil,
		value.PrefixTransformer{Prefix: []byte("k8s:enc:secretbox:v1:key1:"), Transformer: box},
		value.PrefixTransformer{Transformer: identity.NewEncryptCheckTransformer()})}
	c := startCluster(t, fs, transformers)
	made, err := c.CoreV1().Secrets("default").Create(ctx, &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: "s"}, StringData: map[string]string{"password": "very-plain-text"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	c.stop()
	require.False(t, contains(t, fs, "very-plain-text"), "secrets are encrypted at rest")
	require.True(t, contains(t, fs, "k8s:enc:secretbox:v1:key1:"))

	c = startCluster(t, fs, transformers)
	defer c.stop()
	got, err := c.CoreV1().Secrets("default").Get(ctx, "s", metav1.GetOptions{})
	require.NoError(t, err)
	require.Equal(t, made, got)
}

// contains looks for text in every file of the store.
func contains(t *testing.T, fs vfs.FS, text string) bool {
	t.Helper()
	names, err := fs.List("db")
	require.NoError(t, err)
	for _, name := range names {
		f, err := fs.Open("db/" + name)
		require.NoError(t, err)
		data, err := io.ReadAll(f)
		require.NoError(t, err)
		require.NoError(t, f.Close())
		if bytes.Contains(data, []byte(text)) {
			return true
		}
	}
	return false
}
