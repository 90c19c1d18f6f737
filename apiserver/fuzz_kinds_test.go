package apiserver_test

import (
	"bytes"
	"context"
	"testing"

	"github.com/stretchr/testify/require"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	autoscalingv1 "k8s.io/api/autoscaling/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	batchv1 "k8s.io/api/batch/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/utils/ptr"
)

const (
	// fuzzNamespace holds the objects that fuzzing works on, each named fuzzName.
	fuzzNamespace = "fuzz"
	fuzzName      = "seed"
	fuzzGroup     = "fuzz.example.com"
	inNamespace   = "/namespaces/" + fuzzNamespace + "/"
)

// fuzzKind is a kind that fuzzing writes. Of a kind that only passes (reviews, evictions) no object is kept.
type fuzzKind struct {
	path   string // of the collection, or of what takes the object
	object runtime.Object
	// dry kinds are written without effect: their effects would reach the rest of the cluster.
	dry bool
	// passing kinds are never stored.
	passing bool
}

var fuzzMeta = metav1.ObjectMeta{
	Name: fuzzName, Labels: map[string]string{"app": "knarr", "tier": "hull"}, Annotations: map[string]string{"example.com/note": "a \"note\" <&> \u2028"},
}

func fuzzPodSpec() corev1.PodSpec {
	probe := &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/", Port: intstr.FromString("http")}}, PeriodSeconds: 5}
	return corev1.PodSpec{
		ServiceAccountName: "default", AutomountServiceAccountToken: ptr.To(false), NodeSelector: map[string]string{"disk": "ssd"},
		InitContainers: []corev1.Container{{Name: "init", Image: "busybox:1", Command: []string{"true"}, RestartPolicy: ptr.To(corev1.ContainerRestartPolicyAlways)}},
		Containers: []corev1.Container{{
			Name: "main", Image: "example.com/app@sha256:0123456789012345678901234567890123456789012345678901234567890123", Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 80}},
			Env:            []corev1.EnvVar{{Name: "A", Value: "b"}, {Name: "N", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.name"}}}},
			Resources:      corev1.ResourceRequirements{Requests: corev1.ResourceList{"cpu": resource.MustParse("100m"), "memory": resource.MustParse("1Gi")}},
			VolumeMounts:   []corev1.VolumeMount{{Name: "v", MountPath: "/v"}},
			ReadinessProbe: probe, SecurityContext: &corev1.SecurityContext{RunAsUser: ptr.To[int64](5)},
		}},
		Volumes:     []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{SizeLimit: ptr.To(resource.MustParse("1Mi"))}}}},
		Tolerations: []corev1.Toleration{{Key: "k", Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute, TolerationSeconds: ptr.To[int64](3)}},
		Affinity: &corev1.Affinity{PodAntiAffinity: &corev1.PodAntiAffinity{RequiredDuringSchedulingIgnoredDuringExecution: []corev1.PodAffinityTerm{
			{TopologyKey: "kubernetes.io/hostname", LabelSelector: fuzzSelector()}}}},
		TopologySpreadConstraints: []corev1.TopologySpreadConstraint{{MaxSkew: 1, TopologyKey: "zone", WhenUnsatisfiable: corev1.DoNotSchedule, LabelSelector: fuzzSelector()}},
	}
}

func fuzzSelector() *metav1.LabelSelector {
	return &metav1.LabelSelector{MatchLabels: map[string]string{"app": "knarr"}, MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "tier", Operator: metav1.LabelSelectorOpExists}}}
}

func fuzzTemplate() corev1.PodTemplateSpec {
	return corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: fuzzMeta.Labels}, Spec: fuzzPodSpec()}
}

// fuzzKinds are the kinds, the ones with the most rules of their own first.
func fuzzKinds() []fuzzKind {
	return append(fuzzCoreKinds(), append(fuzzNamedKinds(), fuzzExtensionKinds()...)...)
}

func fuzzCoreKinds() []fuzzKind {
	const v1 = "/api/v1" + inNamespace
	claim := corev1.PersistentVolumeClaimSpec{AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
		Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{"storage": resource.MustParse("1Gi")}}}
	service := corev1.ServiceSpec{Selector: map[string]string{"app": "knarr"}, Ports: []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromString("http")}},
		SessionAffinity: corev1.ServiceAffinityClientIP}
	return []fuzzKind{
		{path: v1 + "configmaps", object: &corev1.ConfigMap{ObjectMeta: fuzzMeta, Data: map[string]string{"k": "v", "list": "1\n2"}, BinaryData: map[string][]byte{"b": {0, 255}}}},
		{path: v1 + "secrets", object: &corev1.Secret{ObjectMeta: fuzzMeta, Data: map[string][]byte{"k": []byte("v")}, StringData: map[string]string{"s": "t"}, Type: "example.com/x"}},
		{path: v1 + "pods", object: &corev1.Pod{ObjectMeta: fuzzMeta, Spec: fuzzPodSpec()}},
		{path: v1 + "services", object: &corev1.Service{ObjectMeta: fuzzMeta, Spec: service}},
		{path: v1 + "persistentvolumeclaims", object: &corev1.PersistentVolumeClaim{ObjectMeta: fuzzMeta, Spec: claim}},
		{path: v1 + "limitranges", dry: true, object: &corev1.LimitRange{ObjectMeta: fuzzMeta,
			Spec: corev1.LimitRangeSpec{Limits: []corev1.LimitRangeItem{{Type: corev1.LimitTypePod, Max: corev1.ResourceList{"cpu": resource.MustParse("2")}}}}}},
		{path: v1 + "serviceaccounts/default/token", passing: true, object: &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: []string{"a"}, ExpirationSeconds: ptr.To[int64](600)}}},
		{path: v1 + "pods/" + fuzzName + "/eviction", passing: true, dry: true, object: &policyv1.Eviction{ObjectMeta: metav1.ObjectMeta{Name: fuzzName}, DeleteOptions: &metav1.DeleteOptions{DryRun: []string{"All"}}}},
		{path: "/api/v1/nodes", object: &corev1.Node{ObjectMeta: fuzzMeta, Spec: corev1.NodeSpec{PodCIDR: "10.42.9.0/24", Taints: []corev1.Taint{{Key: "k", Effect: corev1.TaintEffectNoSchedule}}}}},
	}
}

func fuzzNamedKinds() []fuzzKind {
	backend := networkingv1.IngressBackend{Service: &networkingv1.IngressServiceBackend{Name: "s", Port: networkingv1.ServiceBackendPort{Number: 80}}}
	path := networkingv1.HTTPIngressPath{Path: "/", PathType: ptr.To(networkingv1.PathTypePrefix), Backend: backend}
	ingress := networkingv1.IngressSpec{Rules: []networkingv1.IngressRule{{Host: "*.example.com",
		IngressRuleValue: networkingv1.IngressRuleValue{HTTP: &networkingv1.HTTPIngressRuleValue{Paths: []networkingv1.HTTPIngressPath{path}}}}}}
	scaler := autoscalingv2.HorizontalPodAutoscalerSpec{MaxReplicas: 3, ScaleTargetRef: autoscalingv2.CrossVersionObjectReference{Kind: "Deployment", Name: "d", APIVersion: "apps/v1"},
		Metrics: []autoscalingv2.MetricSpec{{Type: autoscalingv2.ResourceMetricSourceType, Resource: &autoscalingv2.ResourceMetricSource{Name: "cpu",
			Target: autoscalingv2.MetricTarget{Type: autoscalingv2.UtilizationMetricType, AverageUtilization: ptr.To[int32](50)}}}}}
	job := batchv1.JobTemplateSpec{Spec: batchv1.JobSpec{Template: fuzzTemplate()}}
	job.Spec.Template.Spec.RestartPolicy = corev1.RestartPolicyNever
	policy := networkingv1.NetworkPolicySpec{PodSelector: *fuzzSelector(), Ingress: []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{
		{IPBlock: &networkingv1.IPBlock{CIDR: "10.0.0.0/8", Except: []string{"10.1.0.0/16"}}}}}}}
	return []fuzzKind{
		{path: "/apis/apps/v1" + inNamespace + "deployments", object: &appsv1.Deployment{ObjectMeta: fuzzMeta, Spec: appsv1.DeploymentSpec{Selector: fuzzSelector(), Template: fuzzTemplate()}}},
		{path: "/apis/batch/v1" + inNamespace + "cronjobs", object: &batchv1.CronJob{ObjectMeta: fuzzMeta, Spec: batchv1.CronJobSpec{Schedule: "*/5 * * * 1-5", JobTemplate: job}}},
		{path: "/apis/autoscaling/v2" + inNamespace + "horizontalpodautoscalers", object: &autoscalingv2.HorizontalPodAutoscaler{ObjectMeta: fuzzMeta, Spec: scaler}},
		{path: "/apis/networking.k8s.io/v1" + inNamespace + "ingresses", object: &networkingv1.Ingress{ObjectMeta: fuzzMeta, Spec: ingress}},
		{path: "/apis/networking.k8s.io/v1" + inNamespace + "networkpolicies", object: &networkingv1.NetworkPolicy{ObjectMeta: fuzzMeta, Spec: policy}},
		{path: "/apis/policy/v1" + inNamespace + "poddisruptionbudgets", object: &policyv1.PodDisruptionBudget{ObjectMeta: fuzzMeta,
			Spec: policyv1.PodDisruptionBudgetSpec{Selector: fuzzSelector(), MinAvailable: ptr.To(intstr.FromString("50%"))}}},
		{path: "/apis/rbac.authorization.k8s.io/v1" + inNamespace + "roles", object: &rbacv1.Role{ObjectMeta: fuzzMeta,
			Rules: []rbacv1.PolicyRule{{Verbs: []string{"get", "*"}, APIGroups: []string{""}, Resources: []string{"pods", "pods/log"}, ResourceNames: []string{"x"}}}}},
		{path: "/apis/coordination.k8s.io/v1" + inNamespace + "leases", object: &coordinationv1.Lease{ObjectMeta: fuzzMeta,
			Spec: coordinationv1.LeaseSpec{HolderIdentity: ptr.To("h"), LeaseDurationSeconds: ptr.To[int32](15), RenewTime: &metav1.MicroTime{}}}},
		{path: "/apis/authorization.k8s.io/v1/subjectaccessreviews", passing: true, object: &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{User: "u",
			Groups: []string{"g"}, ResourceAttributes: &authorizationv1.ResourceAttributes{Verb: "get", Resource: "pods", LabelSelector: &authorizationv1.LabelSelectorAttributes{RawSelector: "a=b"}}}}},
		{path: "/apis/authentication.k8s.io/v1/tokenreviews", passing: true, object: &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: "eyJhbGciOiJub25lIn0.e30.", Audiences: []string{"a"}}}},
		{path: "/apis/apps/v1" + inNamespace + "deployments/" + fuzzName + "/scale", passing: true, dry: true,
			object: &autoscalingv1.Scale{ObjectMeta: metav1.ObjectMeta{Name: fuzzName, Namespace: fuzzNamespace}, Spec: autoscalingv1.ScaleSpec{Replicas: 2}}},
	}
}

func fuzzExtensionKinds() []fuzzKind {
	rules := []admissionregistrationv1.NamedRuleWithOperations{{RuleWithOperations: admissionregistrationv1.RuleWithOperations{
		Operations: []admissionregistrationv1.OperationType{"CREATE"}, Rule: admissionregistrationv1.Rule{APIGroups: []string{"apps"}, APIVersions: []string{"v1"}, Resources: []string{"deployments"}}}}}
	policy := admissionregistrationv1.ValidatingAdmissionPolicySpec{MatchConstraints: &admissionregistrationv1.MatchResources{ResourceRules: rules},
		Variables:   []admissionregistrationv1.Variable{{Name: "n", Expression: "object.spec.replicas"}},
		Validations: []admissionregistrationv1.Validation{{Expression: "variables.n < 5 && object.metadata.name.matches('^[a-z]+$')", MessageExpression: "'no more than ' + string(5)"}}}
	hook := admissionregistrationv1.ValidatingWebhook{Name: "hook.example.com", ClientConfig: admissionregistrationv1.WebhookClientConfig{URL: ptr.To("https://192.0.2.1/hook")},
		Rules: []admissionregistrationv1.RuleWithOperations{rules[0].RuleWithOperations}, SideEffects: ptr.To(admissionregistrationv1.SideEffectClassNone),
		AdmissionReviewVersions: []string{"v1"}, MatchConditions: []admissionregistrationv1.MatchCondition{{Name: "m", Expression: "request.operation == 'CREATE'"}}}
	other := fuzzDefinition()
	other.Name, other.Spec.Names = "others."+fuzzGroup, apiextensionsv1.CustomResourceDefinitionNames{Plural: "others", Kind: "Other"}
	registration := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService", "metadata": map[string]any{"name": "v1.far.example.com"},
		"spec": map[string]any{"group": "far.example.com", "version": "v1", "groupPriorityMinimum": int64(5), "versionPriority": int64(5),
			"service": map[string]any{"namespace": fuzzNamespace, "name": fuzzName}, "insecureSkipTLSVerify": true}}}
	return []fuzzKind{
		{path: "/apis/" + fuzzGroup + "/v1" + inNamespace + "ships", object: &unstructured.Unstructured{Object: map[string]any{
			"apiVersion": fuzzGroup + "/v1", "kind": "Ship", "metadata": map[string]any{"name": fuzzName, "labels": map[string]any{"app": "knarr"}},
			"spec": map[string]any{"crew": int64(6), "port": "http", "holds": []any{map[string]any{"name": "fore", "tons": 1.5}}, "anything": map[string]any{"x": []any{nil, true}}},
		}}},
		{path: "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", dry: true, object: other},
		{path: "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies", dry: true, object: &admissionregistrationv1.ValidatingAdmissionPolicy{ObjectMeta: fuzzMeta, Spec: policy}},
		{path: "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations", dry: true,
			object: &admissionregistrationv1.ValidatingWebhookConfiguration{ObjectMeta: fuzzMeta, Webhooks: []admissionregistrationv1.ValidatingWebhook{hook}}},
		{path: "/apis/apiregistration.k8s.io/v1/apiservices", dry: true, object: registration},
	}
}

// fuzzDefinition is a custom resource that uses much of what a structural schema can say.
func fuzzDefinition() *apiextensionsv1.CustomResourceDefinition {
	d := definition(fuzzGroup)
	v := &d.Spec.Versions[0]
	v.Subresources = &apiextensionsv1.CustomResourceSubresources{Status: &apiextensionsv1.CustomResourceSubresourceStatus{},
		Scale: &apiextensionsv1.CustomResourceSubresourceScale{SpecReplicasPath: ".spec.crew", StatusReplicasPath: ".status.crew"}}
	v.SelectableFields = []apiextensionsv1.SelectableField{{JSONPath: ".spec.sail"}}
	spec := v.Schema.OpenAPIV3Schema.Properties["spec"]
	spec.Properties["port"] = apiextensionsv1.JSONSchemaProps{XIntOrString: true, AnyOf: []apiextensionsv1.JSONSchemaProps{{Type: "integer"}, {Type: "string"}}}
	spec.Properties["anything"] = apiextensionsv1.JSONSchemaProps{Type: "object", XPreserveUnknownFields: ptr.To(true)}
	spec.Properties["raw"] = apiextensionsv1.JSONSchemaProps{Type: "object", XEmbeddedResource: true, XPreserveUnknownFields: ptr.To(true)}
	spec.Properties["built"] = apiextensionsv1.JSONSchemaProps{Type: "string", Format: "date-time", Nullable: true}
	tons := apiextensionsv1.JSONSchemaProps{Type: "number", Default: &apiextensionsv1.JSON{Raw: []byte("2.5")}, Minimum: ptr.To(0.0)}
	spec.Properties["holds"] = apiextensionsv1.JSONSchemaProps{Type: "array", MaxItems: ptr.To[int64](8), XListType: ptr.To("map"), XListMapKeys: []string{"name"},
		Items: &apiextensionsv1.JSONSchemaPropsOrArray{Schema: &apiextensionsv1.JSONSchemaProps{Type: "object", Required: []string{"name"}, Properties: map[string]apiextensionsv1.JSONSchemaProps{
			"name": {Type: "string", Pattern: "^[a-z]*$", MaxLength: ptr.To[int64](20)}, "tons": tons}}}}
	spec.Properties["crew"] = apiextensionsv1.JSONSchemaProps{Type: "integer", Maximum: ptr.To(100.0), XValidations: apiextensionsv1.ValidationRules{{Rule: "self >= oldSelf - 5"}}}
	v.Schema.OpenAPIV3Schema.Properties["spec"] = spec
	v.Schema.OpenAPIV3Schema.Properties["status"] = apiextensionsv1.JSONSchemaProps{Type: "object", Properties: map[string]apiextensionsv1.JSONSchemaProps{"crew": {Type: "integer"}}}
	return d
}

// fuzzEncoding is a way of writing an object down.
type fuzzEncoding struct {
	contentType string
	serializer  runtime.Serializer // nil where the kind has no such form
}

func fuzzEncodings() []fuzzEncoding {
	of := func(yaml bool) runtime.Serializer {
		return json.NewSerializerWithOptions(json.DefaultMetaFactory, scheme.Scheme, scheme.Scheme, json.SerializerOptions{Yaml: yaml})
	}
	return []fuzzEncoding{{jsonType, of(false)}, {yamlType, of(true)}, {protoType, protobuf.NewSerializer(scheme.Scheme, scheme.Scheme)}}
}

// encode writes the kind's object down; nil where it has no such form.
func (k fuzzKind) encode(t testing.TB, e fuzzEncoding) []byte {
	t.Helper()
	obj := k.object.DeepCopyObject()
	if _, custom := obj.(*unstructured.Unstructured); !custom {
		if _, custom = obj.(*apiextensionsv1.CustomResourceDefinition); custom {
			obj.GetObjectKind().SetGroupVersionKind(apiextensionsv1.SchemeGroupVersion.WithKind("CustomResourceDefinition"))
		} else {
			kinds, _, err := scheme.Scheme.ObjectKinds(obj)
			require.NoError(t, err)
			obj.GetObjectKind().SetGroupVersionKind(kinds[0])
		}
		if custom && e.contentType == protoType {
			return nil
		}
	} else if e.contentType == protoType {
		return nil
	}
	var out bytes.Buffer
	require.NoError(t, e.serializer.Encode(obj, &out))
	return out.Bytes()
}

// prepare makes the place that fuzzing works in, and one object of each kind that is kept.
func (c *fuzzed) prepare(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	_, err := c.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: fuzzNamespace}}, metav1.CreateOptions{})
	require.NoError(t, err)
	_, err = c.CoreV1().ServiceAccounts(fuzzNamespace).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	c.define(t, ctx, fuzzDefinition())
	for _, k := range c.kinds {
		if !k.passing && !k.dry {
			w := c.do(t, "POST", k.path, jsonType, jsonType, k.encode(t, c.encodings[0]))
			require.Equal(t, 201, w.Code, "%s: %s", k.path, w.Body)
		}
	}
}
