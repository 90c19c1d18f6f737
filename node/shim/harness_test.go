package shim_test

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"knarr/node/shim"
	_ "knarr/node/shim/supervisor" // the test's cached result depends on it
)

// binary is the shim under test, built once.
var binary string

func TestMain(m *testing.M) {
	os.Exit(runTests(m))
}

func runTests(m *testing.M) int {
	if os.Geteuid() != 0 {
		fmt.Println("skipped: containers need root")
		return 0
	}
	if binary = os.Getenv("KNARR_TEST_SHIM"); binary != "" { // a prebuilt one, say with the race detector
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "knarr-shim-test-")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	binary = filepath.Join(dir, "knarr-shim")
	build := exec.Command("go", "build", "-tags", "seccomp netgo osusergo", "-ldflags", "-s -w -extldflags -static", "-o", binary, "knarr/cmd/knarr-shim")
	build.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Printf("build knarr-shim: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

func random() string {
	b := make([]byte, 4)
	_, _ = rand.Read(b)
	return hex.EncodeToString(b)
}

// node is a shim with a state directory and a cgroup of its own.
type node struct {
	t      testing.TB
	dir    string
	rootfs string
	cgroup string
	client *shim.Client
	ctx    context.Context
}

func newNode(t testing.TB) *node {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	running := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, running) })
	t.Cleanup(cancel)
	n := &node{t: t, dir: filepath.Join(t.TempDir(), "shim"), cgroup: "/knarr-test-" + random(), ctx: ctx}
	n.rootfs = busyboxRootfs(t)
	n.start()
	t.Cleanup(n.end)
	return n
}

func (n *node) start() {
	n.t.Helper()
	c, err := shim.Start(n.ctx, shim.Options{Dir: n.dir, Path: binary, Log: n.t.Logf})
	if err != nil {
		n.t.Fatalf("start shim: %v\n%s", err, n.log())
	}
	n.client = c
}

func (n *node) log() string {
	data, _ := os.ReadFile(filepath.Join(n.dir, shim.LogName))
	return string(data)
}

func (n *node) pid() int {
	n.t.Helper()
	p, err := n.client.Ping(n.ctx)
	if err != nil {
		n.t.Fatal(err)
	}
	return p.PID
}

// end stops everything and checks that nothing is left.
func (n *node) end() {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	list, err := n.client.List(ctx)
	if err != nil {
		n.t.Errorf("list: %v", err)
	}
	for _, st := range list {
		if err := n.client.Delete(ctx, st.ID, true); err != nil {
			n.t.Errorf("delete %s: %v", st.ID, err)
		}
	}
	ping, err := n.client.Ping(ctx)
	if err != nil {
		n.t.Errorf("ping: %v", err)
		return
	}
	pidfd, err := unix.PidfdOpen(ping.PID, 0)
	if err != nil {
		n.t.Errorf("pidfd: %v", err)
		return
	}
	defer unix.Close(pidfd)
	if err := n.client.Shutdown(ctx, false); err != nil {
		n.t.Errorf("shutdown: %v", err)
		_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
	}
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	if k, err := unix.Poll(fds, 5000); k != 1 {
		n.t.Errorf("the shim did not end: %v", err)
	}
	if log := n.log(); log != "" {
		n.t.Logf("shim says:\n%s", log)
	}
	n.checkLeftovers()
}

func (n *node) checkLeftovers() {
	dirs, err := filepath.Glob("/sys/fs/cgroup/*" + n.cgroup)
	if err != nil {
		n.t.Error(err)
	}
	if two := "/sys/fs/cgroup" + n.cgroup; exists(two) {
		dirs = append(dirs, two)
	}
	for _, dir := range dirs {
		below, _ := filepath.Glob(dir + "/*/")
		if len(below) > 0 {
			n.t.Errorf("cgroups left: %v", below)
		}
		if err := os.Remove(dir); err != nil {
			n.t.Errorf("remove test cgroup: %v", err)
		}
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for _, line := range strings.Split(string(mounts), "\n") {
		if strings.Contains(line, n.dir) || strings.Contains(line, n.rootfs) {
			n.t.Errorf("mount left: %s", line)
		}
	}
	for _, sub := range []string{"containers", "libcontainer"} {
		entries, _ := os.ReadDir(filepath.Join(n.dir, sub))
		if len(entries) > 0 {
			n.t.Errorf("%s has %d entries left", sub, len(entries))
		}
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// busyboxRootfs makes a root directory with busybox and a few directories.
func busyboxRootfs(t testing.TB) string {
	t.Helper()
	root := t.TempDir()
	for _, dir := range []string{"bin", "proc", "sys", "dev", "tmp", "etc"} {
		if err := os.Mkdir(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	data, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skipf("needs busybox-static: %v", err)
	}
	if err := os.WriteFile(filepath.Join(root, "bin/busybox"), data, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, applet := range []string{"sh", "cat", "echo", "sleep", "stty", "id", "dd", "tail", "head", "seq", "yes", "ps", "kill", "tty", "grep", "tr"} {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", applet)); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// spec is a plain container that runs a shell command.
func (n *node) spec(id, script string) *specs.Spec {
	caps := []string{"CAP_CHOWN", "CAP_KILL", "CAP_SYS_RESOURCE"}
	adj := -500
	return &specs.Spec{
		Version: specs.Version,
		Root:    &specs.Root{Path: n.rootfs},
		Process: &specs.Process{
			Args: []string{"/bin/sh", "-c", script}, Env: []string{"PATH=/bin"}, Cwd: "/",
			Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
			OOMScoreAdj:  &adj,
			Rlimits:      []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 1 << 30, Soft: 1 << 30}},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"newinstance", "ptmxmode=0666", "mode=0620"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: n.cgroup + "/" + id,
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace},
				{Type: specs.UTSNamespace}, {Type: specs.NetworkNamespace},
			},
			Resources: &specs.LinuxResources{},
		},
	}
}

// run starts a container with a log and fails the test on an error.
func (n *node) run(script string, change ...func(*shim.StartRequest)) (id string, log string, tty *os.File) {
	n.t.Helper()
	id = "ct-" + random()
	log = filepath.Join(n.t.TempDir(), "0.log")
	req := &shim.StartRequest{Spec: n.spec(id, script), Log: shim.LogConfig{Path: log}}
	for _, f := range change {
		f(req)
	}
	_, tty, err := n.client.Run(n.ctx, id, req)
	if err != nil {
		n.t.Fatalf("run: %v\n%s", err, n.log())
	}
	return id, log, tty
}

func (n *node) wait(id string) shim.Status {
	n.t.Helper()
	st, err := n.client.Wait(n.ctx, id)
	if err != nil {
		n.t.Fatalf("wait: %v\n%s", err, n.log())
	}
	return st
}

func (n *node) remove(id string) {
	n.t.Helper()
	if err := n.client.Delete(n.ctx, id, true); err != nil {
		n.t.Fatalf("delete: %v", err)
	}
}

func readLog(t testing.TB, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return string(data)
}

// content strips the prefix of log entries of one stream.
func content(log, stream string) string {
	var b strings.Builder
	for _, line := range strings.Split(log, "\n") {
		parts := strings.SplitN(line, " ", 4)
		if len(parts) < 4 || parts[1] != stream {
			continue
		}
		b.WriteString(parts[3])
		if parts[2] == "F" {
			b.WriteByte('\n')
		}
	}
	return b.String()
}

func atoi(t testing.TB, s string) int {
	t.Helper()
	v, err := strconv.Atoi(strings.TrimSpace(s))
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// exec runs a shell command in a container.
func (n *node) exec(id, script, input string) (stdout, stderr string, code int) {
	n.t.Helper()
	var ours, theirs [3]*os.File
	for i := range ours {
		r, w, err := os.Pipe()
		if err != nil {
			n.t.Fatal(err)
		}
		ours[i], theirs[i] = r, w
		if i == 0 {
			ours[i], theirs[i] = w, r
		}
	}
	p, err := n.client.Exec(n.ctx, id, &shim.ExecRequest{Args: []string{"sh", "-c", script}}, shim.Stdio{Stdin: theirs[0], Stdout: theirs[1], Stderr: theirs[2]})
	shim.CloseFiles(theirs[:])
	defer shim.CloseFiles(ours[:])
	if err != nil {
		n.t.Fatalf("exec: %v", err)
	}
	defer p.Close()
	_, _ = io.WriteString(ours[0], input)
	_ = ours[0].Close()
	out, _ := io.ReadAll(ours[1])
	errOut, _ := io.ReadAll(ours[2])
	code, err = p.Wait()
	if err != nil {
		n.t.Fatalf("exec: wait: %v", err)
	}
	return string(out), string(errOut), code
}

// kill ends the shim as a crash does.
func (n *node) kill() {
	n.t.Helper()
	pid := n.pid()
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		n.t.Fatal(err)
	}
	defer unix.Close(pidfd)
	if err := unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0); err != nil {
		n.t.Fatal(err)
	}
	if k, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 5000); k != 1 {
		n.t.Fatalf("the shim did not die: %v", err)
	}
}

// watcher collects events.
type watcher struct {
	t      testing.TB
	ctx    context.Context
	events chan shim.Event
	first  chan struct{}
}

func (w *watcher) Snapshot([]shim.Status) {
	select {
	case <-w.first:
	default:
		close(w.first)
	}
}

func (w *watcher) Event(e shim.Event) { w.events <- e }

func (n *node) watch() *watcher {
	n.t.Helper()
	ctx, cancel := context.WithCancel(n.ctx)
	w := &watcher{t: n.t, ctx: ctx, events: make(chan shim.Event, 1000), first: make(chan struct{})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		n.client.Watch(ctx, w)
	}()
	n.t.Cleanup(func() { cancel(); <-done })
	<-w.first
	return w
}

// expect waits for an event of the type, passing over others.
func (w *watcher) expect(kind shim.EventType, id string) shim.Status {
	w.t.Helper()
	for {
		select {
		case e := <-w.events:
			if e.Type == kind && e.Status.ID == id {
				return e.Status
			}
		case <-w.ctx.Done():
			w.t.Fatalf("no event %s of %s", kind, id)
		}
	}
}
