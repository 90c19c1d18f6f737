package control

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/utils/ptr"

	"knarr/api"
	"knarr/apiserver"
	"knarr/client"
	"knarr/scheduler"
	"knarr/store"
	"knarr/store/pebble"
	"knarr/system/pki"
)

// testTimeout bounds waits of tests; it is only reached when a test fails.
const testTimeout = 60 * time.Second

// cluster is a real API over a store in memory, with controllers and scheduler, and nodes that exist only in the API.
type cluster struct {
	t       *testing.T
	store   *store.Store
	tables  *api.Tables
	handler atomic.Pointer[http.Handler]
	admin   kubernetes.Interface
	ca      *pki.Authority
	dir     string
}

// newCluster starts everything; it is all gone when the test has ended.
func newCluster(t *testing.T, extra ...Controller) *cluster {
	c := &cluster{t: t, dir: t.TempDir()}
	ctx, cancel := context.WithCancel(context.Background())
	var parts sync.WaitGroup
	var err error
	c.ca, err = pki.Load(c.dir, pki.Options{})
	require.NoError(t, err)
	engine, err := pebble.Open(ctx, pebble.Options{Dir: "db", FS: vfs.NewMem()})
	require.NoError(t, err)
	c.store, err = store.Open(ctx, store.Options{Engine: engine, Debug: true})
	require.NoError(t, err)
	t.Cleanup(func() {
		cancel()
		parts.Wait()
		require.NoError(t, c.store.Close())
	})
	registry, err := api.NewRegistry(c.store, nil)
	require.NoError(t, err)
	c.tables = registry.Tables()
	c.serve(ctx, registry, func(f func(context.Context)) { parts.Go(func() { f(ctx) }) })
	parts.Go(func() { c.must(ctx, Run(ctx, c.options(extra...))) })
	c.admin, err = kubernetes.NewForConfig(c.config(client.User("admin", user.SystemPrivilegedGroup)))
	require.NoError(t, err)
	parts.Go(func() {
		c.must(ctx, scheduler.Run(ctx, scheduler.Options{Config: c.config(client.User(scheduler.UserName)), Informers: func() informers.SharedInformerFactory { return client.NewFactory(c.views()) }}))
	})
	return c
}

func (c *cluster) must(ctx context.Context, err error) {
	if err != nil {
		c.t.Errorf("a part ended (%v): %v", ctx.Err(), err)
	}
}

func (c *cluster) views() client.Options {
	return client.Options{Tables: c.tables, Convert: api.Convert}
}

func (c *cluster) config(u user.Info) *rest.Config { return client.Config(c, u) }

// ServeHTTP is the API for in-process callers, some of which are made before it.
func (c *cluster) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := c.handler.Load()
	if h == nil {
		http.Error(w, "the API is starting", http.StatusServiceUnavailable)
		return
	}
	(*h).ServeHTTP(w, r)
}

func (c *cluster) serve(ctx context.Context, registry *api.Registry, run func(func(context.Context))) {
	informers, extensions, aggregations := client.NewFactory(c.views()), client.NewExtensionsFactory(c.views()), client.NewAggregatorFactory(c.views())
	front := c.ca.FrontProxySource()
	s, err := apiserver.New(ctx, apiserver.Config{
		Registry: registry, Loopback: c.config(client.User("system:apiserver", user.SystemPrivilegedGroup)), InProcessUser: client.UserFrom,
		Informers: informers, ExtensionInformers: extensions, AggregationInformers: aggregations,
		ClientCA: c.ca.ClientCAPEM(), RequestHeaderCA: c.ca.FrontProxyCAPEM(), ProxyClientName: pki.FrontProxyUser,
		ProxyClientCert: front.GetClientCertificate, ServiceAccountKey: c.ca.ServiceAccountKey(),
		KubeletTransport: &http.Transport{}, ProxyTransport: &http.Transport{}, AdvertiseAddress: net.IPv4(192, 0, 2, 1), Port: 6443,
		ServiceCIDR: net.IPNet{IP: net.IPv4(10, 43, 0, 0).To4(), Mask: net.CIDRMask(16, 32)}, NodePorts: apiserver.PortRange{First: 30000, Last: 32767},
		ClusterDNS: net.IPv4(10, 43, 0, 10),
	})
	require.NoError(c.t, err)
	h := s.Handler()
	c.handler.Store(&h)
	informers.StartWithContext(ctx)
	extensions.StartWithContext(ctx)
	aggregations.StartWithContext(ctx)
	run(func(ctx context.Context) {
		<-ctx.Done()
		informers.Shutdown()
		extensions.Shutdown()
		aggregations.Shutdown()
	})
	c.serviceRange(ctx)
	require.NoError(c.t, s.Start(ctx, run))
}

// serviceRange makes the range of service addresses known before the bootstrap wants the first of them.
func (c *cluster) serviceRange(ctx context.Context) {
	kube, err := kubernetes.NewForConfig(c.config(client.User("system:apiserver", user.SystemPrivilegedGroup)))
	require.NoError(c.t, err)
	cidr, err := kube.NetworkingV1().ServiceCIDRs().Create(ctx, &networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"},
		Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.43.0.0/16"}}}, metav1.CreateOptions{})
	require.NoError(c.t, err)
	cidr.Status.Conditions = []metav1.Condition{{Type: networkingv1.ServiceCIDRConditionReady, Status: metav1.ConditionTrue, LastTransitionTime: metav1.Now()}}
	_, err = kube.NetworkingV1().ServiceCIDRs().UpdateStatus(ctx, cidr, metav1.UpdateOptions{})
	require.NoError(c.t, err)
	_, err = kube.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{})
	require.NoError(c.t, err)
	require.Eventually(c.t, func() bool {
		_, err := kube.CoreV1().Services("default").Create(ctx, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "probe"},
			Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 1}}}}, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		return err == nil
	}, testTimeout, time.Millisecond)
}

func (c *cluster) options(extra ...Controller) Options {
	return Options{
		Config: c.config, Informers: client.NewFactory(c.views()), Metadata: client.NewMetadataFactory(c.views(), nil), Changed: c.tables.Changed,
		PodCIDR: netip.MustParsePrefix("10.42.0.0/16"), ServiceCIDR: netip.MustParsePrefix("10.43.0.0/16"),
		RootCA: c.ca.ServerCAPEM(), ServiceAccountKey: c.ca.ServiceAccountKey(),
		ClientSigner:  KeyPair{filepath.Join(c.dir, "client-ca.pem"), filepath.Join(c.dir, "client-ca.pem")},
		ServingSigner: KeyPair{filepath.Join(c.dir, "server-ca.pem"), filepath.Join(c.dir, "server-ca.pem")},
		Extra:         extra,
	}
}

// node adds a node that is ready for pods.
func (c *cluster) node(name string) {
	ctx := c.t.Context()
	n, err := c.admin.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	require.NoError(c.t, err)
	room := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("8"), corev1.ResourceMemory: resource.MustParse("16Gi"), corev1.ResourcePods: resource.MustParse("110")}
	now := metav1.Now()
	status, err := json.Marshal(map[string]any{"status": corev1.NodeStatus{Capacity: room, Allocatable: room, Conditions: []corev1.NodeCondition{
		{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "KubeletReady", LastHeartbeatTime: now, LastTransitionTime: now}}}})
	require.NoError(c.t, err)
	_, err = c.admin.CoreV1().Nodes().Patch(ctx, name, types.StrategicMergePatchType, status, metav1.PatchOptions{}, "status")
	require.NoError(c.t, err)
	_, err = c.admin.CoordinationV1().Leases("kube-node-lease").Create(ctx, &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{Name: name, OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: n.Name, UID: n.UID}}},
		Spec:       coordinationv1.LeaseSpec{HolderIdentity: &name, RenewTime: ptr.To(metav1.NowMicro()), LeaseDurationSeconds: ptr.To[int32](40)}}, metav1.CreateOptions{})
	require.NoError(c.t, err)
}

// agent plays the agent of all nodes: pods that are bound reach the phase that `phase` says, pods that are to go are gone.
func (c *cluster) agent(phase func(*corev1.Pod) corev1.PodPhase) {
	ctx, cancel := context.WithCancel(context.Background())
	f := client.NewFactory(c.views())
	act := func(obj any) {
		p := obj.(*corev1.Pod)
		switch {
		case p.Spec.NodeName == "":
		case p.DeletionTimestamp != nil:
			err := c.admin.CoreV1().Pods(p.Namespace).Delete(ctx, p.Name, metav1.DeleteOptions{GracePeriodSeconds: ptr.To[int64](0),
				Preconditions: metav1.NewUIDPreconditions(string(p.UID))})
			if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) && ctx.Err() == nil {
				c.t.Errorf("delete pod %s: %v", p.Name, err)
			}
		case p.Status.Phase == corev1.PodPending:
			c.report(ctx, p, phase(p))
		}
	}
	informer := f.Core().V1().Pods().Informer()
	_, err := informer.AddEventHandler(resourceHandler(act))
	require.NoError(c.t, err)
	f.StartWithContext(ctx)
	c.t.Cleanup(func() { cancel(); f.Shutdown() })
}

func (c *cluster) report(ctx context.Context, p *corev1.Pod, phase corev1.PodPhase) {
	status := map[string]any{"phase": phase, "podIP": "10.42.9.9", "podIPs": []corev1.PodIP{{IP: "10.42.9.9"}}, "startTime": metav1.Now()}
	ready := corev1.ConditionTrue
	if phase != corev1.PodRunning {
		ready = corev1.ConditionFalse
	}
	status["conditions"] = []corev1.PodCondition{{Type: corev1.PodReady, Status: ready, LastTransitionTime: metav1.Now()}}
	patch, _ := json.Marshal(map[string]any{"metadata": map[string]any{"uid": p.UID}, "status": status})
	_, err := c.admin.CoreV1().Pods(p.Namespace).Patch(ctx, p.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) && ctx.Err() == nil {
		c.t.Errorf("report pod %s: %v", p.Name, err)
	}
}

// eventually waits until f gives no error any more, looking again whenever anything in the cluster has changed.
func (c *cluster) eventually(what string, f func(context.Context) error) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	for {
		at := c.store.Revision()
		err := f(ctx)
		if err == nil {
			return
		}
		for c.store.Revision() == at {
			select {
			case <-ctx.Done():
				c.describe()
				require.FailNow(c.t, what, "%v", err)
			case <-time.After(2 * time.Millisecond):
			}
		}
	}
}

// describe prints what helps to understand a failure.
func (c *cluster) describe() {
	ctx := context.Background()
	pods, _ := c.admin.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
	for _, p := range pods.Items {
		c.t.Logf("pod %s/%s node=%q phase=%s deleted=%v conditions=%v", p.Namespace, p.Name, p.Spec.NodeName, p.Status.Phase, p.DeletionTimestamp, p.Status.Conditions)
	}
	events, _ := c.admin.CoreV1().Events("").List(ctx, metav1.ListOptions{FieldSelector: fields.Everything().String()})
	for _, e := range events.Items {
		c.t.Logf("event %s %s/%s: %s %s", e.InvolvedObject.Kind, e.Namespace, e.InvolvedObject.Name, e.Reason, e.Message)
	}
}

type resourceHandler func(obj any)

func (h resourceHandler) OnAdd(obj any, _ bool) { h(obj) }
func (h resourceHandler) OnUpdate(_, obj any)   { h(obj) }
func (resourceHandler) OnDelete(any)            {}

func notYet(format string, args ...any) error { return fmt.Errorf(format, args...) }
