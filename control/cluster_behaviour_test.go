package control

import (
	"context"
	"errors"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apiextensions "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/dynamic"
	"k8s.io/utils/ptr"

	"knarr/client"
)

func running(*corev1.Pod) corev1.PodPhase { return corev1.PodRunning }

func podTemplate(labels map[string]string, policy corev1.RestartPolicy) corev1.PodTemplateSpec {
	return corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels},
		Spec: corev1.PodSpec{RestartPolicy: policy, Containers: []corev1.Container{{Name: "c", Image: "i"}}}}
}

// The course of a workload through controllers and scheduler.
func TestWorkloads(t *testing.T) {
	c := newCluster(t)
	ctx := t.Context()
	c.node("one")
	c.node("two")
	c.agent(func(p *corev1.Pod) corev1.PodPhase {
		if p.Labels["end"] != "" {
			return corev1.PodSucceeded
		}
		return corev1.PodRunning
	})
	_, err := c.admin.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "n"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	c.eventually("a namespace gets its service account and the root certificate", func(ctx context.Context) error {
		_, err := c.admin.CoreV1().ServiceAccounts("n").Get(ctx, "default", metav1.GetOptions{})
		m, err2 := c.admin.CoreV1().ConfigMaps("n").Get(ctx, "kube-root-ca.crt", metav1.GetOptions{})
		if err2 == nil {
			require.Equal(t, string(c.ca.ServerCAPEM()), m.Data["ca.crt"])
			require.NotContains(t, m.Data["ca.crt"], "PRIVATE")
		}
		return errors.Join(err, err2)
	})
	c.eventually("nodes get their share of the pod addresses and lose the taint", func(ctx context.Context) error {
		nodes, err := c.admin.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, n := range nodes.Items {
			if n.Spec.PodCIDR == "" || len(n.Spec.Taints) > 0 {
				return notYet("%s: %q %v", n.Name, n.Spec.PodCIDR, n.Spec.Taints)
			}
		}
		return nil
	})
	t.Run("deployment", func(t *testing.T) { deployment(t, c) })
	t.Run("job", func(t *testing.T) { job(t, c) })
	t.Run("daemonset and statefulset", func(t *testing.T) { sets(t, c) })
	t.Run("namespace", func(t *testing.T) { namespaceGoes(t, c) })
}

func deployment(t *testing.T, c *cluster) {
	ctx := t.Context()
	labels := map[string]string{"app": "web"}
	d, err := c.admin.AppsV1().Deployments("n").Create(ctx, &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec: appsv1.DeploymentSpec{Replicas: ptr.To[int32](3), Selector: &metav1.LabelSelector{MatchLabels: labels}, Template: podTemplate(labels, "")}}, metav1.CreateOptions{})
	require.NoError(t, err)
	_, err = c.admin.CoreV1().Services("n").Create(ctx, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec: corev1.ServiceSpec{Selector: labels, Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(8080)}}}}, metav1.CreateOptions{})
	require.NoError(t, err)
	c.eventually("three replicas are available", func(ctx context.Context) error {
		d, err = c.admin.AppsV1().Deployments("n").Get(ctx, "web", metav1.GetOptions{})
		if err == nil && d.Status.AvailableReplicas != 3 {
			err = notYet("%+v", d.Status)
		}
		return err
	})
	c.eventually("the service has three endpoints", func(ctx context.Context) error {
		slices, err := c.admin.DiscoveryV1().EndpointSlices("n").List(ctx, metav1.ListOptions{})
		if err == nil && (len(slices.Items) != 1 || len(slices.Items[0].Endpoints) != 3) {
			err = notYet("%+v", slices.Items)
		}
		return err
	})
	c.eventually("there is an event of the scheduler", func(ctx context.Context) error {
		events, err := c.admin.CoreV1().Events("n").List(ctx, metav1.ListOptions{FieldSelector: "reason=Scheduled"})
		if err == nil && len(events.Items) < 3 {
			err = notYet("%d events", len(events.Items))
		}
		return err
	})
	require.NoError(t, c.admin.AppsV1().Deployments("n").Delete(ctx, "web", metav1.DeleteOptions{}))
	c.eventually("garbage collection takes replica set and pods along", func(ctx context.Context) error {
		rs, err := c.admin.AppsV1().ReplicaSets("n").List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		pods, err := c.admin.CoreV1().Pods("n").List(ctx, metav1.ListOptions{})
		if err == nil && len(rs.Items)+len(pods.Items) > 0 {
			err = notYet("%d replica sets, %d pods left", len(rs.Items), len(pods.Items))
		}
		return err
	})
}

func job(t *testing.T, c *cluster) {
	ctx := t.Context()
	_, err := c.admin.BatchV1().Jobs("n").Create(ctx, &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Name: "pi"}, Spec: batchv1.JobSpec{
		Completions: ptr.To[int32](3), Parallelism: ptr.To[int32](2), TTLSecondsAfterFinished: ptr.To[int32](0),
		Template: podTemplate(map[string]string{"end": "well"}, corev1.RestartPolicyNever)}}, metav1.CreateOptions{})
	require.NoError(t, err)
	var seen int32
	c.eventually("the job completes and goes at once, as its TTL says", func(ctx context.Context) error {
		j, err := c.admin.BatchV1().Jobs("n").Get(ctx, "pi", metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		if err == nil {
			seen = max(seen, j.Status.Succeeded)
			err = notYet("%+v", j.Status)
		}
		return err
	})
	t.Logf("successes seen before it went: %d", seen)
}

func sets(t *testing.T, c *cluster) {
	ctx := t.Context()
	one, two := map[string]string{"app": "ds"}, map[string]string{"app": "sts"}
	_, err := c.admin.AppsV1().DaemonSets("n").Create(ctx, &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Name: "ds"},
		Spec: appsv1.DaemonSetSpec{Selector: &metav1.LabelSelector{MatchLabels: one}, Template: podTemplate(one, "")}}, metav1.CreateOptions{})
	require.NoError(t, err)
	_, err = c.admin.AppsV1().StatefulSets("n").Create(ctx, &appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Name: "sts"},
		Spec: appsv1.StatefulSetSpec{Replicas: ptr.To[int32](2), Selector: &metav1.LabelSelector{MatchLabels: two}, Template: podTemplate(two, "")}}, metav1.CreateOptions{})
	require.NoError(t, err)
	c.eventually("one pod on each node, and two in order", func(ctx context.Context) error {
		ds, err := c.admin.AppsV1().DaemonSets("n").Get(ctx, "ds", metav1.GetOptions{})
		sts, err2 := c.admin.AppsV1().StatefulSets("n").Get(ctx, "sts", metav1.GetOptions{})
		if err = errors.Join(err, err2); err == nil && (ds.Status.NumberReady != 2 || sts.Status.ReadyReplicas != 2) {
			err = notYet("%+v %+v", ds.Status, sts.Status)
		}
		return err
	})
}

func namespaceGoes(t *testing.T, c *cluster) {
	require.NoError(t, c.admin.CoreV1().Namespaces().Delete(t.Context(), "n", metav1.DeleteOptions{}))
	c.eventually("the namespace goes with everything in it", func(ctx context.Context) error {
		_, err := c.admin.CoreV1().Namespaces().Get(ctx, "n", metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return errors.Join(err, errors.New("still there"))
	})
	pods, err := c.admin.CoreV1().Pods("n").List(t.Context(), metav1.ListOptions{})
	require.NoError(t, err)
	require.Empty(t, pods.Items)
}

// A controller of somebody else runs with the others, and its panic harms nobody.
func TestExtraControllers(t *testing.T) {
	ran := make(chan struct{})
	c := newCluster(t, Controller{"good", func(ctx context.Context) error { close(ran); <-ctx.Done(); return nil }},
		Controller{"bad", func(context.Context) error { panic("bad") }})
	select {
	case <-ran:
	case <-time.After(testTimeout):
		t.Fatal("not run")
	}
	c.eventually("the others work", func(ctx context.Context) error {
		_, err := c.admin.CoreV1().ServiceAccounts("default").Get(ctx, "default", metav1.GetOptions{})
		return err
	})
}

// What the wiring costs at rest.
func TestCostAtRest(t *testing.T) {
	c := newCluster(t)
	c.node("one")
	c.eventually("the node has addresses", func(ctx context.Context) error {
		n, err := c.admin.CoreV1().Nodes().Get(ctx, "one", metav1.GetOptions{})
		if err == nil && n.Spec.PodCIDR == "" {
			err = notYet("%+v", n.Spec)
		}
		return err
	})
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	t.Logf("heap %.1f MB in use, %d goroutines (API, controllers, scheduler together)", float64(m.HeapInuse)/1e6, runtime.NumGoroutine())
	require.Less(t, runtime.NumGoroutine(), 1500)
}

// Upstream leaves these behind by itself: the allocator of service addresses (whose REST storage nobody can close from outside) with its
// queue, queues of controllers that are stopped before they have begun, and a recorder that notices its end within a second.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		// A write that is before the quota when its server stops waits ten seconds for an evaluator that has gone, as upstream's.
		goleak.IgnoreAnyFunction("k8s.io/apiserver/pkg/admission/plugin/resourcequota.(*quotaEvaluator).Evaluate"),
		goleak.IgnoreAnyFunction("k8s.io/apiserver/pkg/endpoints/handlers/finisher.finishRequest.func2.1"),
		goleak.IgnoreAnyFunction("k8s.io/kubernetes/pkg/registry/core/service/ipallocator.(*MetaAllocator).run"),
		goleak.IgnoreAnyFunction("k8s.io/kubernetes/pkg/registry/core/service/ipallocator.(*MetaAllocator).runWorker"),
		goleak.IgnoreAnyFunction("k8s.io/client-go/util/workqueue.(*Typed[...]).updateUnfinishedWorkLoop"),
		goleak.IgnoreAnyFunction("k8s.io/client-go/util/workqueue.(*delayingType[...]).waitingLoop"),
		goleak.IgnoreAnyFunction("k8s.io/kubernetes/pkg/scheduler/metrics.(*MetricAsyncRecorder).run"))
}

// Custom resources are garbage, quota and namespace content like all others, seen by their metadata in the store.
func TestCustomResources(t *testing.T) {
	c := newCluster(t)
	ctx := t.Context()
	admin := c.config(client.User("admin", user.SystemPrivilegedGroup))
	crds, err := apiextensions.NewForConfig(admin)
	require.NoError(t, err)
	objects, err := dynamic.NewForConfig(admin)
	require.NoError(t, err)
	_, err = crds.ApiextensionsV1().CustomResourceDefinitions().Create(ctx, &apiextensionsv1.CustomResourceDefinition{
		ObjectMeta: metav1.ObjectMeta{Name: "widgets.example.com"},
		Spec: apiextensionsv1.CustomResourceDefinitionSpec{Group: "example.com", Scope: apiextensionsv1.NamespaceScoped,
			Names: apiextensionsv1.CustomResourceDefinitionNames{Plural: "widgets", Kind: "Widget"},
			Versions: []apiextensionsv1.CustomResourceDefinitionVersion{{Name: "v1", Served: true, Storage: true,
				Schema: &apiextensionsv1.CustomResourceValidation{OpenAPIV3Schema: &apiextensionsv1.JSONSchemaProps{Type: "object",
					XPreserveUnknownFields: ptr.To(true)}}}}}}, metav1.CreateOptions{})
	require.NoError(t, err)
	widgets := objects.Resource(schema.GroupVersionResource{Group: "example.com", Version: "v1", Resource: "widgets"}).Namespace("default")
	widget := func(name string, owners ...any) *unstructured.Unstructured {
		return &unstructured.Unstructured{Object: map[string]any{"apiVersion": "example.com/v1", "kind": "Widget",
			"metadata": map[string]any{"name": name, "ownerReferences": owners}}}
	}
	var owner *unstructured.Unstructured
	c.eventually("the kind is served", func(ctx context.Context) error {
		owner, err = widgets.Create(ctx, widget("owner"), metav1.CreateOptions{})
		return err
	})
	ref := func(o *unstructured.Unstructured) any {
		return map[string]any{"apiVersion": "example.com/v1", "kind": "Widget", "name": o.GetName(), "uid": string(o.GetUID())}
	}
	child, err := widgets.Create(ctx, widget("child", ref(owner)), metav1.CreateOptions{})
	require.NoError(t, err)
	_, err = c.admin.CoreV1().ConfigMaps("default").Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "grandchild",
		OwnerReferences: []metav1.OwnerReference{{APIVersion: "example.com/v1", Kind: "Widget", Name: "child", UID: child.GetUID()}}}}, metav1.CreateOptions{})
	require.NoError(t, err)
	_, err = c.admin.CoreV1().ResourceQuotas("default").Create(ctx, &corev1.ResourceQuota{ObjectMeta: metav1.ObjectMeta{Name: "q"},
		Spec: corev1.ResourceQuotaSpec{Hard: corev1.ResourceList{"count/widgets.example.com": resource.MustParse("5"), "pods": resource.MustParse("9")}}}, metav1.CreateOptions{})
	require.NoError(t, err)
	used := func(n int64) func(context.Context) error {
		return func(ctx context.Context) error {
			q, err := c.admin.CoreV1().ResourceQuotas("default").Get(ctx, "q", metav1.GetOptions{})
			if err == nil && (len(q.Status.Used) != 2 || ptr.To(q.Status.Used["count/widgets.example.com"]).Value() != n) {
				err = notYet("%v", q.Status.Used)
			}
			return err
		}
	}
	c.eventually("the quota counts widgets", used(2))
	require.NoError(t, widgets.Delete(ctx, "owner", metav1.DeleteOptions{}))
	c.eventually("what the owner owned goes", func(ctx context.Context) error {
		_, err := c.admin.CoreV1().ConfigMaps("default").Get(ctx, "grandchild", metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return errors.Join(err, errors.New("still there"))
	})
	c.eventually("the quota counts them down", used(0))
}

// A pod that has ended leaves its room to others, although it still exists.
func TestEndedPodsLeaveTheirRoom(t *testing.T) {
	c := newCluster(t)
	ctx := t.Context()
	c.node("one")
	finish := make(chan struct{})
	c.agent(func(p *corev1.Pod) corev1.PodPhase {
		if p.Name == "first" {
			<-finish
			return corev1.PodSucceeded
		}
		return corev1.PodRunning
	})
	for _, name := range []string{"first", "second"} {
		c.eventually("service account", func(ctx context.Context) error {
			_, err := c.admin.CoreV1().ServiceAccounts("default").Get(ctx, "default", metav1.GetOptions{})
			return err
		})
		spec := podTemplate(nil, corev1.RestartPolicyNever).Spec
		spec.Containers[0].Resources.Requests = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("6")} // of 8
		_, err := c.admin.CoreV1().Pods("default").Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: spec}, metav1.CreateOptions{})
		require.NoError(t, err)
		if name == "first" {
			c.eventually("the first pod is bound", func(ctx context.Context) error { return boundTo(ctx, c, "first", "one") })
		}
	}
	c.eventually("the second pod finds no room", func(ctx context.Context) error {
		p, err := c.admin.CoreV1().Pods("default").Get(ctx, "second", metav1.GetOptions{})
		if err == nil && (len(p.Status.Conditions) == 0 || p.Status.Conditions[0].Reason != corev1.PodReasonUnschedulable) {
			err = notYet("%+v", p.Status)
		}
		return err
	})
	close(finish)
	c.eventually("the second pod is bound", func(ctx context.Context) error { return boundTo(ctx, c, "second", "one") })
}

func boundTo(ctx context.Context, c *cluster, pod, node string) error {
	p, err := c.admin.CoreV1().Pods("default").Get(ctx, pod, metav1.GetOptions{})
	if err == nil && p.Spec.NodeName != node {
		err = notYet("%s is on %q", pod, p.Spec.NodeName)
	}
	return err
}
