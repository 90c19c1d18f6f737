package agent_test

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	authenticationv1 "k8s.io/api/authentication/v1"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/client-go/tools/record"

	"knarr/node/agent"
	"knarr/node/image"
	noderuntime "knarr/node/runtime"
)

const (
	nodeName  = "node-a"
	namespace = "default"
	busybox   = "test.local/busybox:1"
	wait      = 20 * time.Second
)

// shimBinary is built once per test run.
var shimBinary string

func TestMain(m *testing.M) { os.Exit(runTests(m)) }

func runTests(m *testing.M) int {
	if os.Geteuid() != 0 {
		fmt.Println("containers need root: the tests that run pods are skipped")
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "knarr-agent-test-")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	shimBinary = filepath.Join(dir, "knarr-shim")
	build := exec.Command("go", "build", "-tags", "seccomp netgo osusergo", "-ldflags", "-s -w -extldflags -static", "-o", shimBinary, "knarr/cmd/knarr-shim")
	build.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Printf("build knarr-shim: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// addresses is a Network that gives sandboxes addresses and nothing else.
type addresses struct{ last atomic.Uint32 }

func (n *addresses) SetUp(context.Context, noderuntime.NetworkRequest) (noderuntime.NetworkStatus, error) {
	i := n.last.Add(1)
	return noderuntime.NetworkStatus{IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 99, byte(i >> 8), byte(i)})}}, nil
}

func (n *addresses) TearDown(context.Context, noderuntime.NetworkRequest) error { return nil }

// node is an agent with a real runtime, real images and a fake API.
type node struct {
	t      testing.TB
	dir    string
	client *fake.Clientset
	images *image.Store
	rt     *noderuntime.Runtime
	agent  *agent.Agent
	events *eventLog
	cgroup string
	tune   func(*agent.Options)
	before goleak.Option // goroutines that were there before

	stop func()
}

func random() string {
	b := make([]byte, 4)
	_, _ = rand.Read(b)
	return hex.EncodeToString(b)
}

func newNode(t testing.TB, tune func(*agent.Options)) *node {
	if os.Geteuid() != 0 {
		t.Skip("containers need root")
	}
	n := &node{t: t, before: goleak.IgnoreCurrent(), dir: t.TempDir(), cgroup: "/knarr-agent-test-" + random(), tune: tune, events: &eventLog{}}
	n.client = fake.NewSimpleClientset(
		&v1.Service{ObjectMeta: metav1.ObjectMeta{Name: "kubernetes", Namespace: "default"},
			Spec: v1.ServiceSpec{ClusterIP: "10.43.0.1", Ports: []v1.ServicePort{{Name: "https", Port: 443, Protocol: v1.ProtocolTCP}}}},
		&v1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "kube-root-ca.crt", Namespace: namespace}, Data: map[string]string{"ca.crt": "CERT"}},
		&v1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default", Namespace: namespace}},
	)
	n.client.PrependReactor("create", "serviceaccounts", func(a clienttesting.Action) (bool, runtime.Object, error) {
		if a.GetSubresource() != "token" {
			return false, nil, nil
		}
		tr := a.(clienttesting.CreateAction).GetObject().(*authenticationv1.TokenRequest).DeepCopy()
		tr.Status = authenticationv1.TokenRequestStatus{Token: "TOKEN", ExpirationTimestamp: metav1.NewTime(time.Now().Add(time.Hour))}
		return true, tr, nil
	})
	ctx := context.Background()
	var err error
	n.images, err = image.Open(ctx, image.Options{Root: filepath.Join(n.dir, "images")})
	require.NoError(t, err)
	n.importBusybox(ctx)
	n.openRuntime()
	t.Cleanup(n.destroy)
	n.start()
	return n
}

func (n *node) openRuntime() {
	rt, err := noderuntime.Open(context.Background(), noderuntime.Options{
		StateDir: filepath.Join(n.dir, "state"), CgroupParent: n.cgroup, Images: n.images, Network: &addresses{}, ShimPath: shimBinary})
	require.NoError(n.t, err)
	n.rt = rt
}

// importBusybox packs the host's static busybox with links for its commands.
func (n *node) importBusybox(ctx context.Context) {
	root := filepath.Join(n.dir, "rootfs")
	for _, d := range []string{"bin", "etc", "tmp", "root", "dev", "proc", "sys"} {
		require.NoError(n.t, os.MkdirAll(filepath.Join(root, d), 0o755))
	}
	b, err := os.ReadFile("/bin/busybox")
	require.NoError(n.t, err, "apt-get install busybox-static")
	require.NoError(n.t, os.WriteFile(filepath.Join(root, "bin/busybox"), b, 0o755))
	for _, c := range []string{"sh", "sleep", "cat", "echo", "env", "ls", "id", "true", "false", "head", "hostname", "touch", "test", "mount", "stat", "wget", "nc", "httpd", "kill", "grep", "tar", "trap", "date"} {
		require.NoError(n.t, os.Symlink("busybox", filepath.Join(root, "bin", c)))
	}
	require.NoError(n.t, os.WriteFile(filepath.Join(root, "etc/passwd"), []byte("root:x:0:0:root:/root:/bin/sh\n"), 0o644))
	a, err := image.Build(ctx, image.BuildOptions{Ref: busybox, Path: root, Cmd: []string{"/bin/sh"}, Env: []string{"PATH=/bin"}})
	require.NoError(n.t, err)
	defer a.Close()
	_, err = n.images.Import(ctx, a)
	require.NoError(n.t, err)
	require.NoError(n.t, os.RemoveAll(root))
}

// start runs a (further) agent on the node's state.
func (n *node) start() {
	recorder := record.NewFakeRecorder(64)
	factory := informers.NewSharedInformerFactory(n.client, 0)
	opts := agent.Options{
		NodeName: nodeName, RootDir: filepath.Join(n.dir, "agent"), NodeIPs: []net.IP{net.IPv4(127, 0, 0, 1)},
		Client: n.client, Informers: factory, Runtime: n.rt, Images: n.images.CRI(), Streaming: n.rt.Streams(),
		ClusterDNS: []net.IP{net.IPv4(10, 43, 0, 10)}, CgroupRoot: n.cgroup, Recorder: recorder,
	}
	if n.tune != nil {
		n.tune(&opts)
	}
	a, err := agent.New(opts)
	require.NoError(n.t, err)
	n.agent = a
	ctx, cancel := context.WithCancel(context.Background())
	factory.Start(ctx.Done())
	go n.events.follow(recorder, ctx.Done())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	n.stop = func() {
		cancel()
		require.NoError(n.t, <-done)
		factory.Shutdown()
		n.stop = func() {}
	}
}

// destroy removes everything of the node from the machine.
func (n *node) destroy() {
	ctx := context.Background()
	pods, err := n.client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
	require.NoError(n.t, err)
	for _, p := range pods.Items {
		if !n.t.Failed() && p.DeletionTimestamp == nil {
			n.remove(p.Name, 1)
		}
	}
	for _, p := range pods.Items {
		if !n.t.Failed() {
			n.until(p.Name, "gone", gone)
		}
	}
	n.stop()
	list, err := n.rt.ListPodSandbox(ctx, nil)
	require.NoError(n.t, err)
	for _, s := range list {
		require.NoError(n.t, n.rt.StopPodSandbox(ctx, s.Id))
		require.NoError(n.t, n.rt.RemovePodSandbox(ctx, s.Id))
	}
	require.NoError(n.t, n.rt.ShutdownShim(ctx, true))
	require.NoError(n.t, n.rt.Close(ctx))
	require.NoError(n.t, n.images.Close())
	out, _ := os.ReadFile("/proc/self/mountinfo")
	lines := strings.Split(string(out), "\n")
	for i := len(lines) - 1; i >= 0; i-- {
		if f := strings.Fields(lines[i]); len(f) > 4 && strings.HasPrefix(f[4], n.dir+"/") {
			n.t.Errorf("left mounted: %s", f[4])
			unmount(f[4])
		}
	}
	removeCgroups(n.cgroup)
	goleak.VerifyNone(n.t, n.before)
}

// pod makes a pod of one container that runs a shell script.
func pod(name, script string, change ...func(*v1.Pod)) *v1.Pod {
	yes := true
	p := &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: namespace, UID: types.UID(random() + "-" + name), Generation: 1,
			CreationTimestamp: metav1.Now()},
		Spec: v1.PodSpec{
			NodeName: nodeName, RestartPolicy: v1.RestartPolicyAlways, EnableServiceLinks: &yes, DNSPolicy: v1.DNSClusterFirst,
			ServiceAccountName: "default", SecurityContext: &v1.PodSecurityContext{}, TerminationGracePeriodSeconds: seconds(2),
			Containers: []v1.Container{container("main", script)},
		},
		Status: v1.PodStatus{Phase: v1.PodPending},
	}
	for _, f := range change {
		f(p)
	}
	return p
}

func container(name, script string) v1.Container {
	return v1.Container{Name: name, Image: busybox, ImagePullPolicy: v1.PullIfNotPresent, Command: []string{"/bin/sh", "-c", script},
		TerminationMessagePath: "/dev/termination-log", TerminationMessagePolicy: v1.TerminationMessageReadFile}
}

func seconds(n int64) *int64 { return &n }

func (n *node) create(p *v1.Pod) *v1.Pod {
	n.t.Helper()
	created, err := n.client.CoreV1().Pods(namespace).Create(context.Background(), p, metav1.CreateOptions{})
	require.NoError(n.t, err)
	return created
}

// remove asks for the pod's deletion, as the API server would note it.
func (n *node) remove(name string, grace int64) {
	n.t.Helper()
	p := n.get(name)
	now := metav1.NewTime(time.Now().Add(time.Duration(grace) * time.Second))
	p.DeletionTimestamp, p.DeletionGracePeriodSeconds = &now, &grace
	_, err := n.client.CoreV1().Pods(namespace).Update(context.Background(), p, metav1.UpdateOptions{})
	require.NoError(n.t, err)
}

func (n *node) get(name string) *v1.Pod {
	n.t.Helper()
	p, err := n.client.CoreV1().Pods(namespace).Get(context.Background(), name, metav1.GetOptions{})
	require.NoError(n.t, err)
	return p
}

// until waits for a version of the pod that ok accepts. A nil pod means that
// it is gone.
func (n *node) until(name, what string, ok func(*v1.Pod) bool) *v1.Pod {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	w, err := n.client.CoreV1().Pods(namespace).Watch(ctx, metav1.ListOptions{})
	require.NoError(n.t, err)
	defer w.Stop()
	last, err := n.client.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		last = nil
	}
	for !ok(last) {
		select {
		case e := <-w.ResultChan():
			if p, is := e.Object.(*v1.Pod); is && p.Name == name {
				last = p
				if e.Type == watch.Deleted {
					last = nil
				}
			}
		case <-ctx.Done():
			n.t.Fatalf("pod %s is not %s after %v; events: %s\nlast: %s", name, what, wait, n.recorded(), show(last))
		}
	}
	return last
}

func show(p *v1.Pod) string {
	if p == nil {
		return "gone"
	}
	return fmt.Sprintf("%s %+v", p.Status.Phase, p.Status)
}

// recorded returns the events so far.
func (n *node) recorded() string { return n.events.String() }

// eventLog keeps the events of all agents of a node.
type eventLog struct {
	mu   sync.Mutex
	list []string
}

// follow takes in what a recorder gets until stop is closed.
func (l *eventLog) follow(r *record.FakeRecorder, stop <-chan struct{}) {
	for {
		select {
		case e := <-r.Events:
			l.mu.Lock()
			l.list = append(l.list, e)
			l.mu.Unlock()
		case <-stop:
			return
		}
	}
}

func (l *eventLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.list, "\n")
}

func running(p *v1.Pod) bool {
	return p != nil && p.Status.Phase == v1.PodRunning && ready(p)
}

func ready(p *v1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == v1.PodReady {
			return c.Status == v1.ConditionTrue
		}
	}
	return false
}

func gone(p *v1.Pod) bool { return p == nil }
