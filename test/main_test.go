package test

import (
	"context"
	"flag"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"knarr/internal/rig"
	"knarr/internal/rig/machine"
)

// The cluster that most tests use.
const (
	nodes       = 2
	apiPort     = "16443"
	kubeletPort = "10250"
	upTimeout   = 90 * time.Second
	downTimeout = 90 * time.Second
)

// programs are the directory with knarr, knarr-shim and kubectl.
var programs = rig.Bin("../bin")

func TestMain(m *testing.M) {
	flag.Parse()
	if flag.Lookup("test.list").Value.String() != "" {
		os.Exit(m.Run())
	}
	os.Exit(machine.Main(m.Run, programs, "knarr", "knarr-shim", "kubectl"))
}

// newCluster describes a cluster of the machine; nothing is started.
func newCluster(t testing.TB, suffix string) *rig.Cluster {
	t.Helper()
	c := machine.Cluster(programs, suffix, "--port", apiPort, "--kubelet-port", kubeletPort)
	require.NotNil(t, c, "these tests run inside their machine")
	c.UpArgs = append(c.UpArgs, "--registry-config-path", mirrorsOf(c))
	return c
}

// shared is the cluster that most tests use: each in namespaces of its own.
var shared struct {
	once    sync.Once
	cluster *rig.Cluster
	err     error
	before  hostState // what the machine had before the first start
}

// theCluster returns the shared cluster, started and with its images loaded.
func theCluster(t testing.TB) *rig.Cluster {
	t.Helper()
	shared.once.Do(func() {
		shared.cluster = newCluster(t, "")
		shared.before, shared.err = lookAtHost(shared.cluster)
		if shared.err != nil {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), upTimeout)
		defer cancel()
		begin := time.Now()
		if _, shared.err = shared.cluster.Up(ctx, nodes); shared.err != nil {
			return
		}
		t.Logf("cluster of %d nodes is up after %v", nodes, time.Since(begin).Round(time.Millisecond))
		shared.err = loadImages(ctx, shared.cluster)
	})
	require.NoError(t, shared.err, "the shared cluster does not start")
	return shared.cluster
}

func loadImages(ctx context.Context, c *rig.Cluster) error {
	if err := c.BuildBusybox(ctx, "busybox:1"); err != nil {
		return err
	}
	for _, i := range [][]string{
		{"-t", "whoami:1", "-e", "VERSION=1", "../examples/whoami"},
		{"-t", "whoami:2", "-e", "VERSION=2", "../examples/whoami"},
		{"-t", "pi:1", "../examples/pi"},
	} {
		if _, err := c.Run(ctx, "image build", i...); err != nil {
			return err
		}
	}
	return nil
}

// must runs kubectl and returns what it says.
func must(t testing.TB, c *rig.Cluster, args ...string) string {
	t.Helper()
	out, err := c.Kubectl(t.Context(), args...)
	require.NoError(t, err)
	return out
}

// mustBeReady waits for all pods of a namespace, and says what is known of them where they do not come.
func mustBeReady(t testing.TB, c *rig.Cluster, ns string) {
	t.Helper()
	if _, err := c.Kubectl(t.Context(), "wait", "pod", "--all", "-n", ns, "--for=condition=Ready", "--timeout=60s"); err != nil {
		said, _ := c.Kubectl(t.Context(), "describe", "pods", "-n", ns)
		t.Fatalf("%v\n%s", err, said)
	}
}

// namespace makes a namespace for a test and removes it at its end.
func namespace(t testing.TB, c *rig.Cluster) string {
	t.Helper()
	ns := "t-" + machine.Random() + machine.Random()
	must(t, c, "create", "namespace", ns)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if _, err := c.Kubectl(ctx, "delete", "namespace", ns, "--wait=false"); err != nil {
			t.Errorf("delete namespace %s: %v", ns, err)
		}
	})
	return ns
}

// eventually asks until answer holds, and fails with what it said last.
func eventually(t testing.TB, limit time.Duration, what string, answer func() (bool, string)) {
	t.Helper()
	end := time.Now().Add(limit)
	for {
		ok, said := answer()
		if ok {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v; last: %s", what, limit, said)
		}
		time.Sleep(100 * time.Millisecond)
	}
}
