package apiserver_test

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	flowcontrolv1 "k8s.io/api/flowcontrol/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	schedulingv1 "k8s.io/api/scheduling/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"

	"knarr/apiserver"
)

// startKinds are kinds that no fuzzing has, but our way of writing.
func startKinds() []fuzzKind {
	const v1, rbac, flow = "/api/v1", "/apis/rbac.authorization.k8s.io/v1", "/apis/flowcontrol.apiserver.k8s.io/v1"
	rules := []rbacv1.PolicyRule{{Verbs: []string{"get"}, APIGroups: []string{"", "apps"}, Resources: []string{"pods"}}, {Verbs: []string{"get"}, NonResourceURLs: []string{"/healthz"}}}
	subjects := []rbacv1.Subject{{Kind: "User", APIGroup: "rbac.authorization.k8s.io", Name: "u"}, {Kind: "ServiceAccount", Namespace: "default", Name: "s"}}
	role := rbacv1.RoleRef{APIGroup: "rbac.authorization.k8s.io", Kind: "ClusterRole", Name: "view"}
	template := fuzzTemplate()
	template.Spec.RestartPolicy = corev1.RestartPolicyNever
	return []fuzzKind{
		{path: v1 + "/namespaces", object: &corev1.Namespace{ObjectMeta: fuzzMeta}},
		{path: v1 + inNamespace + "serviceaccounts", object: &corev1.ServiceAccount{ObjectMeta: fuzzMeta, ImagePullSecrets: []corev1.LocalObjectReference{{Name: "x"}}}},
		{path: v1 + inNamespace + "resourcequotas", dry: true, object: &corev1.ResourceQuota{ObjectMeta: fuzzMeta, Spec: corev1.ResourceQuotaSpec{Scopes: []corev1.ResourceQuotaScope{"BestEffort"}}}},
		{path: rbac + inNamespace + "rolebindings", object: &rbacv1.RoleBinding{ObjectMeta: fuzzMeta, Subjects: subjects, RoleRef: role}},
		{path: rbac + "/clusterroles", object: &rbacv1.ClusterRole{ObjectMeta: fuzzMeta, Rules: rules, AggregationRule: &rbacv1.AggregationRule{ClusterRoleSelectors: []metav1.LabelSelector{*fuzzSelector()}}}},
		{path: rbac + "/clusterrolebindings", object: &rbacv1.ClusterRoleBinding{ObjectMeta: fuzzMeta, Subjects: subjects, RoleRef: role}},
		{path: "/apis/scheduling.k8s.io/v1/priorityclasses", object: &schedulingv1.PriorityClass{ObjectMeta: fuzzMeta, Value: 7, PreemptionPolicy: ptr.To(corev1.PreemptNever)}},
		{path: flow + "/flowschemas", object: &flowcontrolv1.FlowSchema{ObjectMeta: fuzzMeta, Spec: flowcontrolv1.FlowSchemaSpec{
			PriorityLevelConfiguration: flowcontrolv1.PriorityLevelConfigurationReference{Name: "catch-all"}, MatchingPrecedence: 900,
			Rules: []flowcontrolv1.PolicyRulesWithSubjects{{Subjects: []flowcontrolv1.Subject{{Kind: "User", User: &flowcontrolv1.UserSubject{Name: "nobody"}}},
				NonResourceRules: []flowcontrolv1.NonResourcePolicyRule{{Verbs: []string{"get"}, NonResourceURLs: []string{"/x"}}}}}}}},
		{path: flow + "/prioritylevelconfigurations", object: &flowcontrolv1.PriorityLevelConfiguration{ObjectMeta: fuzzMeta, Spec: flowcontrolv1.PriorityLevelConfigurationSpec{
			Type: flowcontrolv1.PriorityLevelEnablementLimited, Limited: &flowcontrolv1.LimitedPriorityLevelConfiguration{NominalConcurrencyShares: ptr.To[int32](3),
				LimitResponse: flowcontrolv1.LimitResponse{Type: flowcontrolv1.LimitResponseTypeReject}}}}},
		{path: "/apis/apps/v1" + inNamespace + "statefulsets", object: &appsv1.StatefulSet{ObjectMeta: fuzzMeta, Spec: appsv1.StatefulSetSpec{Selector: fuzzSelector(), Template: fuzzTemplate(), ServiceName: "s"}}},
		{path: "/apis/apps/v1" + inNamespace + "daemonsets", object: &appsv1.DaemonSet{ObjectMeta: fuzzMeta, Spec: appsv1.DaemonSetSpec{Selector: fuzzSelector(), Template: fuzzTemplate()}}},
		{path: "/apis/apps/v1" + inNamespace + "replicasets", object: &appsv1.ReplicaSet{ObjectMeta: fuzzMeta, Spec: appsv1.ReplicaSetSpec{Selector: fuzzSelector(), Template: fuzzTemplate()}}},
		{path: "/apis/batch/v1" + inNamespace + "jobs", object: &batchv1.Job{ObjectMeta: fuzzMeta, Spec: batchv1.JobSpec{Template: template}}},
	}
}

// ownAddresses are what two objects of a kind do not share.
var ownAddresses = regexp.MustCompile(`10\.43\.\d+\.\d+|"(batch.kubernetes.io/)?controller-uid":"[^"]*"|"kubernetes.io/metadata.name":"[^"]*"|UID in object meta: [0-9a-f-]*`)

// wholeObject is how a message begins that has a whole object in it.
const wholeObject = `"Invalid value: \"{`

// withoutFlowControl leaves out what priority and fairness writes to its objects meanwhile.
func withoutFlowControl(body []byte) []byte {
	var obj unstructured.Unstructured
	if obj.UnmarshalJSON(body) != nil || obj.GroupVersionKind().Group != flowcontrolv1.GroupName {
		return body
	}
	obj.SetManagedFields(slices.DeleteFunc(obj.GetManagedFields(), func(e metav1.ManagedFieldsEntry) bool {
		return strings.HasPrefix(e.Manager, "api-priority-and-fairness")
	}))
	delete(obj.Object, "status")
	data, err := obj.MarshalJSON()
	if err != nil {
		return body
	}
	return data
}

// pair writes a kind's objects in two places: by our way, and by upstream's handlers, which take a request that says how to indent.
type pair struct {
	c      *cluster
	kind   fuzzKind
	spaces [2]string
	count  func() int64
}

// name is what the object is called in a place: in two namespaces the same.
func (p *pair) name(place int) string {
	if strings.Contains(p.kind.path, inNamespace) {
		return fuzzName
	}
	return [2]string{"both-one", "both-two"}[place]
}

// do sends one write to both and compares what comes back. NAME in the body is the object's name.
func (p *pair) do(t *testing.T, method, query, contentType string, named bool, body string) (code int, ours bool) {
	t.Helper()
	var got [2]*httptest.ResponseRecorder
	for i := range got {
		path := strings.Replace(p.kind.path, inNamespace, "/namespaces/"+p.spaces[i]+"/", 1)
		if named {
			path += "/" + p.name(i)
		}
		if i == 1 {
			query += "&pretty=false"
		}
		if query != "" {
			path += "?" + strings.TrimPrefix(query, "&")
		}
		before := p.count()
		got[i] = answerTo(p.c, method, path, contentType, js, "both/1", []byte(strings.ReplaceAll(body, "NAME", p.name(i))))
		if i == 0 {
			ours = p.count() == before
		}
	}
	like := func(w *httptest.ResponseRecorder) string {
		text := ordered(withoutFlowControl(w.Body.Bytes()))
		if at := strings.Index(text, wholeObject); at >= 0 {
			text = text[:at]
		}
		return ownAddresses.ReplaceAllString(steady(text), "~")
	}
	require.Equal(t, got[1].Code, got[0].Code, "%s\n%s", got[0].Body, got[1].Body)
	require.Equal(t, got[1].Header()["Warning"], got[0].Header()["Warning"])
	require.Equal(t, like(got[1]), like(got[0]), "%s %s %s", method, query, body)
	return got[0].Code, ours
}

// TestKindsAreWrittenAsUpstreams: objects of each kind that our way writes, in a server that no controller looks at.
func TestKindsAreWrittenAsUpstreams(t *testing.T) {
	c := startCluster(t, vfs.NewMem(), nil)
	spaces := bothSpaces(t, c)
	n := apiserver.CountUpstreamWrites(c.server)
	hot := map[string]bool{}
	for path := range apiserver.HotPaths() {
		hot[path] = true
	}
	for _, k := range append(fuzzKinds(), startKinds()...) {
		path := strings.Replace(k.path, inNamespace, "/", 1)
		if k.passing || !hot[path] {
			continue
		}
		delete(hot, path)
		t.Run(path, func(t *testing.T) {
			obj := k.object.DeepCopyObject()
			acc, err := meta.Accessor(obj)
			require.NoError(t, err)
			acc.SetName("NAME")
			k.object = obj
			body := string(k.encode(t, fuzzEncodings()[0]))
			p := &pair{c: c, kind: k, spaces: spaces, count: n.Load}
			for _, w := range []struct {
				method, query, contentType string
				named                      bool
				body                       string
				codes                      []int
			}{
				{"POST", "&dryRun=All", js, false, body, []int{201}},
				{"POST", "", js, false, `{"metadata":{"name":"not/a/name"}}`, []int{422}},
				{"POST", "", js, false, `{"metadata":{"name":"NAME"},"spec":5,"rules":5,"value":"x","subjects":3,"data":5,"secrets":5}`, []int{400}},
				{"POST", "&fieldValidation=Strict", js, false, strings.Replace(body, `"metadata":{`, `"nothing":1,"metadata":{`, 1), []int{400}},
				{"POST", "", js, false, body, []int{201}},
				{"POST", "", js, false, strings.Replace(body, `"metadata":{`, `"nothing":1,"metadata":{`, 1), []int{409}},
				{"POST", "", js, false, body, []int{409}},
				{"PATCH", "", merge, true, `{"metadata":{"labels":{"a":"b"}}}`, []int{200}},
				{"PATCH", "", smp, true, `{"metadata":{"annotations":{"example.com/c":"d"},"labels":{"a":null},"finalizers":["example.com/f"]}}`, []int{200}},
				{"PATCH", "", smp, true, `{"metadata":{"annotations":{"example.com/c":"d"}}}`, []int{200}},
				{"PATCH", "", merge, true, `{"metadata":{"labels":{"-":"b"}}}`, []int{422}},
				{"PATCH", "", merge, true, `{"spec":"x","rules":"x","value":"x","roleRef":5,"data":5,"secrets":5}`, []int{400, 422}},
				{"PATCH", "&dryRun=All", merge, true, `{"metadata":{"labels":{"dry":"run"}}}`, []int{200}},
				{"PATCH", "&fieldManager=other", smp, true, `{"metadata":{"labels":{"by":"other"}}}`, []int{200}},
				{"PATCH", "", smp, true, `{"metadata":{"name":"elsewhere"}}`, []int{400}},
				{"DELETE", "", js, true, `{"preconditions":{"uid":"none"}}`, []int{409}},
				{"DELETE", "", js, true, `{"propagationPolicy":"Background"}`, []int{200}},
				{"PATCH", "", merge, true, `{"metadata":{"labels":{"while":"ending"}}}`, []int{200}},
				{"PATCH", "", merge, true, `{"metadata":{"finalizers":null}}`, []int{200}},
				{"DELETE", "", js, true, ``, []int{404, 200}},
				{"DELETE", "", js, true, `{"gracePeriodSeconds":0}`, []int{404, 200}},
				{"PATCH", "", merge, true, `{"metadata":{"labels":{"a":"b"}}}`, []int{404, 200}},
			} {
				code, ours := p.do(t, w.method, w.query, w.contentType, w.named, w.body)
				t.Log(w.method, w.query, w.body[:min(len(w.body), 60)], code, "ours:", ours)
				require.Contains(t, w.codes, code, "%s %s %s", w.method, w.query, w.body)
				if w.body == body && w.query == "" {
					require.True(t, ours, "a create goes our way")
				}
			}
			w := answerTo(c, http.MethodPost, strings.Replace(k.path, inNamespace, "/namespaces/"+spaces[0]+"/", 1), js, runtime.ContentTypeProtobuf, "x/1", []byte(strings.ReplaceAll(body, "NAME", "proto")))
			require.Equal(t, http.StatusCreated, w.Code)
			require.True(t, bytes.HasPrefix(w.Body.Bytes(), []byte("k8s\x00")))
		})
	}
	for _, known := range []string{"/api/v1/events", "/apis/events.k8s.io/v1/events", "/apis/discovery.k8s.io/v1/endpointslices"} {
		delete(hot, known) // TestWritesAreUpstreams has events; slices have no object here
	}
	require.Empty(t, hot, "kinds that are written our way, without an object here")
}

// TestNobodyEscalates: who may make roles gives no rights that he has not got himself.
func TestNobodyEscalates(t *testing.T) {
	c := theCluster(t)
	ctx, ns := place(t, c)
	role := func(name string, verbs ...string) *rbacv1.Role {
		return &rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Name: name}, Rules: []rbacv1.PolicyRule{
			{Verbs: verbs, APIGroups: []string{"rbac.authorization.k8s.io", ""}, Resources: []string{"roles", "rolebindings", "pods"}}}}
	}
	_, err := c.RbacV1().Roles(ns).Create(ctx, role("maker", "create", "get", "patch"), metav1.CreateOptions{})
	require.NoError(t, err)
	binding := &rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Name: "maker"}, Subjects: []rbacv1.Subject{{Kind: "User", Name: "carl"}}, RoleRef: rbacv1.RoleRef{Kind: "Role", Name: "maker"}}
	_, err = c.RbacV1().RoleBindings(ns).Create(ctx, binding, metav1.CreateOptions{})
	require.NoError(t, err)
	carl := c.as("carl").RbacV1()
	require.Eventually(t, func() bool {
		_, err = carl.Roles(ns).Create(ctx, role("same", "get"), metav1.CreateOptions{})
		return err == nil
	}, timeout, 10*time.Millisecond, "his role is not known: %v", err)
	const refusal = "attempting to grant RBAC permissions not currently held"
	_, err = carl.Roles(ns).Create(ctx, role("more", "delete"), metav1.CreateOptions{})
	require.ErrorContains(t, err, refusal)
	_, err = carl.Roles(ns).Patch(ctx, "same", types.MergePatchType, []byte(`{"rules":[{"verbs":["*"],"apiGroups":["*"],"resources":["*"]}]}`), metav1.PatchOptions{})
	require.ErrorContains(t, err, refusal)
	binding.Name, binding.RoleRef = "more", rbacv1.RoleRef{Kind: "ClusterRole", Name: "cluster-admin"}
	_, err = carl.RoleBindings(ns).Create(ctx, binding, metav1.CreateOptions{})
	require.ErrorContains(t, err, refusal)
}
