package test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"

	"knarr/internal/rig"
)

const settle = 60 * time.Second

// clientOf is a client library's view of the cluster.
func clientOf(t *testing.T, c *rig.Cluster) kubernetes.Interface {
	t.Helper()
	path, err := c.Kubeconfig(t.Context())
	require.NoError(t, err)
	config, err := clientcmd.BuildConfigFromFlags("", path)
	require.NoError(t, err)
	config.QPS, config.Burst = 1000, 1000
	config.Timeout = 5 * time.Second
	client, err := kubernetes.NewForConfig(config)
	require.NoError(t, err)
	return client
}

// part returns the process of a part of the cluster.
func part(t *testing.T, c *rig.Cluster, name, node string) rig.Process {
	t.Helper()
	s, err := c.Status(t.Context())
	require.NoError(t, err)
	for _, p := range s.Processes {
		if p.Name == name && (node == "" || p.Node == node) {
			return p
		}
	}
	t.Fatalf("no %s %s among %v", name, node, s.Processes)
	return rig.Process{}
}

// containers lists the process ids in the pods of a namespace, by the cgroups of the pods' UIDs.
func containers(t *testing.T, c *rig.Cluster, ns string) []int {
	t.Helper()
	var pids []int
	for _, uid := range strings.Fields(must(t, c, "get", "pods", "-n", ns, "-o", "jsonpath={.items[*].metadata.uid}")) {
		pids = append(pids, podProcesses(t, c, uid)...)
	}
	slices.Sort(pids)
	return pids
}

func podProcesses(t *testing.T, c *rig.Cluster, uid string) []int {
	t.Helper()
	var pids []int
	for _, top := range []string{"/sys/fs/cgroup/pids/knarr-" + c.Name, "/sys/fs/cgroup/knarr-" + c.Name} {
		err := filepath.WalkDir(top, func(path string, d os.DirEntry, err error) error {
			if err != nil || d.Name() != "cgroup.procs" || !strings.Contains(path, uid) && !strings.Contains(path, strings.ReplaceAll(uid, "-", "_")) {
				return nil // what ends meanwhile is no error
			}
			b, err := os.ReadFile(path)
			for _, f := range strings.Fields(string(b)) {
				if pid, err := strconv.Atoi(f); err == nil && !slices.Contains(pids, pid) {
					pids = append(pids, pid)
				}
			}
			return ignore(err)
		})
		require.NoError(t, ignore(err))
	}
	return pids
}

func ignore(err error) error {
	if os.IsNotExist(err) {
		return nil
	}
	return err
}

// writer creates ConfigMaps one after another and remembers which were acknowledged.
type writer struct {
	mu     sync.Mutex
	acked  []string
	failed int
}

func (w *writer) run(ctx context.Context, client kubernetes.Interface, ns string) {
	for i := 0; ctx.Err() == nil; i++ {
		name := fmt.Sprintf("w-%05d", i)
		_, err := client.CoreV1().ConfigMaps(ns).Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		w.mu.Lock()
		if err == nil {
			w.acked = append(w.acked, name)
		} else {
			w.failed++
		}
		w.mu.Unlock()
		if err != nil {
			time.Sleep(10 * time.Millisecond)
		}
	}
}

func (w *writer) counts() (acked, failed int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.acked), w.failed
}

// runWeb starts pods on both nodes and returns the namespace and the processes of their containers.
func runWeb(t *testing.T, c *rig.Cluster) (string, []int) {
	t.Helper()
	ns := namespace(t, c)
	must(t, c, "create", "deploy", "web", "-n", ns, "--image=whoami:1", "--replicas=4")
	must(t, c, "rollout", "status", "deploy/web", "-n", ns, "--timeout=60s")
	pids := containers(t, c, ns)
	require.GreaterOrEqual(t, len(pids), 4)
	return ns, pids
}

// restartCounts of all pods of a namespace.
func restartCounts(t *testing.T, c *rig.Cluster, ns string) string {
	t.Helper()
	return strings.TrimSpace(must(t, c, "get", "pods", "-n", ns, "-o", "jsonpath={.items[*].status.containerStatuses[*].restartCount}"))
}

// requireUntouched: the same processes, and no restart that the API knows of.
func requireUntouched(t *testing.T, c *rig.Cluster, ns string, pids []int) {
	t.Helper()
	require.Equal(t, pids, containers(t, c, ns), "containers must keep running")
	require.Equal(t, "0 0 0 0", restartCounts(t, c, ns))
}

// TestServerKilled: nothing that was acknowledged is missing, containers go on, watches resume.
func TestServerKilled(t *testing.T) {
	c := theCluster(t)
	ns, pids := runWeb(t, c)
	client := clientOf(t, c)
	seen, stopWatch := watchConfigMaps(t, client, ns)
	defer stopWatch()
	ctx, cancel := context.WithCancel(t.Context())
	var w writer
	done := make(chan struct{})
	go func() { defer close(done); w.run(ctx, client, ns) }()
	eventually(t, settle, "writes are acknowledged", func() (bool, string) { n, _ := w.counts(); return n > 50, fmt.Sprint(n) })

	server := part(t, c, "server", "")
	require.NoError(t, syscall.Kill(server.PID, syscall.SIGKILL))
	eventually(t, settle, "the writer notices", func() (bool, string) { _, n := w.counts(); return n > 0, "" })
	s, err := c.Status(t.Context())
	require.NoError(t, err)
	require.False(t, s.Ready)
	require.Equal(t, pids, pidsAlive(pids), "containers must outlive the server")

	begin := time.Now()
	_, err = c.Up(t.Context(), nodes)
	require.NoError(t, err)
	t.Logf("up again after %v", time.Since(begin).Round(time.Millisecond))
	acked, _ := w.counts()
	eventually(t, settle, "the writer goes on", func() (bool, string) { n, _ := w.counts(); return n > acked+50, fmt.Sprint(n) })
	cancel()
	<-done

	list, err := client.CoreV1().ConfigMaps(ns).List(t.Context(), metav1.ListOptions{})
	require.NoError(t, err)
	have := map[string]bool{}
	for _, m := range list.Items {
		have[m.Name] = true
	}
	for _, name := range w.acked {
		require.True(t, have[name], "%s was acknowledged and is missing", name)
	}
	last := w.acked[len(w.acked)-1]
	eventually(t, settle, "the watch sees what was written after the restart", func() (bool, string) { return seen(last), last })
	eventually(t, settle, "all nodes are ready", func() (bool, string) {
		s, err := c.Status(t.Context())
		return err == nil && s.Ready, fmt.Sprint(s.Problems, err)
	})
	requireUntouched(t, c, ns, pids)
	must(t, c, "scale", "deploy/web", "-n", ns, "--replicas=5")
	must(t, c, "rollout", "status", "deploy/web", "-n", ns, "--timeout=60s")
}

// watchConfigMaps is a client library's reflector; seen says whether it has told of a name.
func watchConfigMaps(t *testing.T, client kubernetes.Interface, ns string) (seen func(string) bool, stop func()) {
	t.Helper()
	lw := cache.NewListWatchFromClient(client.CoreV1().RESTClient(), "configmaps", ns, fields.Everything())
	store, controller := cache.NewInformerWithOptions(cache.InformerOptions{ListerWatcher: lw, ObjectType: &corev1.ConfigMap{}, Handler: cache.ResourceEventHandlerFuncs{}})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); controller.RunWithContext(ctx) }()
	return func(name string) bool {
		_, found, err := store.GetByKey(ns + "/" + name)
		return err == nil && found
	}, func() { cancel(); <-done }
}

// pidsAlive returns those of pids that live.
func pidsAlive(pids []int) []int {
	var out []int
	for _, p := range pids {
		if syscall.Kill(p, 0) == nil {
			out = append(out, p)
		}
	}
	return out
}

// TestAgentKilled: a node's containers outlive its agent, and the next agent takes them over.
func TestAgentKilled(t *testing.T) {
	c := theCluster(t)
	ns, pids := runWeb(t, c)
	node := c.Name + "-1"
	agent := part(t, c, "agent", node)
	shim := part(t, c, "shim", node)
	require.NoError(t, syscall.Kill(agent.PID, syscall.SIGKILL))
	eventually(t, settle, "the status tells", func() (bool, string) {
		s, err := c.Status(t.Context())
		return err == nil && !s.Ready && strings.Contains(fmt.Sprint(s.Problems), "agent of node "+node), fmt.Sprint(s.Problems, err)
	})
	require.Equal(t, pids, pidsAlive(pids))
	_, err := c.Up(t.Context(), nodes)
	require.NoError(t, err)
	require.Equal(t, shim.PID, part(t, c, "shim", node).PID, "the shim stays")
	requireUntouched(t, c, ns, pids)
	must(t, c, "delete", "pod", "-n", ns, "--all", "--timeout=60s")
	must(t, c, "rollout", "status", "deploy/web", "-n", ns, "--timeout=60s")
	require.Empty(t, pidsAlive(pids), "the new agent ends the old one's containers")
	_, err = c.Up(t.Context(), nodes)
	require.ErrorContains(t, err, "is up already")
}

// TestContainerKilled: restarted at once, then with back-off; restartCount and lastState tell.
func TestContainerKilled(t *testing.T) {
	c := theCluster(t)
	ns := namespace(t, c)
	must(t, c, "run", "victim", "-n", ns, "--image=busybox:1", "--", "sh", "-c", "echo hello; exec sleep 3600")
	must(t, c, "wait", "pod/victim", "-n", ns, "--for=condition=Ready", "--timeout=60s")
	uid := must(t, c, "get", "pod", "victim", "-n", ns, "-o", "jsonpath={.metadata.uid}")
	status := func(path string) string {
		return must(t, c, "get", "pod", "victim", "-n", ns, "-o", "jsonpath={.status.containerStatuses[0]."+path+"}")
	}
	kill := func() {
		pids := podProcesses(t, c, uid)
		require.NotEmpty(t, pids)
		for _, p := range pids {
			require.NoError(t, syscall.Kill(p, syscall.SIGKILL))
		}
	}
	kill()
	eventually(t, settle, "restarted once", func() (bool, string) {
		s := status("restartCount") + " " + status("ready")
		return s == "1 true", s
	})
	require.Equal(t, "137 Error", status("lastState.terminated.exitCode")+" "+status("lastState.terminated.reason"))
	kill()
	eventually(t, settle, "back-off", func() (bool, string) { s := status("state.waiting.reason"); return s == "CrashLoopBackOff", s })
	eventually(t, settle, "restarted twice", func() (bool, string) {
		s := status("restartCount") + " " + status("ready")
		return s == "2 true", s
	})
	require.Equal(t, "hello", strings.TrimSpace(must(t, c, "logs", "victim", "-n", ns, "--previous")))
	must(t, c, "delete", "pod", "victim", "-n", ns, "--now")
}
