package apiserver_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	flowcontrolv1 "k8s.io/api/flowcontrol/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	auditv1 "k8s.io/apiserver/pkg/apis/audit/v1"
	genericoptions "k8s.io/apiserver/pkg/server/options"
	"k8s.io/utils/ptr"

	"knarr/apiserver"
)

func TestHealth(t *testing.T) {
	var broken atomic.Bool
	s := serve(t, func(c *apiserver.Config) {
		c.StoreCheck = func(context.Context) error {
			if broken.Load() {
				return errors.New("the disk is full")
			}
			return nil
		}
	})
	c := newClient(t, true)
	for _, path := range []string{"/healthz", "/livez", "/readyz", "/readyz/etcd", "/readyz/etcd-readiness", "/readyz/informer-sync", "/readyz/shutdown",
		"/livez/ping", "/livez/log", "/livez/poststarthook/rbac/bootstrap-roles", "/readyz/poststarthook/bootstrap-controller"} {
		a := s.ask(t, c, request{path: path, token: adminToken})
		require.Equal(t, 200, a.status, path)
		require.Equal(t, "ok", a.body, path)
	}
	a := s.ask(t, c, request{path: "/readyz?verbose&exclude=etcd&exclude=nonsense"})
	require.Equal(t, 200, a.status, "anonymous requests see the health")
	require.Contains(t, a.body, "[+]ping ok\n")
	require.Contains(t, a.body, "[+]etcd excluded: ok\n")
	require.Contains(t, a.body, "[+]informer-sync ok\n")
	require.Contains(t, a.body, "[+]poststarthook/start-service-ip-repair-controllers ok\n")
	require.Contains(t, a.body, `warn: some health checks cannot be excluded: no matches for "nonsense"`)
	require.True(t, strings.HasSuffix(a.body, "readyz check passed\n"), a.body)

	broken.Store(true)
	a = s.ask(t, c, request{path: "/livez"})
	require.Equal(t, 500, a.status)
	require.Contains(t, a.body, "[-]etcd failed: reason withheld\n")
	require.Contains(t, a.body, "livez check failed")
	require.NotContains(t, a.body, "disk")
	a = s.ask(t, c, request{path: "/livez/etcd", token: adminToken})
	require.Equal(t, 500, a.status)
	require.Contains(t, a.body, "the disk is full")
	require.Equal(t, 200, s.ask(t, c, request{path: "/livez?exclude=etcd"}).status)
}

func TestMetricsHaveUpstreamsNames(t *testing.T) {
	s := serve(t, func(*apiserver.Config) {})
	c := newClient(t, true)
	list := request{path: "/api/v1/namespaces", token: adminToken}
	require.Equal(t, 200, s.ask(t, c, list).status)
	require.Equal(t, 404, s.ask(t, c, request{path: "/api/v1/namespaces/none", token: adminToken}).status)
	require.Equal(t, 200, s.ask(t, c, request{path: "/api/v1/namespaces?watch=1&timeoutSeconds=1", token: adminToken}).status)
	require.Equal(t, 200, s.ask(t, c, request{path: "/version", token: adminToken}).status)
	body := `{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"counted"}}`
	require.Equal(t, 201, s.ask(t, c, request{method: "POST", path: "/api/v1/namespaces", token: adminToken, body: body,
		header: map[string]string{"Content-Type": "application/json"}}).status)
	require.Equal(t, 403, s.ask(t, c, request{path: "/metrics"}).status)
	require.Equal(t, 200, s.ask(t, c, request{path: "/livez"}).status)
	a := s.ask(t, c, request{path: "/metrics", token: adminToken})
	require.Equal(t, 200, a.status)
	for _, want := range []string{
		`apiserver_request_total{code="200",component="apiserver",dry_run="",group="",resource="namespaces",scope="cluster",subresource="",verb="LIST",version="v1"}`,
		`apiserver_request_total{code="404",component="apiserver",dry_run="",group="",resource="namespaces",scope="resource",subresource="",verb="GET",version="v1"}`,
		`apiserver_request_total{code="200",component="apiserver",dry_run="",group="",resource="namespaces",scope="cluster",subresource="",verb="WATCH",version="v1"}`,
		`apiserver_request_total{code="201",component="apiserver",dry_run="",group="",resource="namespaces",scope="resource",subresource="",verb="POST",version="v1"}`,
		`apiserver_request_duration_seconds_bucket{component="apiserver",dry_run="",group="",resource="namespaces",scope="cluster",subresource="",verb="LIST",version="v1",le="0.005"}`,
		`apiserver_request_sli_duration_seconds_count{component="apiserver",group="",resource="namespaces",scope="cluster",subresource="",verb="LIST",version="v1"}`,
		`apiserver_response_sizes_sum{component="apiserver",group="",resource="namespaces",scope="cluster",subresource="",verb="LIST",version="v1"}`,
		`apiserver_longrunning_requests{component="apiserver",group="",resource="namespaces",scope="cluster",subresource="",verb="WATCH",version="v1"} 0`,
		`apiserver_watch_events_total{group="",resource="namespaces",version="v1"}`,
		`apiserver_current_inflight_requests{request_kind="mutating"}`, `apiserver_current_inflight_requests{request_kind="readOnly"}`,
		`apiserver_storage_objects{resource="namespaces"} 5`, `apiserver_resource_objects{group="",resource="namespaces"} 5`,
		`apiserver_flowcontrol_dispatched_requests_total{`, `apiserver_admission_controller_admission_duration_seconds_bucket{`,
		`authenticated_user_requests{`, `apiserver_authorization_decisions_total{`, `kubernetes_build_info{`, `process_start_time_seconds`,
	} {
		require.Contains(t, a.body, want)
	}
	require.Contains(t, s.ask(t, c, request{path: "/metrics/slis", token: adminToken}).body, `kubernetes_healthcheck{name="etcd",type="livez"} 1`)
	require.Equal(t, "metrics reset\n", s.ask(t, c, request{method: "DELETE", path: "/metrics", token: adminToken}).body)
	require.Equal(t, 200, s.ask(t, c, list).status)
	require.Contains(t, s.ask(t, c, request{path: "/metrics", token: adminToken}).body,
		`apiserver_request_total{code="200",component="apiserver",dry_run="",group="",resource="namespaces",scope="cluster",subresource="",verb="LIST",version="v1"} 1`)
}

func TestAuditGoesToFileAndWebhook(t *testing.T) {
	dir := t.TempDir()
	received := make(chan auditv1.Event, 1000)
	hook := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, req *http.Request) {
		var list auditv1.EventList
		if json.NewDecoder(req.Body).Decode(&list) == nil {
			for _, e := range list.Items {
				received <- e
			}
		}
	}))
	defer hook.Close()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	o := genericoptions.NewAuditOptions()
	o.PolicyFile = write("policy.yaml", `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules: [{level: Request, users: [admin], resources: [{resources: [configmaps]}]}, {level: Metadata, users: [nobody]}, {level: RequestResponse, resources: [{resources: [priorityclasses, namespaces]}], verbs: [get], users: [admin]}, {level: None}]
`)
	o.LogOptions.Path = filepath.Join(dir, "audit.log")
	o.WebhookOptions.ConfigFile = write("webhook.kubeconfig", `apiVersion: v1
kind: Config
current-context: c
clusters: [{name: c, cluster: {server: "`+hook.URL+`"}}]
users: [{name: u}]
contexts: [{name: c, context: {cluster: c, user: u}}]
`)
	o.WebhookOptions.BatchOptions.BatchConfig.MaxBatchWait = 10 * time.Millisecond
	s := serve(t, func(c *apiserver.Config) { c.Options.Audit = o })
	c := newClient(t, true)
	a := s.ask(t, c, request{method: "POST", path: "/api/v1/namespaces/default/configmaps", token: adminToken,
		body:   `{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"audited"}}`,
		header: map[string]string{"Content-Type": "application/json", "Audit-Id": "mine"}})
	require.Equal(t, 201, a.status, a.body)
	require.Equal(t, "mine", a.header.Get("Audit-Id"))
	require.Equal(t, 403, s.ask(t, c, request{path: "/api/v1/secrets", token: nobodyToken}).status)
	require.Equal(t, 200, s.ask(t, c, request{path: "/api/v1/secrets", token: adminToken}).status)
	require.Equal(t, 200, s.ask(t, c, request{path: "/api/v1/namespaces/default", token: adminToken}).status)
	s.end()
	require.NoError(t, <-s.done)
	logged, err := os.ReadFile(o.LogOptions.Path)
	require.NoError(t, err)
	lines := strings.Split(strings.TrimSpace(string(logged)), "\n")
	require.Len(t, lines, 3, string(logged))
	var first, second, third auditv1.Event
	require.NoError(t, json.Unmarshal([]byte(lines[2]), &third))
	require.Contains(t, string(third.ResponseObject.Raw), `"kind":"Namespace"`)
	require.NoError(t, json.Unmarshal([]byte(lines[0]), &first))
	require.NoError(t, json.Unmarshal([]byte(lines[1]), &second))
	require.Equal(t, "mine", string(first.AuditID))
	require.Equal(t, "audited", first.ObjectRef.Name)
	require.Contains(t, string(first.RequestObject.Raw), `"kind":"ConfigMap"`)
	require.Equal(t, "allow", first.Annotations["authorization.k8s.io/decision"])
	require.Equal(t, "nobody", second.User.Username)
	require.EqualValues(t, 403, second.ResponseStatus.Code)
	require.Len(t, received, 3, "the shutdown delivers what is buffered")
	require.Equal(t, first.AuditID, (<-received).AuditID)
}

func TestFairnessClassifies(t *testing.T) {
	s := serve(t, func(*apiserver.Config) {})
	c := newClient(t, true)
	level := func(token, path string) string {
		return s.ask(t, c, request{path: path, token: token}).header.Get("X-Kubernetes-Pf-Prioritylevel-Uid")
	}
	admin, nobody := level(adminToken, "/version"), level(nobodyToken, "/version")
	require.NotEmpty(t, admin)
	require.NotEmpty(t, nobody)
	require.NotEqual(t, admin, nobody, "exempt and global-default")
	require.NotEmpty(t, level(adminToken, "/api/v1/namespaces?watch=1&timeoutSeconds=1"))
	require.Eventually(t, func() bool {
		return strings.Contains(s.ask(t, c, request{path: "/apis/flowcontrol.apiserver.k8s.io/v1/flowschemas/exempt", token: adminToken}).body, `"type":"Dangling","status":"False"`)
	}, timeout, 20*time.Millisecond, "the status says that the level exists")
}

// TestFairnessRejects gives a user a level without seats and lets him hold the one request that it runs.
func TestFairnessRejects(t *testing.T) {
	s := serve(t, func(*apiserver.Config) {})
	ctx := t.Context()
	_, err := s.FlowcontrolV1().PriorityLevelConfigurations().Create(ctx, &flowcontrolv1.PriorityLevelConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: "none"},
		Spec: flowcontrolv1.PriorityLevelConfigurationSpec{Type: flowcontrolv1.PriorityLevelEnablementLimited, Limited: &flowcontrolv1.LimitedPriorityLevelConfiguration{
			NominalConcurrencyShares: ptr.To[int32](0), BorrowingLimitPercent: ptr.To[int32](0), LimitResponse: flowcontrolv1.LimitResponse{Type: flowcontrolv1.LimitResponseTypeReject}}},
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	schema, err := s.FlowcontrolV1().FlowSchemas().Create(ctx, &flowcontrolv1.FlowSchema{
		ObjectMeta: metav1.ObjectMeta{Name: "none"},
		Spec: flowcontrolv1.FlowSchemaSpec{MatchingPrecedence: 10, PriorityLevelConfiguration: flowcontrolv1.PriorityLevelConfigurationReference{Name: "none"},
			Rules: []flowcontrolv1.PolicyRulesWithSubjects{{
				Subjects:         []flowcontrolv1.Subject{{Kind: flowcontrolv1.SubjectKindUser, User: &flowcontrolv1.UserSubject{Name: "nobody"}}},
				ResourceRules:    []flowcontrolv1.ResourcePolicyRule{{Verbs: []string{"*"}, APIGroups: []string{"*"}, Resources: []string{"*"}, ClusterScope: true, Namespaces: []string{"*"}}},
				NonResourceRules: []flowcontrolv1.NonResourcePolicyRule{{Verbs: []string{"*"}, NonResourceURLs: []string{"*"}}}}}},
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	_, err = s.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: "nobody"},
		RoleRef:  rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "cluster-admin"},
		Subjects: []rbacv1.Subject{{Kind: "User", APIGroup: rbacv1.GroupName, Name: "nobody"}}}, metav1.CreateOptions{})
	require.NoError(t, err)
	c := newClient(t, true)
	require.Eventually(t, func() bool { // the binding and the level have each reached who decides by them
		a := s.ask(t, c, request{path: "/version", token: nobodyToken})
		return a.header.Get("X-Kubernetes-Pf-Flowschema-Uid") == string(schema.UID) &&
			s.ask(t, c, request{path: "/api/v1/namespaces", token: nobodyToken}).status == 200
	}, timeout, 5*time.Millisecond)
	hold, release := io.Pipe() // a level without seats runs one request at a time: this one
	defer release.Close()
	req, err := http.NewRequest(http.MethodPost, s.url+"/api/v1/namespaces", hold)
	require.NoError(t, err)
	req.Header.Set("Authorization", "Bearer "+nobodyToken)
	go func() {
		if resp, err := c.Do(req); err == nil {
			_ = resp.Body.Close()
		}
	}()
	var a answer
	require.Eventually(t, func() bool {
		a = s.ask(t, c, request{path: "/version", token: nobodyToken})
		return a.status == 429
	}, timeout, 20*time.Millisecond)
	require.Equal(t, "Too many requests, please try again later.\n", a.body)
	require.Equal(t, "1", a.header.Get("Retry-After"))
	require.Equal(t, 200, s.ask(t, c, request{path: "/version", token: adminToken}).status)
	require.Contains(t, s.ask(t, c, request{path: "/metrics", token: adminToken}).body, `apiserver_flowcontrol_rejected_requests_total{flow_schema="none",priority_level="none",reason="concurrency-limit"}`)
}

// TestShutdownDropsNoRequest stops a server under load: every request is answered or was never accepted.
func TestShutdownDropsNoRequest(t *testing.T) {
	s := serve(t, func(*apiserver.Config) {})
	watching, err := http.NewRequest(http.MethodGet, s.url+"/api/v1/configmaps?watch=1", nil)
	require.NoError(t, err)
	watching.Header.Set("Authorization", "Bearer "+adminToken)
	w, err := newClient(t, true).Do(watching)
	require.NoError(t, err)
	defer w.Body.Close()

	var answered, refused, written atomic.Int64
	var wg sync.WaitGroup
	ready := make(chan struct{}, 8)
	failures := make(chan error, 100)
	for i := range 8 {
		client := newClient(t, i%4 != 0)
		wg.Go(func() {
			load(s, client, ready, failures, &answered, &refused, &written)
		})
	}
	for range 8 {
		<-ready
	}
	s.end()
	require.NoError(t, <-s.done)
	wg.Wait()
	close(failures)
	for err := range failures {
		t.Error(err)
	}
	require.Positive(t, refused.Load())
	t.Logf("%d requests answered", answered.Load())
	_, err = io.Copy(io.Discard, bufio.NewReader(w.Body))
	require.NoError(t, err, "the watch ended in order")
	maps, err := s.CoreV1().ConfigMaps("default").List(t.Context(), listOptions("load=true"))
	require.NoError(t, err)
	require.EqualValues(t, written.Load(), len(maps.Items), "what was answered is stored, and nothing else")
}

// load asks and writes until the server takes no more connections.
func load(s *served, c *http.Client, ready chan<- struct{}, failures chan<- error, answered, refused, written *atomic.Int64) {
	body := `{"apiVersion":"v1","kind":"ConfigMap","metadata":{"generateName":"load-","labels":{"load":"true"}}}`
	for n := 0; ; n++ {
		r := request{path: "/api/v1/namespaces/default", token: adminToken}
		if n%2 == 1 {
			r = request{method: "POST", path: "/api/v1/namespaces/default/configmaps", token: adminToken, body: body, header: map[string]string{"Content-Type": "application/json"}}
		}
		a, err := s.try(c, r)
		switch {
		case errors.Is(err, syscall.ECONNREFUSED), isDial(err):
			refused.Add(1)
			return
		case err != nil:
			failures <- err
			return
		case a.status != 200 && a.status != 201:
			failures <- errors.New(a.body)
			return
		}
		answered.Add(1)
		if a.status == 201 {
			written.Add(1)
		}
		if n == 20 {
			ready <- struct{}{}
		}
	}
}

// isDial tells errors of a connection that the server never accepted.
func isDial(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "dial"
}

func TestDeadlines(t *testing.T) {
	s := serve(t, func(*apiserver.Config) {})
	hold, release := io.Pipe()
	defer release.Close()
	req, err := http.NewRequest(http.MethodPost, s.url+"/api/v1/namespaces?timeout=200ms", hold)
	require.NoError(t, err)
	req.Header.Set("Authorization", "Bearer "+adminToken)
	req.Header.Set("Content-Type", "application/json")
	resp, err := newClient(t, true).Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.Equal(t, 504, resp.StatusCode, string(data))
	require.Contains(t, string(data), "request did not complete within the allotted timeout")
	a := s.ask(t, newClient(t, true), request{path: "/api/v1/namespaces?timeout=soon", token: adminToken})
	require.Equal(t, 400, a.status)
	require.Contains(t, a.body, "invalid timeout specified in the request URL")
}

// TestHTTPDetails checks what clients and proxies read beside the body.
func TestHTTPDetails(t *testing.T) {
	s := serve(t, func(*apiserver.Config) {})
	c := newClient(t, true)
	for _, path := range []string{"/healthz", "/livez", "/readyz", "/version"} {
		require.Equal(t, 200, s.ask(t, c, request{path: path}).status, "anonymous %s", path)
	}
	a := s.ask(t, c, request{path: "/api/v1/nodes"})
	require.Equal(t, 403, a.status)
	require.Equal(t, "nosniff", a.header.Get("X-Content-Type-Options"))
	require.JSONEq(t, `{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","reason":"Forbidden","code":403,"details":{"kind":"nodes"},
		"message":"nodes is forbidden: User \"system:anonymous\" cannot list resource \"nodes\" in API group \"\" at the cluster scope"}`, a.body)
	a = s.ask(t, c, request{path: "/api", token: "wrong"})
	require.Equal(t, 401, a.status)
	require.JSONEq(t, `{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"Unauthorized","reason":"Unauthorized","code":401}`, a.body)
	require.Equal(t, "no-cache, private", a.header.Get("Cache-Control"))
	require.Len(t, a.header.Get("Audit-Id"), 36)
	a = s.ask(t, c, request{path: "/api/v1/none", token: adminToken})
	require.JSONEq(t, `{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"the server could not find the requested resource",
		"reason":"NotFound","details":{},"code":404}`, a.body)
	require.Equal(t, "404 page not found\n", s.ask(t, c, request{path: "/apis/none/v1/x", token: adminToken}).body)
	var version map[string]string
	require.NoError(t, json.Unmarshal([]byte(s.ask(t, c, request{path: "/version"}).body), &version))
	for _, field := range []string{"major", "minor", "emulationMajor", "emulationMinor", "minCompatibilityMajor", "minCompatibilityMinor",
		"gitVersion", "gitCommit", "gitTreeState", "buildDate", "goVersion", "compiler", "platform"} {
		require.Contains(t, version, field)
	}
	a = s.ask(t, c, request{path: "/", token: adminToken})
	for _, path := range []string{"/api", "/apis", "/healthz/ping", "/livez/etcd", "/metrics", "/metrics/slis", "/openapi/v2", "/openapi/v3", "/version", "/openid/v1/jwks"} {
		require.Contains(t, a.body, `"`+path+`"`)
	}
}
