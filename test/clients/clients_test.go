package clients

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/stretchr/testify/require"

	"knarr/internal/rig"
	"knarr/internal/rig/machine"
	"knarr/internal/rig/script"
)

// The cluster that all clients work on.
const (
	nodes   = 2
	apiPort = "16443"
	// upTimeout bounds the start with all images, and the packing of one more.
	upTimeout = 3 * time.Minute
)

// programs is the directory with knarr, knarr-shim and kubectl.
var programs = rig.Bin("../../bin")

func TestMain(m *testing.M) {
	flag.Parse()
	if flag.Lookup("test.list").Value.String() != "" {
		os.Exit(m.Run())
	}
	if !machine.Started() {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		err := build(ctx, testing.Short())
		stop()
		if err != nil {
			fmt.Fprintln(os.Stderr, "clients:", err)
			os.Exit(1)
		}
	}
	os.Exit(machine.Main(m.Run, programs, "knarr", "knarr-shim", "kubectl"))
}

// shared is the cluster.
var shared struct {
	once    sync.Once
	cluster *rig.Cluster
	err     error
}

// theCluster returns the cluster, started and with its images loaded.
func theCluster(t *testing.T) *rig.Cluster {
	t.Helper()
	shared.once.Do(func() {
		shared.cluster = machine.Cluster(programs, "", "--port", apiPort)
		ctx, cancel := context.WithTimeout(context.Background(), upTimeout)
		defer cancel()
		if _, shared.err = shared.cluster.Up(ctx, nodes); shared.err == nil {
			shared.err = loadImages(ctx, shared.cluster)
		}
	})
	require.NoError(t, shared.err, "the cluster does not start")
	return shared.cluster
}

// loadImages packs what the scripts start. nginx stands for itself: the examples of client-go name it.
func loadImages(ctx context.Context, c *rig.Cluster) error {
	if err := c.BuildBusybox(ctx, "busybox:1"); err != nil {
		return err
	}
	for _, tag := range []string{"whoami:1", "whoami:2", "nginx:1.12", "nginx:1.13"} {
		if _, err := c.Run(ctx, "image build", "-t", tag, "../../examples/whoami"); err != nil {
			return err
		}
	}
	return nil
}

// play runs the script of a client. Operators' scripts run alone: they put webhooks before everybody's writes.
func play(t *testing.T, name string) {
	t.Helper()
	c := theCluster(t)
	config, err := c.Kubeconfig(t.Context())
	require.NoError(t, err)
	links := linkPrograms(t)
	operators, err := filepath.Abs(filepath.Join(out, "operators"))
	require.NoError(t, err)
	commands := script.Commands()
	commands["image"] = func(ts *testscript.TestScript, neg bool, args []string) { packImage(ts, c, neg, args) }
	testscript.Run(t, testscript.Params{
		Files: []string{filepath.Join("testdata", name+".txtar")},
		Cmds:  commands,
		Setup: func(e *testscript.Env) error {
			e.Setenv("OPERATORS", operators)
			return script.SetUp(e, links, config)
		},
	})
}

// linkPrograms makes a directory in which all clients and kubectl are found.
func linkPrograms(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	built, err := filepath.Glob(filepath.Join(out, "bin", "*"))
	require.NoError(t, err)
	for _, path := range append(built, filepath.Join(programs, "kubectl")) {
		abs, err := filepath.Abs(path)
		require.NoError(t, err)
		require.NoError(t, os.Symlink(abs, filepath.Join(dir, filepath.Base(path))))
	}
	return dir
}

// packImage is `image PROGRAM PATH REF`: an image that holds the program of a client at PATH, and an empty /tmp, for a user that is
// not root, loaded on each node.
func packImage(ts *testscript.TestScript, c *rig.Cluster, neg bool, args []string) {
	if len(args) != 3 || neg {
		ts.Fatalf("usage: image PROGRAM PATH REF")
	}
	root := ts.MkAbs(args[0] + ".root")
	to := filepath.Join(root, args[1])
	ts.Check(os.MkdirAll(filepath.Dir(to), 0o755))
	ts.Check(os.MkdirAll(filepath.Join(root, "tmp"), 0o777))
	ts.Check(os.Chmod(filepath.Join(root, "tmp"), 0o777|os.ModeSticky))
	program, err := os.ReadFile(filepath.Join(out, "bin", args[0]))
	ts.Check(err)
	ts.Check(os.WriteFile(to, program, 0o755))
	ctx, cancel := context.WithTimeout(context.Background(), upTimeout)
	defer cancel()
	_, err = c.Run(ctx, "image build", "-t", args[2], "--user", "65532", "--entrypoint", args[1], root)
	ts.Check(err)
}

func TestHelm(t *testing.T) {
	needsAll(t)
	t.Parallel() // with the next; after all others
	play(t, "helm")
}

func TestKustomize(t *testing.T) {
	t.Parallel()
	play(t, "kustomize")
}

// needsAll skips what `make test` leaves to `make clients`.
func needsAll(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("part of make clients")
	}
}

func TestClientGo(t *testing.T) {
	needsAll(t)
	play(t, "clientgo")
}

func TestKueue(t *testing.T) {
	needsAll(t)
	play(t, "kueue")
}
