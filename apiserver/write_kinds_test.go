package apiserver_test

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"
	jsonpatch "gopkg.in/evanphx/json-patch.v4"
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

// bothAgent sends these writes.
const bothAgent = "both/1"

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

// path is that of the collection in a place.
func (p *pair) path(place int) string {
	return strings.Replace(p.kind.path, inNamespace, "/namespaces/"+p.spaces[place]+"/", 1)
}

// kindWrite is a write of a kind's object. NAME in what it is for and in its body is the object's name. The body of a PUT is what the present object is merged with.
type kindWrite struct {
	method, query, contentType, at, body string
	codes                                []int
	// ours says that the write has to go our way.
	ours bool
}

// body is what is sent to a place.
func (p *pair) body(t *testing.T, w kindWrite, place int) []byte {
	t.Helper()
	body := []byte(strings.ReplaceAll(w.body, "NAME", p.name(place)))
	if w.method != http.MethodPut {
		return body
	}
	current := answerTo(p.c, http.MethodGet, p.path(place)+"/"+p.name(place), js, js, bothAgent, nil)
	if current.Code != http.StatusOK {
		return body
	}
	merged, err := jsonpatch.MergePatch(current.Body.Bytes(), body)
	require.NoError(t, err)
	return merged
}

// do sends one write to both and compares what comes back.
func (p *pair) do(t *testing.T, w kindWrite) {
	t.Helper()
	var got [2]*httptest.ResponseRecorder
	query := w.query
	for i := range got {
		path := p.path(i)
		if w.at != "" {
			path += "/" + strings.ReplaceAll(w.at, "NAME", p.name(i))
		}
		if i == 1 {
			query += "&pretty=false"
		}
		if query != "" {
			path += "?" + strings.TrimPrefix(query, "&")
		}
		body := p.body(t, w, i)
		before := p.count()
		got[i] = answerTo(p.c, w.method, path, w.contentType, js, bothAgent, body)
		if w.ours && i == 0 {
			require.Equal(t, before, p.count(), "it goes to upstream's handlers: %s %s %s", w.method, path, w.body)
		}
	}
	like := func(w *httptest.ResponseRecorder) string {
		text := ordered(withoutFlowControl(w.Body.Bytes()))
		if at := strings.Index(text, wholeObject); at >= 0 {
			text = text[:at]
		}
		return ownAddresses.ReplaceAllString(steady(text), "~")
	}
	require.Equal(t, got[1].Code, got[0].Code, "%s %s %s\n%s\n%s", w.method, w.at, w.body, got[0].Body, got[1].Body)
	require.Equal(t, got[1].Header()["Warning"], got[0].Header()["Warning"])
	require.Equal(t, like(got[1]), like(got[0]), "%s %s %s %s", w.method, w.at, w.query, w.body)
	require.Contains(t, w.codes, got[0].Code, "%s %s %s %s: %s", w.method, w.at, w.query, w.body, got[0].Body)
}

// kindWrites are what is done with an object of each kind, which is at last gone, or would be but for a namespace's own controller. changes says that our way changes such
// objects, and does not only make them.
func kindWrites(object string, changes bool) []kindWrite {
	unknown := strings.Replace(object, `"metadata":{`, `"nothing":1,"metadata":{`, 1)
	ok, gone := []int{200}, []int{404, 200}
	return []kindWrite{
		{"POST", "&dryRun=All", js, "", object, []int{201}, false},
		{"POST", "", js, "", `{"metadata":{"name":"not/a/name"}}`, []int{422}, false},
		{"POST", "", js, "", `{"metadata":{"name":"NAME"},"spec":5,"rules":5,"value":"x","subjects":3,"data":5,"secrets":5}`, []int{400}, false},
		{"POST", "&fieldValidation=Strict", js, "", unknown, []int{400}, false},
		{"PUT", "", js, "NAME", strings.Replace(object, `"metadata":{`, `"metadata":{"uid":"none",`, 1), []int{404, 409}, false},
		{"POST", "", js, "", object, []int{201}, true},
		{"POST", "", js, "", unknown, []int{409}, false},
		{"POST", "", js, "", object, []int{409}, true},
		{"PATCH", "", merge, "NAME", `{"metadata":{"labels":{"a":"b"}}}`, ok, changes},
		{"PATCH", "", smp, "NAME", `{"metadata":{"annotations":{"example.com/c":"d"},"labels":{"a":null},"finalizers":["example.com/f"]}}`, ok, false},
		{"PATCH", "", smp, "NAME", `{"metadata":{"annotations":{"example.com/c":"d"}}}`, ok, false},
		{"PATCH", "", merge, "NAME", `{"metadata":{"labels":{"-":"b"}}}`, []int{422}, false},
		{"PATCH", "", merge, "NAME", `{"spec":"x","rules":"x","value":"x","roleRef":5,"data":5,"secrets":5}`, []int{400, 422}, false},
		{"PATCH", "&dryRun=All", merge, "NAME", `{"metadata":{"labels":{"dry":"run"}}}`, ok, false},
		{"PATCH", "&fieldManager=other", smp, "NAME", `{"metadata":{"labels":{"by":"other"}}}`, ok, false},
		{"PATCH", "", smp, "NAME", `{"metadata":{"name":"elsewhere"}}`, []int{400}, false},
		{"PUT", "", js, "NAME", `{}`, ok, false},
		{"PUT", "", js, "NAME", `{"metadata":{"labels":{"put":"1"}}}`, ok, false},
		{"PUT", "&fieldManager=third", js, "NAME", `{"metadata":{"labels":{"put":null,"by":null,"more":"x"},"annotations":null}}`, ok, false},
		{"PUT", "", js, "NAME", `{"metadata":{"labels":{"put":"2"},"managedFields":null}}`, ok, false},
		{"PUT", "", js, "NAME", `{"metadata":{"resourceVersion":"1","labels":{"put":"3"}}}`, []int{409}, false},
		{"PUT", "", js, "NAME", `{"metadata":{"resourceVersion":null,"labels":{"put":"4"}}}`, []int{200, 422}, false},
		{"PUT", "", js, "NAME", `{"metadata":{"uid":"none"}}`, []int{409}, false},
		{"PUT", "", js, "NAME", `{"metadata":{"uid":null,"labels":{"put":"5"}}}`, []int{200, 422}, false},
		{"PUT", "", js, "NAME", `{"metadata":{"name":"elsewhere"}}`, []int{400}, false},
		{"PUT", "", js, "NAME", `{"metadata":{"namespace":"elsewhere","labels":{"put":"6"}}}`, []int{400, 200}, false},
		{"PUT", "", js, "NAME", `{"metadata":{"namespace":null,"labels":{"put":"7"}}}`, ok, false},
		{"PUT", "", js, "NAME", `{"metadata":{"labels":{"-":"b"}}}`, []int{422}, false},
		{"PUT", "", js, "NAME", `{"kind":"Nothing"}`, []int{400}, false},
		{"PUT", "", js, "NAME", `{"nothing":1,"metadata":{"labels":{"put":"8"}}}`, ok, false},
		{"PUT", "&fieldValidation=Strict", js, "NAME", `{"nothing":1}`, []int{400}, false},
		{"PUT", "&dryRun=All", js, "NAME", `{"metadata":{"labels":{"dry":"run"}}}`, ok, false},
		{"PUT", "", "text/plain", "NAME", `{}`, []int{415}, false},
		{"PUT", "", js, "NAME", `{"metadata":{"managedFields":[]}}`, ok, false},
		{"DELETE", "", js, "NAME", `{"preconditions":{"uid":"none"}}`, []int{409}, false},
		{"DELETE", "", js, "NAME", `{"propagationPolicy":"Background"}`, ok, changes},
		{"PATCH", "", merge, "NAME", `{"metadata":{"labels":{"while":"ending"}}}`, ok, false},
		{"PUT", "", js, "NAME", `{"metadata":{"labels":{"while":"putting"}}}`, ok, false},
		{"PUT", "", js, "NAME", `{"metadata":{"finalizers":null}}`, ok, false},
		{"DELETE", "", js, "NAME", ``, gone, false},
		{"DELETE", "", js, "NAME", `{"gracePeriodSeconds":0}`, gone, false},
		{"PATCH", "", merge, "NAME", `{"metadata":{"labels":{"a":"b"}}}`, gone, false},
		{"PUT", "", js, "NAME", object, []int{404, 409, 422, 201, 200}, false},
	}
}

// statusWrites are done with the status of an object.
func statusWrites(object string) []kindWrite {
	ok := []int{200}
	const at = "NAME/status"
	return []kindWrite{
		{"POST", "", js, "", object, []int{201}, true},
		{"PUT", "", js, at, `{"status":{"conditions":[{"type":"X","status":"True","lastTransitionTime":"2026-01-01T00:00:00Z"}]},"metadata":{"labels":{"by":"status"}}}`, ok, false},
		{"PUT", "", js, at, `{"spec":{"paused":true,"replicas":7,"parallelism":7,"nodeName":"n","podCIDR":"10.42.8.0/24","minReadySeconds":5},"status":{"conditions":null}}`, ok, false},
		{"PUT", "", js, at, `{}`, ok, false},
		{"PUT", "&fieldManager=other", js, at, `{"status":{"conditions":[{"type":"X","status":"False"},{"type":"Y","status":"True"}]}}`, ok, false},
		{"PUT", "", js, at, `{"status":{"conditions":null},"metadata":{"managedFields":[]}}`, ok, false},
		{"PUT", "", js, at, `{"metadata":{"resourceVersion":"1"},"status":{"conditions":[{"type":"Z","status":"True"}]}}`, []int{409}, false},
		{"PUT", "", js, at, `{"status":{"conditions":[{"type":"X","status":"True"},{"type":"X","status":"True"}]}}`, []int{200, 422}, false},
		{"PATCH", "", smp, at, `{"status":{"conditions":[{"type":"X","status":"Unknown"}]},"spec":{"paused":true}}`, ok, false},
		{"PATCH", "", merge, at, `{"status":{"conditions":[{"type":"W","status":"Unknown"}]},"metadata":{"annotations":{"a/b":"c"}}}`, ok, false},
		{"PUT", "", js, at, `{"status":"x"}`, []int{400}, false},
		{"DELETE", "", js, "NAME", `{"gracePeriodSeconds":0,"propagationPolicy":"Background"}`, ok, false},
		{"PUT", "", js, at, object, []int{404}, false},
	}
}

// TestKindsAreWrittenAsUpstreams: objects of each kind that our way writes, in a server that no controller looks at.
func TestKindsAreWrittenAsUpstreams(t *testing.T) {
	c := startCluster(t, vfs.NewMem(), nil)
	spaces := bothSpaces(t, c)
	n := apiserver.CountUpstreamWrites(c.server, bothAgent)
	hot := map[string]bool{}
	for _, path := range apiserver.HotPaths() {
		hot[path] = true
	}
	for _, k := range append(fuzzKinds(), startKinds()...) {
		path := strings.Replace(k.path, inNamespace, "/", 1)
		if k.passing || !hot[path] {
			continue
		}
		k.object = k.object.DeepCopyObject()
		acc, err := meta.Accessor(k.object)
		require.NoError(t, err)
		acc.SetName("NAME")
		body := string(k.encode(t, fuzzEncodings()[0]))
		run := func(name string, writes []kindWrite) {
			delete(hot, name)
			t.Run(name, func(t *testing.T) {
				p := &pair{c: c, kind: k, spaces: spaces, count: n.Load}
				for _, w := range writes {
					p.do(t, w)
				}
			})
		}
		if status := path + "/status"; hot[status] {
			run(status, statusWrites(body))
		}
		run(path, kindWrites(body, path != "/api/v1/namespaces")) // whose own changes have a namespace in their path
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

// putStatus gives the writes of a pod's status, by an update of the whole object, as controllers do.
func putStatus(t testing.TB, c *cluster, path string) func(i int) {
	w := answerTo(c, http.MethodGet, path, runtime.ContentTypeJSON, runtime.ContentTypeJSON, "bench/1", nil)
	require.Equal(t, http.StatusOK, w.Code, w.Body)
	const message = "MESSAGE"
	pod, err := jsonpatch.MergePatch(w.Body.Bytes(), []byte(`{"metadata":{"resourceVersion":null},"status":{"phase":"Running","podIP":"10.0.0.1","message":"`+message+`","conditions":[{"type":"Ready","status":"True"}]}}`))
	require.NoError(t, err)
	return func(i int) {
		send(t, c, http.MethodPut, path+"/status", runtime.ContentTypeJSON, bytes.Replace(pod, []byte(message), strconv.AppendInt(nil, int64(i), 10), 1))
	}
}

// TestUpdatesMeet: updates without a revision that come at once are all done, one after the other.
func TestUpdatesMeet(t *testing.T) {
	const writers, each = 8, 25
	c := theCluster(t)
	root := "/api/v1/namespaces/" + bothSpaces(t, c)[0]
	pod := benchPod("met")
	pod.Spec.ServiceAccountName = ""
	send(t, c, http.MethodPost, root+"/pods", runtime.ContentTypeProtobuf, encodeProto(t, pod))
	put := putStatus(t, c, root+"/pods/met")
	generation := func() int {
		w := answerTo(c, http.MethodGet, root+"/pods/met", js, js, bothAgent, nil)
		var got corev1.Pod
		require.NoError(t, json.Unmarshal(w.Body.Bytes(), &got))
		require.Len(t, got.ManagedFields, 2, "who made it, and who writes its status")
		return int(got.Generation)
	}
	put(0)
	before := generation()
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			for j := range each {
				put(1 + i*each + j)
			}
		})
	}
	wg.Wait()
	require.Equal(t, before, generation(), "a status is no new generation")
}
