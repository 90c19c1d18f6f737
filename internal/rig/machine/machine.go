// Package machine gives end-to-end tests a machine of their own: a network namespace that stands for the machine, with a
// second one as the world outside, and a mount namespace in which /run/knarr is theirs alone. So the tests neither need nor
// touch this machine's own network and clusters, and see each packet that would leave it.
//
// A test binary that calls Main runs three times, one inside the other: as started, with mounts of its own, and in the
// machine, where the tests run.
package machine

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	vns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"knarr/internal/rig"
	"knarr/network/netns"
)

const (
	// Uplink is the link between the machine and the world, on both ends.
	Uplink = "uplink"
	// IP is the machine's address, WorldIP that of the world, which is the machine's gateway.
	IP      = "198.51.100.2"
	WorldIP = "198.51.100.1"

	// insideEnv tells the process that it is inside the machine; its value is the cluster's name.
	insideEnv = "KNARR_E2E_NAME"
	rootEnv   = "KNARR_E2E_ROOT"
	worldEnv  = "KNARR_E2E_WORLD"
	// mountsEnv tells the process that it has mounts of its own.
	mountsEnv = "KNARR_E2E_MOUNTS"
	runDir    = "/run/knarr"
)

// Started says that this process is one that Main started, not the first of them.
func Started() bool { return os.Getenv(mountsEnv) != "" }

// World is the path of the world's network namespace.
func World() string { return os.Getenv(worldEnv) }

// Random is a short suffix for names.
func Random() string {
	b := make([]byte, 2)
	rand.Read(b)
	return hex.EncodeToString(b)
}

// Cluster describes a cluster of the machine, of the programs in bin; nothing is started. The empty suffix is that of the
// cluster which Main purges at the end. It is nil outside of the machine.
func Cluster(bin, suffix string, upArgs ...string) *rig.Cluster {
	name := os.Getenv(insideEnv)
	if name == "" {
		return nil
	}
	return &rig.Cluster{Bin: bin, Name: name + suffix, Root: os.Getenv(rootEnv), UpArgs: upArgs}
}

// Main calls tests inside the machine and returns the exit code for the process. bin must hold the programs.
func Main(tests func() int, bin string, programs ...string) int {
	if os.Getenv(insideEnv) != "" {
		return tests()
	}
	if err := outside(bin, programs); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	return 0
}

// outside enters a mount namespace, so that /run/knarr is the tests' alone, and from there the machine.
func outside(bin string, programs []string) error {
	if Started() {
		return run(bin)
	}
	for _, p := range programs {
		if _, err := os.Stat(filepath.Join(bin, p)); err != nil {
			return fmt.Errorf("%w: `make test` builds it", err)
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := os.MkdirAll(runDir, 0o755); err != nil {
		return err
	}
	defer os.Remove(runDir) // where nobody else uses it
	cmd := again(ctx, mountsEnv+"=1")
	cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS
	return cmd.Run()
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
func run(bin string) error {
	if err := unix.Mount("tmpfs", runDir, "tmpfs", 0, "mode=0755"); err != nil {
		return fmt.Errorf("mount %s: %w", runDir, err)
	}
	name := "e2e" + Random()
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
		down := exec.Command(filepath.Join(bin, "knarr"), "down", "--purge", "--name", name, "--data-dir", filepath.Join(root, "data"))
		netns.Run(context.Background(), machine, down) // an error says that nothing was left
		killIn(machine)
		netns.Delete(machine)
		netns.Delete(world)
	}()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return netns.Run(ctx, machine, again(ctx, insideEnv+"="+name, rootEnv+"="+filepath.Join(root, "data"), worldEnv+"="+world))
}

// killIn ends the processes in a network namespace: programs of a test that died. Nobody else's are in it.
func killIn(ns string) {
	theirs, err := os.Stat(ns)
	if err != nil {
		return
	}
	links, _ := filepath.Glob("/proc/[0-9]*/ns/net")
	for _, l := range links {
		ours, err := os.Stat(l)
		if err != nil || !os.SameFile(theirs, ours) {
			continue
		}
		// Our own main thread may be one of those that entered it.
		if pid, err := strconv.Atoi(strings.Split(l, "/")[2]); err == nil && pid != os.Getpid() {
			_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended
		}
	}
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
	attrs.Name = Uplink
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerNamespace = Uplink, netlink.NsFd(int(handles[1]))
	if err := inMachine.LinkAdd(veth); err != nil {
		return err
	}
	for _, end := range []struct {
		h  *netlink.Handle
		ip string
	}{{inMachine, IP}, {inWorld, WorldIP}} {
		if err := configure(end.h, end.ip); err != nil {
			return err
		}
	}
	link, err := inMachine.LinkByName(Uplink)
	if err != nil {
		return err
	}
	return inMachine.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.ParseIP(WorldIP)})
}

func configure(h *netlink.Handle, ip string) error {
	for _, name := range []string{"lo", Uplink} {
		link, err := h.LinkByName(name)
		if err != nil {
			return err
		}
		if name == Uplink {
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
