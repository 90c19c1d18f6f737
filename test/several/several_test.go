package several

import (
	"context"
	"fmt"
	"maps"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// token is the join token of a server's cluster.
func token(t *testing.T, s *server) string {
	t.Helper()
	out, err := exec.Command(knarr(t), "token", "--data-dir", filepath.Dir(s.dir), "--name", filepath.Base(s.dir)).Output()
	require.NoError(t, err)
	return strings.TrimSpace(string(out))
}

// startTwo starts two servers on one etcd: the second joins by the token of the first.
func startTwo(t *testing.T) (e *etcd, servers []*server) {
	t.Helper()
	e = startEtcd(t)
	first, second := newServer(t, e, 0), newServer(t, e, 1)
	first.start(t)
	require.Contains(t, second.fails(t), "give its token")
	require.Contains(t, second.fails(t, "KNARR_TOKEN="+token(t, first)[:len(token(t, first))-1]+"x"), "the token does not open")
	second.start(t, "KNARR_TOKEN="+token(t, first))
	return e, []*server{first, second}
}

// TestSeveralServers runs two servers on one etcd: what one acknowledged the other shows, one of them runs the controllers, and when that
// one is killed the other takes over.
func TestSeveralServers(t *testing.T) {
	_, servers := startTwo(t)
	t.Run("reads see what the other acknowledged", func(t *testing.T) { readsSeeWrites(t, servers) })
	t.Run("a watch sees the other's writes", func(t *testing.T) { watchSeesWrites(t, servers) })
	t.Run("tokens and secrets of one hold at the other", func(t *testing.T) { sameKeys(t, servers) })
	t.Run("a killed leader is replaced", func(t *testing.T) { leaderDies(t, servers) })
}

func readsSeeWrites(t *testing.T, servers []*server) {
	ctx := t.Context()
	for i := range 100 {
		a, b := servers[i%2].CoreV1().ConfigMaps("default"), servers[(i+1)%2].CoreV1().ConfigMaps("default")
		name := fmt.Sprintf("fresh-%d", i)
		made, err := a.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		require.NoError(t, err)
		got, err := b.Get(ctx, name, metav1.GetOptions{})
		require.NoError(t, err)
		require.Equal(t, made.ResourceVersion, got.ResourceVersion)

		patched, err := a.Patch(ctx, name, types.MergePatchType, []byte(fmt.Sprintf(`{"data":{"n":"%d"}}`, i)), metav1.PatchOptions{})
		require.NoError(t, err)
		list, err := b.List(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + name})
		require.NoError(t, err)
		require.Equal(t, patched.ResourceVersion, list.Items[0].ResourceVersion)
		got, err = b.Get(ctx, name, metav1.GetOptions{ResourceVersion: patched.ResourceVersion})
		require.NoError(t, err)
		require.Equal(t, strconv.Itoa(i), got.Data["n"])

		_, err = a.Patch(ctx, name, types.MergePatchType, []byte(`{"data":{"n":"other"}}`), metav1.PatchOptions{})
		require.NoError(t, err)
		back, err := b.Patch(ctx, name, types.MergePatchType, []byte(fmt.Sprintf(`{"data":{"n":"%d"}}`, i)), metav1.PatchOptions{})
		require.NoError(t, err)
		require.Equal(t, strconv.Itoa(i), back.Data["n"])
		got, err = a.Get(ctx, name, metav1.GetOptions{})
		require.NoError(t, err)
		require.Equal(t, strconv.Itoa(i), got.Data["n"], "the patch was taken for one that changes nothing")

		require.NoError(t, b.Delete(ctx, name, metav1.DeleteOptions{}))
		_, err = a.Get(ctx, name, metav1.GetOptions{})
		require.True(t, apierrors.IsNotFound(err), err)
		_, err = b.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		require.NoError(t, err)
		require.NoError(t, a.Delete(ctx, name, metav1.DeleteOptions{}), "it was deleted before the other server's creation was seen")
	}
}

func watchSeesWrites(t *testing.T, servers []*server) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	const writes = 100
	w, err := servers[1].CoreV1().ConfigMaps("default").Watch(ctx, metav1.ListOptions{LabelSelector: "watched=yes"})
	require.NoError(t, err)
	defer w.Stop()
	var want []string
	for i := range writes {
		s := servers[i%2] // the watching server's own writes are in the same order
		made, err := s.CoreV1().ConfigMaps("default").Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{
			Name: fmt.Sprintf("watched-%d", i), Labels: map[string]string{"watched": "yes"}}}, metav1.CreateOptions{})
		require.NoError(t, err)
		want = append(want, made.Name+" "+made.ResourceVersion)
	}
	var got []string
	for len(got) < writes {
		e, ok := <-w.ResultChan()
		require.True(t, ok)
		require.Equal(t, watch.Added, e.Type)
		m := e.Object.(*corev1.ConfigMap)
		got = append(got, m.Name+" "+m.ResourceVersion)
	}
	require.Equal(t, want, got)
}

func sameKeys(t *testing.T, servers []*server) {
	ctx := t.Context()
	_, err := servers[0].CoreV1().Secrets("default").Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "s"}, StringData: map[string]string{"k": "v"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	got, err := servers[1].CoreV1().Secrets("default").Get(ctx, "s", metav1.GetOptions{})
	require.NoError(t, err)
	require.Equal(t, "v", string(got.Data["k"]))
	for i := range servers {
		account, err := servers[i].CoreV1().ServiceAccounts("default").CreateToken(ctx, "default", &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
		require.NoError(t, err)
		other := rest.AnonymousClientConfig(servers[1-i].config)
		other.BearerToken = account.Status.Token
		who, err := kubernetes.NewForConfigOrDie(other).AuthenticationV1().SelfSubjectReviews().Create(ctx, &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
		require.NoError(t, err)
		require.Equal(t, "system:serviceaccount:default:default", who.Status.UserInfo.Username)

		admin := *servers[i].config // the client certificate of one, and its authority, at the other
		admin.Host = servers[1-i].config.Host
		_, err = kubernetes.NewForConfigOrDie(&admin).CoreV1().Namespaces().Get(ctx, "kube-system", metav1.GetOptions{})
		require.NoError(t, err)
	}
}

// holder is who holds a lease.
func holder(s *server, lease string) string {
	l, err := s.CoordinationV1().Leases("kube-system").Get(context.Background(), lease, metav1.GetOptions{})
	if err != nil || l.Spec.HolderIdentity == nil {
		return ""
	}
	return *l.Spec.HolderIdentity
}

// endpoints are the addresses of the kubernetes service.
func endpoints(t *testing.T, s *server) []string {
	t.Helper()
	slice, err := s.DiscoveryV1().EndpointSlices("default").Get(t.Context(), "kubernetes", metav1.GetOptions{})
	if err != nil {
		return nil
	}
	found := map[string]bool{}
	for _, e := range slice.Endpoints {
		for _, a := range e.Addresses {
			found[a] = true
		}
	}
	return slices.Sorted(maps.Keys(found))
}

// takeOver is the longest time without a leader: the lease's 15 s from when it was last seen renewed, looked at every 2 to 4.4 s, and
// some for the machine.
const takeOver = 30 * time.Second

func leaderDies(t *testing.T, servers []*server) {
	eventually(t, "both servers are endpoints", func() (bool, string) {
		got := endpoints(t, servers[0])
		return slices.Equal(got, addresses), fmt.Sprint(got)
	})
	node := playNode(t, servers[1])
	rollOut(t, servers[1], "before", node)
	manager, scheduler := holder(servers[1], "kube-controller-manager"), holder(servers[1], "kube-scheduler")
	require.NotEmpty(t, manager)
	require.NotEmpty(t, scheduler)

	killed := time.Now()
	servers[0].stop(syscall.SIGKILL) // it came first and leads
	eventually(t, "another leads the controllers and the scheduler", func() (bool, string) {
		m, s := holder(servers[1], "kube-controller-manager"), holder(servers[1], "kube-scheduler")
		return m != manager && m != "" && s != scheduler && s != "", m + " " + s
	})
	require.Less(t, time.Since(killed), takeOver)
	rollOut(t, servers[1], "after", node)
	eventually(t, "the dead server is no endpoint any more", func() (bool, string) {
		got := endpoints(t, servers[1])
		return slices.Equal(got, addresses[1:]), fmt.Sprint(got)
	})

	servers[0].start(t) // without a token: it has joined
	eventually(t, "both servers are endpoints again", func() (bool, string) {
		got := endpoints(t, servers[0])
		return slices.Equal(got, addresses), fmt.Sprint(got)
	})
	manager = holder(servers[0], "kube-controller-manager")
	begin := time.Now()
	servers[1].stop(syscall.SIGTERM)
	eventually(t, "a stopped leader gives its lease back", func() (bool, string) {
		m := holder(servers[0], "kube-controller-manager")
		return m != manager && m != "", m
	})
	require.Less(t, time.Since(begin), 12*time.Second, "nobody has to wait for the lease to run out")
	require.Equal(t, addresses[:1], endpoints(t, servers[0]), "a stopped server takes its address with it")
}

// node plays a node, whose agent the servers do not run here: it renews its lease and says of each pod bound to it that it runs.
type node struct{ name string }

func playNode(t *testing.T, s *server) node {
	t.Helper()
	ctx := t.Context()
	n := node{"played"}
	_, err := s.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: n.name}}, metav1.CreateOptions{})
	require.NoError(t, err)
	room := `{"pods":"100","cpu":"8","memory":"8Gi"}`
	_, err = s.CoreV1().Nodes().Patch(ctx, n.name, types.MergePatchType, []byte(`{"status":{"capacity":`+room+`,"allocatable":`+room+`}}`), metav1.PatchOptions{}, "status")
	require.NoError(t, err)
	require.NoError(t, n.heartbeat(ctx, s))
	return n
}

// heartbeat says that the node is well.
func (n node) heartbeat(ctx context.Context, s *server) error {
	now := metav1.Now().Format(time.RFC3339)
	_, err := s.CoreV1().Nodes().Patch(ctx, n.name, types.StrategicMergePatchType,
		[]byte(`{"status":{"conditions":[{"type":"Ready","status":"True","lastHeartbeatTime":"`+now+`"}]}}`), metav1.PatchOptions{}, "status")
	return err
}

// runPods says of all pods bound to the node that they are ready.
func (n node) runPods(ctx context.Context, s *server) error {
	pods, err := s.CoreV1().Pods("default").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + n.name + ",status.phase=Pending"})
	if err != nil {
		return err
	}
	for i := range pods.Items {
		pod := &pods.Items[i]
		pod.Status = corev1.PodStatus{Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: metav1.Now()}}}
		if _, err := s.CoreV1().Pods("default").UpdateStatus(ctx, pod, metav1.UpdateOptions{}); err != nil {
			return err
		}
	}
	return nil
}

// rollOut makes a Deployment and waits until its pods are made, bound and counted.
func rollOut(t *testing.T, s *server, name string, n node) {
	t.Helper()
	ctx := t.Context()
	labels, replicas := map[string]string{"app": name}, int32(3)
	_, err := s.AppsV1().Deployments("default").Create(ctx, &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: appsv1.DeploymentSpec{Replicas: &replicas, Selector: &metav1.LabelSelector{MatchLabels: labels}, Template: corev1.PodTemplateSpec{
			ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "i"}}}}},
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	eventually(t, "deployment "+name+" rolled out", func() (bool, string) {
		if err := n.heartbeat(ctx, s); err != nil {
			return false, err.Error()
		}
		if err := n.runPods(ctx, s); err != nil {
			return false, err.Error()
		}
		d, err := s.AppsV1().Deployments("default").Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return false, err.Error()
		}
		return d.Status.ReadyReplicas == replicas, fmt.Sprintf("%+v", d.Status)
	})
}
