package test

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	vns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"knarr/internal/rig"
	"knarr/network/netns"
)

// The world that the tests run in.
const (
	nodes       = 2
	apiPort     = "16443"
	kubeletPort = "10250"
	uplink      = "uplink"
	machineIP   = "198.51.100.2"
	worldIP     = "198.51.100.1"
	upTimeout   = 90 * time.Second
	downTimeout = 90 * time.Second
	// insideEnv tells the process that it is inside the machine; its value is the cluster's name.
	insideEnv = "KNARR_E2E_NAME"
	rootEnv   = "KNARR_E2E_ROOT"
	worldEnv  = "KNARR_E2E_WORLD"
	// mountsEnv tells the process that it has mounts of its own.
	mountsEnv = "KNARR_E2E_MOUNTS"
	runDir    = "/run/knarr"
)

// programs are the directory with knarr, knarr-shim and kubectl.
var programs = binDir()

func binDir() string {
	if dir := os.Getenv("KNARR_BIN"); dir != "" {
		return dir
	}
	abs, err := filepath.Abs("../bin")
	if err != nil {
		panic(err)
	}
	return abs
}

func TestMain(m *testing.M) {
	flag.Parse()
	if os.Getenv(insideEnv) != "" || flag.Lookup("test.list").Value.String() != "" {
		os.Exit(m.Run())
	}
	os.Exit(outside())
}

// outside runs the tests in a mount namespace of their own, so that /run/knarr is theirs alone: what clusters of this
// machine keep there is none of the tests' business.
func outside() int {
	for _, p := range []string{"knarr", "knarr-shim", "kubectl"} {
		if _, err := os.Stat(filepath.Join(programs, p)); err != nil {
			fmt.Fprintf(os.Stderr, "e2e: %v: `make test` builds it\n", err)
			return 1
		}
	}
	if os.Getenv(mountsEnv) != "" {
		if err := run(); err != nil {
			fmt.Fprintln(os.Stderr, "e2e:", err)
			return 1
		}
		return 0
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := os.MkdirAll(runDir, 0o755); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	defer os.Remove(runDir) // where nobody else uses it
	cmd := again(ctx, mountsEnv+"=1")
	cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS
	if err := cmd.Run(); err != nil {
		return 1
	}
	return 0
}

// again is this program with the same arguments, to be told to end when ctx does.
func again(ctx context.Context, env ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", os.Args[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	return cmd
}

// run makes the machine, runs the tests in it, and takes away what a test that died left.
func run() error {
	if err := unix.Mount("tmpfs", runDir, "tmpfs", 0, "mode=0755"); err != nil {
		return fmt.Errorf("mount %s: %w", runDir, err)
	}
	name := "e2e" + random()
	root := filepath.Join(os.TempDir(), name)
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	defer os.RemoveAll(root)
	machine, world := filepath.Join(root, "machine"), filepath.Join(root, "world")
	if err := makeMachine(machine, world); err != nil {
		return err
	}
	defer func() {
		down := exec.Command(filepath.Join(programs, "knarr"), "down", "--purge", "--name", name, "--data-dir", filepath.Join(root, "data"))
		netns.Run(context.Background(), machine, down) // an error says that nothing was left
		netns.Delete(machine)
		netns.Delete(world)
	}()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return netns.Run(ctx, machine, again(ctx, insideEnv+"="+name, rootEnv+"="+filepath.Join(root, "data"), worldEnv+"="+world))
}

func random() string {
	b := make([]byte, 2)
	rand.Read(b)
	return hex.EncodeToString(b)
}

// makeMachine makes two namespaces that are joined by a link: the machine's only way out leads to the world.
func makeMachine(machine, world string) error {
	var handles []vns.NsHandle
	for _, path := range []string{machine, world} {
		// Link-local addresses appear some time after their link; the machine has none.
		noIPv6 := func() error {
			return os.WriteFile("/proc/sys/net/ipv6/conf/default/addr_gen_mode", []byte("1"), 0)
		}
		if err := netns.Create(path, noIPv6); err != nil {
			return err
		}
		h, err := netns.Open(path)
		if err != nil {
			return err
		}
		defer h.Close()
		handles = append(handles, h)
	}
	inMachine, err := netlink.NewHandleAt(handles[0], unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer inMachine.Close()
	inWorld, err := netlink.NewHandleAt(handles[1], unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer inWorld.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = uplink
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerNamespace = uplink, netlink.NsFd(int(handles[1]))
	if err := inMachine.LinkAdd(veth); err != nil {
		return err
	}
	for _, end := range []struct {
		h  *netlink.Handle
		ip string
	}{{inMachine, machineIP}, {inWorld, worldIP}} {
		if err := configure(end.h, end.ip); err != nil {
			return err
		}
	}
	link, err := inMachine.LinkByName(uplink)
	if err != nil {
		return err
	}
	return inMachine.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.ParseIP(worldIP)})
}

func configure(h *netlink.Handle, ip string) error {
	for _, name := range []string{"lo", uplink} {
		link, err := h.LinkByName(name)
		if err != nil {
			return err
		}
		if name == uplink {
			addr := &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(ip).To4(), Mask: net.CIDRMask(24, 32)}}
			if err := h.AddrAdd(link, addr); err != nil {
				return err
			}
		}
		if err := h.LinkSetUp(link); err != nil {
			return err
		}
	}
	return nil
}

// newCluster describes a cluster of the machine; nothing is started.
func newCluster(t testing.TB, suffix string) *rig.Cluster {
	t.Helper()
	c := &rig.Cluster{Bin: programs, Name: os.Getenv(insideEnv) + suffix, Root: os.Getenv(rootEnv),
		UpArgs: []string{"--port", apiPort, "--kubelet-port", kubeletPort}}
	require.NotEqual(t, suffix, c.Name, "these tests run inside their machine")
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
	ns := "t-" + random() + random()
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
