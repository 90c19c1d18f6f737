package runtime_test

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"knarr/node/image"
	"knarr/node/runtime"
	_ "knarr/node/shim/supervisor" // the test's cached result depends on it
)

var binary string

func TestMain(m *testing.M) { os.Exit(runTests(m)) }

func runTests(m *testing.M) int {
	if os.Geteuid() != 0 {
		fmt.Println("skipped: containers need root")
		return 0
	}
	if binary = os.Getenv("KNARR_TEST_SHIM"); binary != "" { // a prebuilt one, say with the race detector
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "knarr-runtime-test-")
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

// busyboxImages has one image, busybox, as overlay mounts on a directory.
type busyboxImages struct {
	dir   string
	image image.Image
	mu    sync.Mutex
	live  map[string]bool
}

func newImages(t testing.TB) *busyboxImages {
	t.Helper()
	dir := t.TempDir()
	base := filepath.Join(dir, "base")
	for _, sub := range []string{"bin", "proc", "sys", "dev", "tmp", "etc", "root"} {
		if err := os.MkdirAll(filepath.Join(base, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	data, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skipf("needs busybox-static: %v", err)
	}
	files := map[string]string{
		"bin/busybox": string(data),
		"etc/passwd":  "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1001:web:/tmp:/bin/sh\n",
		"etc/group":   "root:x:0:\nweb:x:1001:\nextra:x:1002:web\n",
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(base, name), []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, applet := range strings.Fields("sh cut cat echo sleep stty id dd tail head seq yes ps kill tty ls mount hostname nc httpd wget touch grep env mkdir pwd trap true false") {
		if err := os.Symlink("busybox", filepath.Join(base, "bin", applet)); err != nil {
			t.Fatal(err)
		}
	}
	return &busyboxImages{
		dir: dir, live: map[string]bool{},
		image: image.Image{
			ID:       "sha256:" + strings.Repeat("ab", 32),
			RepoTags: []string{"docker.io/library/busybox:test"}, RepoDigests: []string{"docker.io/library/busybox@sha256:" + strings.Repeat("cd", 32)},
			Config: ocispec.Image{Config: ocispec.ImageConfig{Env: []string{"PATH=/bin", "FROM_IMAGE=yes"}, Cmd: []string{"sleep", "1000"}}},
		},
	}
}

func (b *busyboxImages) Resolve(_ context.Context, ref string) (image.Image, error) {
	if ref == "busybox" || ref == b.image.ID {
		return b.image, nil
	}
	return image.Image{}, fmt.Errorf("image %s: %w", ref, errdefs.ErrNotFound)
}

func (b *busyboxImages) NewRootfs(_ context.Context, id, _ string) ([]mount.Mount, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.live[id] = true
	dir := filepath.Join(b.dir, id)
	for _, sub := range []string{"upper", "work"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return nil, err
		}
	}
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{
		"index=off", "lowerdir=" + filepath.Join(b.dir, "base"), "upperdir=" + dir + "/upper", "workdir=" + dir + "/work",
	}}}, nil
}

func (b *busyboxImages) RemoveRootfs(_ context.Context, id string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.live, id)
	return os.RemoveAll(filepath.Join(b.dir, id))
}

// host is a runtime with state of its own.
type host struct {
	t      testing.TB
	ctx    context.Context
	state  string
	cgroup string
	images *busyboxImages
	opts   runtime.Options
	times  []time.Duration // of a benchmark's iterations
	*runtime.Runtime
}

func newHost(t testing.TB, change ...func(*runtime.Options)) *host {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Second)
	running := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, running) })
	t.Cleanup(cancel)
	h := &host{t: t, ctx: ctx, state: filepath.Join(t.TempDir(), "state"), cgroup: "/knarr-test-" + random(), images: newImages(t)}
	h.opts = runtime.Options{
		StateDir: h.state, CgroupParent: h.cgroup, Images: h.images, ShimPath: binary,
		Log: slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelWarn})),
	}
	for _, f := range change {
		f(&h.opts)
	}
	h.open()
	t.Cleanup(h.end)
	return h
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", p)
	return len(p), nil
}

func (h *host) open() {
	h.t.Helper()
	r, err := runtime.Open(h.ctx, h.opts)
	if err != nil {
		h.t.Fatalf("open: %v", err)
	}
	h.Runtime = r
}

// end removes everything and checks that nothing is left.
func (h *host) end() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	list, err := h.ListPodSandbox(ctx, nil)
	if err != nil {
		h.t.Error(err)
	}
	var wg sync.WaitGroup
	for _, s := range list {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := h.RemovePodSandbox(ctx, s.Id); err != nil {
				h.t.Errorf("remove sandbox: %v", err)
			}
		}()
	}
	wg.Wait()
	pid, err := h.ShimPID(ctx)
	if err != nil {
		h.t.Error(err)
	}
	if err := h.ShutdownShim(ctx, false); err != nil {
		h.t.Errorf("shutdown: %v", err)
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	if err := h.Close(ctx); err != nil {
		h.t.Error(err)
	}
	h.awaitGone(pid)
	if log, _ := os.ReadFile(filepath.Join(h.state, "shim/shim.log")); len(log) > 0 {
		h.t.Logf("shim says:\n%s", log)
	}
	h.checkLeftovers()
}

func (h *host) awaitGone(pid int) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if n, _ := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 10000); n != 1 {
		h.t.Errorf("process %d did not end", pid)
	}
}

func (h *host) checkLeftovers() {
	dirs, _ := filepath.Glob("/sys/fs/cgroup/*" + h.cgroup)
	if _, err := os.Stat("/sys/fs/cgroup" + h.cgroup); err == nil {
		dirs = append(dirs, "/sys/fs/cgroup"+h.cgroup)
	}
	for _, dir := range dirs {
		if below, _ := filepath.Glob(dir + "/*/"); len(below) > 0 {
			h.t.Errorf("cgroups left: %v", below)
		}
		if err := os.Remove(dir); err != nil {
			h.t.Errorf("remove the test's cgroup: %v", err)
		}
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for _, line := range strings.Split(string(mounts), "\n") {
		if strings.Contains(line, h.state) || strings.Contains(line, h.images.dir) {
			h.t.Errorf("mount left: %s", line)
		}
	}
	for _, sub := range []string{"pods", "containers", "shim/containers", "shim/libcontainer"} {
		if entries, _ := os.ReadDir(filepath.Join(h.state, sub)); len(entries) > 0 {
			h.t.Errorf("%s: %d entries left", sub, len(entries))
		}
	}
	for id := range h.images.live {
		h.t.Errorf("root file system of %s left", id)
	}
	procs, _ := filepath.Glob("/proc/[0-9]*/root")
	for _, p := range procs {
		if root, err := os.Readlink(p); err == nil && strings.HasPrefix(root, h.state) {
			h.t.Errorf("process left: %s", p)
		}
	}
}

// pod is a sandbox and its configuration.
type pod struct {
	h      *host
	id     string
	config *runtimeapi.PodSandboxConfig
	logs   string
}

func (h *host) pod(change ...func(*runtimeapi.PodSandboxConfig)) *pod {
	h.t.Helper()
	logs := h.t.TempDir()
	config := &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: "web", Namespace: "default", Uid: "uid-" + random()},
		Hostname: "web", LogDirectory: logs,
		DnsConfig: &runtimeapi.DNSConfig{Servers: []string{"10.43.0.10"}, Searches: []string{"svc.cluster.local"}, Options: []string{"ndots:5"}},
		Labels:    map[string]string{"app": "web"},
		Linux:     &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: ownPID()}},
	}
	for _, f := range change {
		f(config)
	}
	id, err := h.RunPodSandbox(h.ctx, config, "")
	if err != nil {
		h.t.Fatalf("run sandbox: %v", err)
	}
	return &pod{h: h, id: id, config: config, logs: logs}
}

// create makes a container that runs a shell script.
func (p *pod) create(script string, change ...func(*runtimeapi.ContainerConfig)) string {
	p.h.t.Helper()
	name := "c-" + random()
	config := &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name}, Image: &runtimeapi.ImageSpec{Image: "busybox"},
		Command: []string{"/bin/sh", "-c", script}, LogPath: name + ".log", Labels: map[string]string{"name": name},
		Linux: &runtimeapi.LinuxContainerConfig{
			Resources:       &runtimeapi.LinuxContainerResources{},
			SecurityContext: &runtimeapi.LinuxContainerSecurityContext{Seccomp: &runtimeapi.SecurityProfile{}, NamespaceOptions: ownPID()},
		},
	}
	for _, f := range change {
		f(config)
	}
	id, err := p.h.CreateContainer(p.h.ctx, p.id, config, p.config)
	if err != nil {
		p.h.t.Fatalf("create container: %v", err)
	}
	return id
}

func (p *pod) run(script string, change ...func(*runtimeapi.ContainerConfig)) string {
	p.h.t.Helper()
	id := p.create(script, change...)
	if err := p.h.StartContainer(p.h.ctx, id); err != nil {
		p.h.t.Fatalf("start container: %v", err)
	}
	return id
}

func (h *host) status(id string) *runtimeapi.ContainerStatus {
	h.t.Helper()
	resp, err := h.ContainerStatus(h.ctx, id, true)
	if err != nil {
		h.t.Fatal(err)
	}
	return resp.Status
}

func (h *host) pid(id string) string {
	h.t.Helper()
	resp, err := h.ContainerStatus(h.ctx, id, true)
	if err != nil {
		h.t.Fatal(err)
	}
	return resp.Info["pid"]
}

// exec runs a command and returns its output without the last newline.
func (h *host) exec(id string, cmd ...string) string {
	h.t.Helper()
	out, errOut, err := h.ExecSync(h.ctx, id, cmd, 20*time.Second)
	if err != nil {
		h.t.Fatalf("exec %v: %v (%s)", cmd, err, errOut)
	}
	return strings.TrimSuffix(string(out), "\n")
}

// ended waits for the end of a container by the runtime's events.
func (h *host) ended(id string) *runtimeapi.ContainerStatus {
	h.t.Helper()
	events := make(chan *runtimeapi.ContainerEventResponse)
	ctx, cancel := context.WithTimeout(h.ctx, 30*time.Second)
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = h.GetContainerEvents(ctx, events, nil)
	}()
	defer func() { cancel(); <-done }()
	for {
		if st := h.status(id); st.State == runtimeapi.ContainerState_CONTAINER_EXITED {
			return st
		}
		select {
		case <-events:
		case <-ctx.Done():
			h.t.Fatalf("container %s did not end", id)
		}
	}
}

// logOf returns what a container wrote to both streams.
func (h *host) logOf(id string) string {
	h.t.Helper()
	data, err := os.ReadFile(h.status(id).LogPath)
	if err != nil {
		h.t.Fatal(err)
	}
	var b strings.Builder
	for _, line := range strings.Split(string(data), "\n") {
		if parts := strings.SplitN(line, " ", 4); len(parts) == 4 {
			b.WriteString(parts[3] + "\n")
		}
	}
	return b.String()
}

// ownPID is what kubelet asks for normally: CRI's zero value shares the PID
// namespace of the pod.
func ownPID() *runtimeapi.NamespaceOption {
	return &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// awaitLog waits until a container's log is want.
func (h *host) awaitLog(id, want string) {
	h.t.Helper()
	path := h.status(id).LogPath
	got := ""
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(path); err != nil {
			continue
		}
		if got = h.logOf(id); got == want {
			return
		}
	}
	h.t.Fatalf("log %q, want %q", got, want)
}

func (h *host) cgroup2() bool {
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	return err == nil
}

// cgroupFile reads a file of the container's cgroup in whichever hierarchy has it.
func (h *host) cgroupFile(id, name string) string {
	h.t.Helper()
	resp, err := h.ContainerStatus(h.ctx, id, true)
	if err != nil {
		h.t.Fatal(err)
	}
	found, _ := filepath.Glob("/sys/fs/cgroup/*" + resp.Info["cgroup"] + "/" + name)
	found = append(found, "/sys/fs/cgroup"+resp.Info["cgroup"]+"/"+name)
	data, err := os.ReadFile(found[0])
	if err != nil {
		h.t.Fatal(err)
	}
	return string(data)
}
