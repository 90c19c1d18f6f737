package apiserver_test

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"

	"knarr/apiserver"
)

// TestPluginsBegin: a plugin that had nothing to do works from the moment on that it has, and no longer than that.
func TestPluginsBegin(t *testing.T) {
	c := theCluster(t)
	ctx := context.Background()
	space := bothSpaces(t, c)[0]
	create := func(name string) error {
		_, err := c.CoreV1().ConfigMaps(space).Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		return err
	}
	require.NoError(t, create("before"))

	quota := &corev1.ResourceQuota{ObjectMeta: metav1.ObjectMeta{Name: "q"}, Spec: corev1.ResourceQuotaSpec{Hard: corev1.ResourceList{"count/configmaps": resource.MustParse("1")}}}
	quota, err := c.CoreV1().ResourceQuotas(space).Create(ctx, quota, metav1.CreateOptions{})
	require.NoError(t, err)
	quota.Status = corev1.ResourceQuotaStatus{Hard: quota.Spec.Hard, Used: quota.Spec.Hard} // as the controller would, which does not run
	_, err = c.CoreV1().ResourceQuotas(space).UpdateStatus(ctx, quota, metav1.UpdateOptions{})
	require.NoError(t, err)
	err = create("quota")
	require.True(t, apierrors.IsForbidden(err), "%v", err)
	require.NoError(t, c.CoreV1().ResourceQuotas(space).Delete(ctx, "q", metav1.DeleteOptions{}))
	require.NoError(t, create("quota"))

	limits := &corev1.LimitRange{ObjectMeta: metav1.ObjectMeta{Name: "l"}, Spec: corev1.LimitRangeSpec{Limits: []corev1.LimitRangeItem{
		{Type: corev1.LimitTypeContainer, Default: corev1.ResourceList{"cpu": resource.MustParse("100m")}}}}}
	_, err = c.CoreV1().LimitRanges(space).Create(ctx, limits, metav1.CreateOptions{})
	require.NoError(t, err)
	pod := benchPod("limited")
	pod.Spec.ServiceAccountName = ""
	made, err := c.CoreV1().Pods(space).Create(ctx, pod, metav1.CreateOptions{})
	require.NoError(t, err)
	require.Equal(t, "100m", made.Spec.Containers[0].Resources.Limits.Cpu().String())

	hook := &admissionregistrationv1.ValidatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: space}, Webhooks: []admissionregistrationv1.ValidatingWebhook{{
		Name: "no.body.there", AdmissionReviewVersions: []string{"v1"}, SideEffects: ptr.To(admissionregistrationv1.SideEffectClassNone), TimeoutSeconds: ptr.To[int32](1),
		ClientConfig:      admissionregistrationv1.WebhookClientConfig{URL: ptr.To("https://127.0.0.1:1/")},
		NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: space}},
		Rules: []admissionregistrationv1.RuleWithOperations{{Operations: []admissionregistrationv1.OperationType{"*"},
			Rule: admissionregistrationv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"configmaps"}}}},
	}}}
	hooks := c.AdmissionregistrationV1().ValidatingWebhookConfigurations()
	_, err = hooks.Create(ctx, hook, metav1.CreateOptions{})
	require.NoError(t, err)
	n := 0
	require.Eventually(t, func() bool { n++; return apierrors.IsInternalError(create("hook" + string(rune('a'+n)))) }, timeout, 5*time.Millisecond)
	patch := func() error {
		_, err := c.CoreV1().ConfigMaps(space).Patch(ctx, "before", types.MergePatchType, []byte(`{"data":{"patched":"yes"}}`), metav1.PatchOptions{})
		return err
	}
	err = patch()
	require.True(t, apierrors.IsInternalError(err), "%v", err)
	stays, err := c.CoreV1().ConfigMaps(space).Get(ctx, "before", metav1.GetOptions{})
	require.NoError(t, err)
	require.Empty(t, stays.Data)
	require.NoError(t, hooks.Delete(ctx, space, metav1.DeleteOptions{}))
	require.NoError(t, create("unhooked"))
	require.NoError(t, patch())

	require.NoError(t, c.CoreV1().Namespaces().Delete(ctx, space, metav1.DeleteOptions{}))
	err = create("ending")
	require.True(t, apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause), "%v", err)
}

// TestAdmissionIsCounted: in upstream's series, also of plugins that had nothing to do; and so is the size of what is written.
func TestAdmissionIsCounted(t *testing.T) {
	s := serve(t, func(*apiserver.Config) {})
	c := newClient(t, true)
	scrape := func() string { return s.ask(t, c, request{path: "/metrics", token: adminToken}).body }
	create := request{method: "POST", path: "/api/v1/namespaces/default/configmaps", token: adminToken,
		body: `{"metadata":{"generateName":"counted-"}}`, header: map[string]string{"Content-Type": "application/json"}}
	refused := request{method: "DELETE", path: "/api/v1/namespaces/default", token: adminToken}
	for range 2 {
		require.Equal(t, 201, s.ask(t, c, create).status)
		require.Equal(t, 403, s.ask(t, c, refused).status)
		got := scrape()
		for _, want := range []string{
			`apiserver_admission_controller_admission_duration_seconds_count{name="ResourceQuota",operation="CREATE",rejected="false",type="validate"}`,
			`apiserver_admission_controller_admission_duration_seconds_count{name="MutatingAdmissionWebhook",operation="CREATE",rejected="false",type="admit"}`,
			`apiserver_admission_controller_admission_duration_seconds_count{name="ServiceAccount",operation="CREATE",rejected="false",type="admit"}`,
			`apiserver_admission_controller_admission_duration_seconds_count{name="NamespaceLifecycle",operation="DELETE",rejected="true",type="admit"} 1`,
			`apiserver_admission_step_admission_duration_seconds_count{operation="DELETE",rejected="true",type="admit"} 1`,
			`apiserver_admission_step_admission_duration_seconds_count{operation="CREATE",rejected="false",type="validate"}`,
			`apiserver_admission_step_admission_duration_seconds_summary_count{operation="CREATE",rejected="false",type="validate"}`,
			`apiserver_request_body_size_bytes_count{group="",resource="configmaps",verb="create"}`,
		} {
			require.Contains(t, got, want)
		}
		require.NotContains(t, got, `name="ResourceQuota",operation="CREATE",rejected="false",type="admit"`, "that plugin does not mutate")
		require.Equal(t, "metrics reset\n", s.ask(t, c, request{method: "DELETE", path: "/metrics", token: adminToken}).body)
	}
}
