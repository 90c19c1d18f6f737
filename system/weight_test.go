package system

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apiextensions "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"knarr/cli"
)

// What a server without a node may have when nothing is to do. Who makes it heavier has to say so here.
const (
	// idleGoroutines includes the test's own.
	idleGoroutines = 430
	// idleHeap is the live heap in bytes, with all that the packages of a test hold.
	idleHeap = 22 << 20
)

// loops are upstream's that look for work many times a second or each second. An idle server has none of them.
var loops = []string{
	"nodelifecycle.(*Controller).Run",
	"generic.(*policySource[...]).Run",
	"metrics.NewMetricsAsyncRecorder",
	"queue.(*PriorityQueue).Run",
	"cache.(*cacheImpl).run",
	"workqueue.(*Typed[...]).updateUnfinishedWorkLoop",
}

// weightTimeout bounds waits of these tests; it is only reached when one fails.
const weightTimeout = time.Minute

// startServer runs a whole server without a node until the test ends, and gives the admin's configuration.
func startServer(t testing.TB) (kubeconfig string) {
	dir := t.TempDir()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	port := free.Addr().(*net.TCPAddr).Port
	require.NoError(t, free.Close())
	ctx, cancel := context.WithCancel(context.Background())
	ready, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- New().RunServer(ctx, cli.ServerConfig{Name: "weight", Dir: dir, BindAddress: netip.MustParseAddr("127.0.0.1"), Port: port,
			AdvertiseAddress: netip.MustParseAddr("192.0.2.1"), PodCIDR: netip.MustParsePrefix("10.128.0.0/12"), ServiceCIDR: netip.MustParsePrefix("10.43.0.0/16"),
			NodeCIDR: netip.MustParsePrefix("10.41.0.0/16"), ClusterDNS: netip.MustParseAddr("10.43.0.10"), Domain: "cluster.local", NoAgent: true, Ready: func() { close(ready) }})
	}()
	t.Cleanup(func() {
		cancel()
		require.NoError(t, <-ended)
	})
	select {
	case <-ready:
	case err := <-ended:
		ended <- nil
		t.Fatal("the server ended: ", err)
	case <-time.After(weightTimeout):
		t.Fatal("not ready")
	}
	return cli.AdminKubeconfig(dir)
}

// weight is what a process holds.
type weight struct {
	heap, stacks, goroutines int64 // bytes, bytes, count
}

func weigh() weight {
	runtime.GC()
	runtime.GC() // what the first found to be finalized
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return weight{int64(m.HeapAlloc), int64(m.StackInuse), int64(runtime.NumGoroutine())}
}

// TestIdleServer: an idle server comes to rest within its budgets.
func TestIdleServer(t *testing.T) {
	startServer(t)
	var w weight
	var busy []string
	quiet := 0
	rests := func() bool {
		before := w.goroutines
		w, busy = weigh(), busyLoops(t)
		if quiet++; w.goroutines != before { // its parts begin one after the other
			quiet = 0
		}
		return quiet >= looksQuiet && len(busy) == 0 && w.goroutines <= idleGoroutines && w.heap <= idleHeap
	}
	if !assert.Eventually(t, rests, weightTimeout, 100*time.Millisecond) {
		t.Fatalf("it does not come to rest: %d goroutines, live heap %d, loops %v", w.goroutines, w.heap, busy)
	}
	t.Logf("%d goroutines, live heap %.1f MB", w.goroutines, float64(w.heap)/1e6)
}

// looksQuiet is how many looks in a row see the same number of goroutines when a server is at rest.
const looksQuiet = 15

// busyLoops are those of loops that run.
func busyLoops(t *testing.T) (busy []string) {
	var all bytes.Buffer
	require.NoError(t, pprof.Lookup("goroutine").WriteTo(&all, 2))
	for _, l := range loops {
		if bytes.Contains(all.Bytes(), []byte(l)) {
			busy = append(busy, l)
		}
	}
	return busy
}

// weighed are what BenchmarkWeight puts into a server. Each makes the i-th.
func weighed(b *testing.B, config *rest.Config) map[string]func(ctx context.Context, i int) error {
	kube, err := kubernetes.NewForConfig(config)
	require.NoError(b, err)
	definitions, err := apiextensions.NewForConfig(config)
	require.NoError(b, err)
	_, err = kube.CoreV1().ServiceAccounts("default").Create(b.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "weighed"}}, metav1.CreateOptions{})
	require.NoError(b, err)
	room := corev1.ResourceList{"cpu": resource.MustParse("8"), "memory": resource.MustParse("16Gi"), "pods": resource.MustParse("110")}
	return map[string]func(context.Context, int) error{
		"pods": func(ctx context.Context, i int) error {
			_, err := kube.CoreV1().Pods("default").Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("p", i), Labels: map[string]string{"app": "weighed"}},
				Spec: corev1.PodSpec{SchedulerName: "none", ServiceAccountName: "weighed", Containers: []corev1.Container{{Name: "main", Image: "registry.example/app:v1",
					Env: []corev1.EnvVar{{Name: "NAME", Value: "value"}}, Ports: []corev1.ContainerPort{{ContainerPort: 8080}}}}}}, metav1.CreateOptions{})
			return err
		},
		"nodes": func(ctx context.Context, i int) error {
			_, err := kube.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("n", i), Labels: map[string]string{corev1.LabelHostname: fmt.Sprint("n", i)}},
				Status: corev1.NodeStatus{Capacity: room, Allocatable: room}}, metav1.CreateOptions{})
			return err
		},
		"ConfigMaps": func(ctx context.Context, i int) error {
			_, err := kube.CoreV1().ConfigMaps("default").Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("c", i)},
				Data: map[string]string{"key": fmt.Sprintf("%0200d", i)}}, metav1.CreateOptions{})
			return err
		},
		"definitions": func(ctx context.Context, i int) error {
			group := fmt.Sprintf("g%d.example.com", i)
			d := &apiextensionsv1.CustomResourceDefinition{ObjectMeta: metav1.ObjectMeta{Name: "gadgets." + group}, Spec: apiextensionsv1.CustomResourceDefinitionSpec{
				Group: group, Scope: apiextensionsv1.NamespaceScoped, Names: apiextensionsv1.CustomResourceDefinitionNames{Plural: "gadgets", Singular: "gadget", Kind: "Gadget", ListKind: "GadgetList"},
				Versions: []apiextensionsv1.CustomResourceDefinitionVersion{{Name: "v1", Served: true, Storage: true, Schema: &apiextensionsv1.CustomResourceValidation{
					OpenAPIV3Schema: &apiextensionsv1.JSONSchemaProps{Type: "object", Properties: map[string]apiextensionsv1.JSONSchemaProps{
						"spec": {Type: "object", Properties: map[string]apiextensionsv1.JSONSchemaProps{"size": {Type: "integer"}, "name": {Type: "string"}}}}}}}}}}
			_, err := definitions.ApiextensionsV1().CustomResourceDefinitions().Create(ctx, d, metav1.CreateOptions{})
			return err
		},
	}
}

// BenchmarkWeight measures what a thousand objects, a hundred definitions and a thousand watches cost a server, per thousand:
//
//	go test -run xxx -bench Weight -benchtime 1x ./system
func BenchmarkWeight(b *testing.B) {
	for _, k := range []struct {
		name  string
		count int
	}{{"pods", 1000}, {"nodes", 1000}, {"ConfigMaps", 1000}, {"definitions", 100}} {
		b.Run(k.name, func(b *testing.B) {
			config, err := clientcmd.BuildConfigFromFlags("", startServer(b))
			require.NoError(b, err)
			config.QPS = -1
			put := weighed(b, config)[k.name]
			reportWeight(b, k.count, func() {
				for i := range k.count {
					require.NoError(b, put(b.Context(), i))
				}
			})
		})
	}
	b.Run("watches", func(b *testing.B) {
		kubeconfig := startServer(b)
		watches := 1000
		reportWeight(b, watches, func() { watchFromOutside(b, kubeconfig, watches) })
	})
}

// settled is how long a server is left alone before it is weighed: it follows some changes half a minute later.
const settled = 10 * time.Second

func reportWeight(b *testing.B, count int, load func()) {
	for b.Loop() {
		time.Sleep(settled)
		before := weigh()
		load()
		time.Sleep(settled)
		after, per := weigh(), float64(count)/1000
		b.ReportMetric(float64(after.heap-before.heap)/1e6/per, "MB-heap/1000")
		b.ReportMetric(float64(after.stacks-before.stacks)/1e6/per, "MB-stacks/1000")
		b.ReportMetric(float64(after.goroutines-before.goroutines)/per, "goroutines/1000")
	}
	b.ReportMetric(0, "ns/op")
}

// watchersEnv tells a child process to watch; watchesEach is the number of watches on each of its connections.
const (
	watchersEnv = "KNARR_WEIGHT_WATCHERS"
	watchesEach = 10
)

// watchFromOutside has another process watch ConfigMaps until the benchmark ends.
func watchFromOutside(b *testing.B, kubeconfig string, watches int) {
	self, err := os.Executable()
	require.NoError(b, err)
	child := exec.Command(self, "-test.run", "^TestWatchersChild$")
	child.Env = append(os.Environ(), fmt.Sprintf("%s=%d", watchersEnv, watches), "KUBECONFIG="+kubeconfig)
	in, err := child.StdinPipe()
	require.NoError(b, err)
	out, err := child.StdoutPipe()
	require.NoError(b, err)
	child.Stderr = os.Stderr
	require.NoError(b, child.Start())
	b.Cleanup(func() {
		in.Close()
		_, _ = io.Copy(io.Discard, out)
		require.NoError(b, child.Wait())
	})
	said := make([]byte, 1)
	_, err = io.ReadFull(out, said)
	require.NoError(b, err)
}

// TestWatchersChild is the other process of watchFromOutside.
func TestWatchersChild(t *testing.T) {
	var watches int
	if _, err := fmt.Sscan(os.Getenv(watchersEnv), &watches); err != nil {
		t.Skip("it is a part of BenchmarkWeight")
	}
	var g errgroup.Group
	for range watches / watchesEach {
		g.Go(func() error {
			config, err := clientcmd.BuildConfigFromFlags("", filepath.Clean(os.Getenv("KUBECONFIG")))
			if err != nil {
				return err
			}
			config.QPS = -1
			config.Dial = (&net.Dialer{}).DialContext // of its own, and so with a connection of its own
			kube, err := kubernetes.NewForConfig(config)
			for range watchesEach {
				if err == nil {
					_, err = kube.CoreV1().ConfigMaps("default").Watch(t.Context(), metav1.ListOptions{})
				}
			}
			return err
		})
	}
	require.NoError(t, g.Wait())
	fmt.Fprint(os.Stdout, "!")
	_, _ = io.Copy(io.Discard, os.Stdin)
}
