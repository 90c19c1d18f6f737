package apiserver_test

import (
	"bytes"
	"context"
	"runtime/pprof"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
)

// policyLoops counts the loops of upstream's that look each second whether policies have changed.
func policyLoops(t *testing.T) int {
	var all bytes.Buffer
	require.NoError(t, pprof.Lookup("goroutine").WriteTo(&all, 2))
	return bytes.Count(all.Bytes(), []byte("created by k8s.io/apiserver/pkg/admission/plugin/policy/generic.(*policySource[...]).Run"))
}

// TestPolicies: the plugins of admission policies begin with the first policy, and know those of a store from the first request on.
func TestPolicies(t *testing.T) {
	fs := vfs.NewMem()
	before := policyLoops(t)
	c := startCluster(t, fs, nil)
	ctx := context.Background()
	create := func(name string) (*corev1.ConfigMap, error) {
		return c.CoreV1().ConfigMaps("default").Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
	}
	refused := func() bool {
		_, err := create("forbidden")
		require.True(t, err == nil || apierrors.IsInvalid(err), "%v", err)
		return err != nil
	}
	marked := func() bool {
		m, err := create("allowed")
		require.NoError(t, err)
		return m.Labels["marked"] == "yes"
	}
	require.False(t, refused())
	require.False(t, marked())
	require.Equal(t, before, policyLoops(t), "no policy, no loop")

	rules := &admissionregistrationv1.MatchResources{ResourceRules: []admissionregistrationv1.NamedRuleWithOperations{{RuleWithOperations: admissionregistrationv1.RuleWithOperations{
		Operations: []admissionregistrationv1.OperationType{admissionregistrationv1.Create},
		Rule:       admissionregistrationv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"configmaps"}}}}}}
	of := c.AdmissionregistrationV1()
	named := metav1.ObjectMeta{Name: "test"}
	_, err := of.ValidatingAdmissionPolicies().Create(ctx, &admissionregistrationv1.ValidatingAdmissionPolicy{ObjectMeta: named, Spec: admissionregistrationv1.ValidatingAdmissionPolicySpec{
		MatchConstraints: rules, Validations: []admissionregistrationv1.Validation{{Expression: "object.metadata.name != 'forbidden'"}}}}, metav1.CreateOptions{})
	require.NoError(t, err)
	_, err = of.ValidatingAdmissionPolicyBindings().Create(ctx, &admissionregistrationv1.ValidatingAdmissionPolicyBinding{ObjectMeta: named, Spec: admissionregistrationv1.ValidatingAdmissionPolicyBindingSpec{
		PolicyName: "test", ValidationActions: []admissionregistrationv1.ValidationAction{admissionregistrationv1.Deny}}}, metav1.CreateOptions{})
	require.NoError(t, err)
	require.Eventually(t, refused, timeout, 10*time.Millisecond)
	require.Equal(t, before+1, policyLoops(t))
	_, err = of.MutatingAdmissionPolicies().Create(ctx, &admissionregistrationv1.MutatingAdmissionPolicy{ObjectMeta: named, Spec: admissionregistrationv1.MutatingAdmissionPolicySpec{
		MatchConstraints: rules, FailurePolicy: ptr.To(admissionregistrationv1.Fail), ReinvocationPolicy: admissionregistrationv1.NeverReinvocationPolicy,
		Mutations: []admissionregistrationv1.Mutation{{PatchType: admissionregistrationv1.PatchTypeApplyConfiguration,
			ApplyConfiguration: &admissionregistrationv1.ApplyConfiguration{Expression: `Object{metadata: Object.metadata{labels: {"marked": "yes"}}}`}}}}}, metav1.CreateOptions{})
	require.NoError(t, err)
	_, err = of.MutatingAdmissionPolicyBindings().Create(ctx, &admissionregistrationv1.MutatingAdmissionPolicyBinding{ObjectMeta: named,
		Spec: admissionregistrationv1.MutatingAdmissionPolicyBindingSpec{PolicyName: "test"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	require.Eventually(t, marked, timeout, 10*time.Millisecond)
	require.Equal(t, before+2, policyLoops(t))
	c.stop()

	c = startCluster(t, fs, nil)
	defer c.stop()
	require.True(t, refused())
	require.True(t, marked())
}
