package loadbalancer

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/tools/record"
)

func node(name, ip string, ready bool) *v1.Node {
	status := v1.ConditionFalse
	if ready {
		status = v1.ConditionTrue
	}
	return &v1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: v1.NodeStatus{
		Addresses:  []v1.NodeAddress{{Type: v1.NodeInternalIP, Address: ip}, {Type: v1.NodeHostName, Address: name}},
		Conditions: []v1.NodeCondition{{Type: v1.NodeReady, Status: status}},
	}}
}

func balanced(name string, age int, port int32, change ...func(*v1.Service)) *v1.Service {
	s := &v1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID(name), CreationTimestamp: metav1.Unix(int64(1000-age), 0)},
		Spec:       v1.ServiceSpec{Type: v1.ServiceTypeLoadBalancer, Ports: []v1.ServicePort{{Protocol: v1.ProtocolTCP, Port: port}}},
	}
	for _, c := range change {
		c(s)
	}
	return s
}

// TestController runs through the life of services on two nodes.
func TestController(t *testing.T) {
	other, yes, where := "example.com/other", true, "b"
	client := fake.NewClientset(node("a", "192.0.2.1", true), node("b", "192.0.2.2", true), node("sick", "192.0.2.3", false),
		balanced("web", 3, 80), balanced("late", 1, 80), balanced("api", 5, 6443), balanced("near", 2, 81, func(s *v1.Service) {
			s.Spec.ExternalTrafficPolicy = v1.ServiceExternalTrafficPolicyLocal
		}),
		balanced("foreign", 9, 80, func(s *v1.Service) { s.Spec.LoadBalancerClass = &other }),
		balanced("left", 4, 82, func(s *v1.Service) {
			s.Spec.Type = v1.ServiceTypeClusterIP
			s.Status.LoadBalancer.Ingress = []v1.LoadBalancerIngress{{IP: "192.0.2.1"}}
		}),
		&discovery.EndpointSlice{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "near-1", Labels: map[string]string{discovery.LabelServiceName: "near"}},
			Endpoints:  []discovery.Endpoint{{Addresses: []string{"10.42.1.5"}, NodeName: &where, Conditions: discovery.EndpointConditions{Ready: &yes}}},
		})
	events := record.NewFakeRecorder(100)
	f := informers.NewSharedInformerFactory(client, 0)
	c, err := New(client, f, Options{ReservedPorts: []int32{6443}, Recorder: events})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	f.Start(ctx.Done())
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx) }()
	defer func() { cancel(); require.NoError(t, <-ended); f.Shutdown() }()

	have := func(name string, want ...string) {
		t.Helper()
		require.EventuallyWithT(t, func(t *assert.CollectT) {
			svc, err := client.CoreV1().Services("default").Get(ctx, name, metav1.GetOptions{})
			require.NoError(t, err)
			got := []string{}
			for _, in := range svc.Status.LoadBalancer.Ingress {
				got = append(got, in.IP)
			}
			require.ElementsMatch(t, want, got, name)
		}, 5*time.Second, 5*time.Millisecond)
	}
	have("web", "192.0.2.1", "192.0.2.2")
	have("near", "192.0.2.2")
	have("left")
	have("late")
	have("api")
	have("foreign")
	said := []string{<-events.Events, <-events.Events}
	require.ElementsMatch(t, []string{
		"Warning PortUnavailable port 6443/TCP of the nodes belongs to the cluster itself: choose another port",
		"Warning PortUnavailable port 80/TCP of the nodes belongs to default/web: choose another port",
	}, said)

	require.NoError(t, client.CoreV1().Services("default").Delete(ctx, "web", metav1.DeleteOptions{}))
	have("late", "192.0.2.1", "192.0.2.2")
	_, err = client.CoreV1().Nodes().UpdateStatus(ctx, node("a", "192.0.2.1", false), metav1.UpdateOptions{})
	require.NoError(t, err)
	have("late", "192.0.2.2")
}

// TestConflictIsSaid looks at the reason that a refused service is given.
func TestConflictIsSaid(t *testing.T) {
	nodes := []*v1.Node{node("a", "192.0.2.1", true)}
	got := plan([]*v1.Service{balanced("b", 1, 80), balanced("a", 2, 80)}, nodes, nil, nil)
	require.Len(t, got, 2)
	for name, p := range got {
		switch name.Name {
		case "a":
			require.Len(t, p.addresses, 1)
		case "b":
			require.Contains(t, p.refused, "default/a")
		}
	}
}
