package runtime_test

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestContainerLifeCycle(t *testing.T) {
	h := newHost(t)
	p := h.pod()
	id := p.run("echo hello; hostname; cat /etc/resolv.conf; exit 3")
	st := h.ended(id)
	if st.ExitCode != 3 || st.Reason != "Error" || st.StartedAt == 0 || st.FinishedAt < st.StartedAt {
		t.Errorf("status %v", st)
	}
	if got := h.logOf(id); got != "hello\nweb\nsearch svc.cluster.local\nnameserver 10.43.0.10\noptions ndots:5\n" {
		t.Errorf("log %q", got)
	}
	id = p.run("exec sleep 1000")
	if got := h.exec(id, "sh", "-c", "id -u; echo $HOSTNAME $FROM_IMAGE"); got != "0\nweb yes" {
		t.Errorf("exec says %q", got)
	}
	if st := h.status(id); st.State != runtimeapi.ContainerState_CONTAINER_RUNNING || !strings.HasPrefix(st.ImageId, "sha256:abab") {
		t.Errorf("status %v", st)
	}
	if err := h.StopContainer(h.ctx, id, 0); err != nil {
		t.Fatal(err)
	}
	if st := h.status(id); st.ExitCode != 137 || st.Reason != "Error" {
		t.Errorf("status after kill %v", st)
	}
}

func TestStopWithGrace(t *testing.T) {
	h := newHost(t)
	p := h.pod()
	polite := p.run("trap 'echo bye; exit 0' TERM; echo ready; while true; do sleep 0.05; done")
	h.awaitLog(polite, "ready\n")
	if err := h.StopContainer(h.ctx, polite, 20); err != nil {
		t.Fatal(err)
	}
	if st := h.status(polite); st.ExitCode != 0 || st.Reason != "Completed" {
		t.Errorf("polite: %v", st)
	}
	if got := h.logOf(polite); got != "ready\nbye\n" {
		t.Errorf("log %q", got)
	}
	stubborn := p.run("trap '' TERM; echo ready; while true; do sleep 0.05; done")
	h.awaitLog(stubborn, "ready\n")
	begin := time.Now()
	if err := h.StopContainer(h.ctx, stubborn, 1); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(begin); d < time.Second {
		t.Errorf("killed after %v", d)
	}
	if st := h.status(stubborn); st.ExitCode != 137 || st.Reason != "Error" {
		t.Errorf("stubborn: %v", st)
	}
	user1 := p.run("trap 'exit 44' USR1; echo ready; while true; do sleep 0.05; done", func(c *runtimeapi.ContainerConfig) {
		c.StopSignal = runtimeapi.Signal_SIGUSR1
	})
	h.awaitLog(user1, "ready\n")
	if err := h.StopContainer(h.ctx, user1, 20); err != nil {
		t.Fatal(err)
	}
	if st := h.status(user1); st.ExitCode != 44 {
		t.Errorf("own stop signal: %v", st)
	}
}

func TestOOMKilled(t *testing.T) {
	h := newHost(t)
	id := h.pod().run("exec tail /dev/zero", func(c *runtimeapi.ContainerConfig) {
		c.Linux.Resources.MemoryLimitInBytes = 10 << 20
	})
	if st := h.ended(id); st.Reason != "OOMKilled" || st.ExitCode != 137 {
		t.Errorf("status %v", st)
	}
}

func TestStartError(t *testing.T) {
	h := newHost(t)
	p := h.pod()
	id := p.create("", func(c *runtimeapi.ContainerConfig) { c.Command = []string{"/no/such/program"} })
	err := h.StartContainer(h.ctx, id)
	if err == nil || !strings.Contains(err.Error(), "/no/such/program") {
		t.Fatalf("start: %v", err)
	}
	st := h.status(id)
	if st.State != runtimeapi.ContainerState_CONTAINER_EXITED || st.ExitCode != 128 || st.Reason != "StartError" || !strings.Contains(st.Message, "/no/such/program") {
		t.Errorf("status %v", st)
	}
	if err := h.StartContainer(h.ctx, id); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("second start: %v", err)
	}
	if _, err := h.ContainerStatus(h.ctx, "nothing", false); status.Code(err) != codes.NotFound {
		t.Errorf("status of an unknown container: %v", err)
	}
	if _, err := h.PodSandboxStatus(h.ctx, "nothing", false); status.Code(err) != codes.NotFound {
		t.Errorf("status of an unknown sandbox: %v", err)
	}
	for name, err := range map[string]error{
		"StopContainer": h.StopContainer(h.ctx, "nothing", 1), "RemoveContainer": h.RemoveContainer(h.ctx, "nothing"),
		"StopPodSandbox": h.StopPodSandbox(h.ctx, "nothing"), "RemovePodSandbox": h.RemovePodSandbox(h.ctx, "nothing"),
	} {
		if err != nil {
			t.Errorf("%s of what is gone: %v", name, err)
		}
	}
	_, err = h.CreateContainer(h.ctx, p.id, &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "x"}, Image: &runtimeapi.ImageSpec{Image: "missing"},
	}, p.config)
	if status.Code(err) != codes.NotFound {
		t.Errorf("missing image: %v", err)
	}
}

func TestSecurity(t *testing.T) {
	h := newHost(t)
	p := h.pod(func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.SecurityContext.Privileged = true
		c.Linux.Sysctls = map[string]string{"net.ipv4.ip_forward": "1", "kernel.shm_rmid_forced": "1"}
	})
	user := p.run("exec sleep 1000", func(c *runtimeapi.ContainerConfig) {
		sc := c.Linux.SecurityContext
		sc.RunAsUsername, sc.NoNewPrivs, sc.ReadonlyRootfs = "web", true, true
		sc.SupplementalGroups = []int64{5000}
		sc.Capabilities = &runtimeapi.Capability{DropCapabilities: []string{"ALL"}, AddCapabilities: []string{"NET_BIND_SERVICE"}}
		sc.MaskedPaths, sc.ReadonlyPaths = []string{"/proc/keys"}, []string{"/proc/sys"}
	})
	if got := h.exec(user, "id"); !strings.HasPrefix(got, "uid=1000(web) gid=1001(web) groups=") || !strings.Contains(got, "1002(extra)") || !strings.Contains(got, "5000") {
		t.Errorf("id: %s", got)
	}
	procStatus := h.exec(user, "cat", "/proc/1/status")
	for _, want := range []string{"CapBnd:\t0000000000000400", "NoNewPrivs:\t1", "Seccomp:\t2"} {
		if !strings.Contains(procStatus, want) {
			t.Errorf("no %q in %s", want, procStatus)
		}
	}
	if _, _, err := h.ExecSync(h.ctx, user, []string{"touch", "/x"}, time.Minute); err == nil {
		t.Error("the root file system is writable")
	}
	if got := h.exec(user, "sh", "-c", "cat /proc/keys | head -c 1; cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_unprivileged_port_start"); got != "1\n1\n0" {
		t.Errorf("masked file and sysctls: %q", got)
	}
	if u := h.status(user).User.Linux; u.Uid != 1000 || u.Gid != 1001 || len(u.SupplementalGroups) != 3 {
		t.Errorf("user %v", u)
	}
	privileged := p.run("exec sleep 1000", func(c *runtimeapi.ContainerConfig) { c.Linux.SecurityContext.Privileged = true })
	procStatus = h.exec(privileged, "cat", "/proc/1/status")
	if !strings.Contains(procStatus, "Seccomp:\t0") || strings.Contains(procStatus, "CapEff:\t0000000000000000") {
		t.Errorf("privileged: %s", procStatus)
	}
	h.exec(privileged, "sh", "-c", "mkdir /m && mount -t tmpfs x /m && ls -d /dev/null")
	plain := p.run("exec sleep 1000")
	if _, _, err := h.ExecSync(h.ctx, plain, []string{"mount", "-t", "tmpfs", "x", "/tmp"}, time.Minute); err == nil {
		t.Error("a plain container can mount")
	}
	if _, err := h.CreateContainer(h.ctx, h.pod().id, &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "x"}, Image: &runtimeapi.ImageSpec{Image: "busybox"},
		Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{Privileged: true}},
	}, nil); status.Code(err) != codes.InvalidArgument {
		t.Errorf("privileged in a plain sandbox: %v", err)
	}
}

func TestDevices(t *testing.T) {
	h := newHost(t)
	id := h.pod().run("exec sleep 1000", func(c *runtimeapi.ContainerConfig) {
		c.Devices = []*runtimeapi.Device{{HostPath: "/dev/zero", ContainerPath: "/dev/mine", Permissions: "r"}}
	})
	if got := h.exec(id, "sh", "-c", "head -c 4 /dev/mine | tr '\\0' z"); got != "zzzz" {
		t.Errorf("device %q", got)
	}
	var st syscall.Stat_t
	if err := syscall.Stat("/", &st); err != nil {
		t.Fatal(err)
	}
	disk := fmt.Sprintf("mknod /disk b %d %d && head -c 1 /disk", unix.Major(st.Dev), unix.Minor(st.Dev))
	if out, _, err := h.ExecSync(h.ctx, id, []string{"sh", "-c", disk}, time.Minute); err == nil {
		t.Errorf("the node's disk can be read: %d bytes", len(out))
	}
	h.exec(id, "sh", "-c", "echo x > /dev/null; head -c 1 /dev/urandom > /dev/null")
}

func TestMounts(t *testing.T) {
	h := newHost(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "hosts"), []byte("1.2.3.4 mine\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	p := h.pod()
	id := p.run("exec sleep 1000", func(c *runtimeapi.ContainerConfig) {
		c.Mounts = []*runtimeapi.Mount{
			{ContainerPath: "/data/deep", HostPath: filepath.Join(dir, "new")},
			{ContainerPath: "/etc/hosts", HostPath: filepath.Join(dir, "hosts")},
			{ContainerPath: "/ro", HostPath: dir, Readonly: true, RecursiveReadOnly: true},
			{ContainerPath: "/slave", HostPath: dir, Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER},
			{ContainerPath: "/image", Image: &runtimeapi.ImageSpec{Image: "busybox"}, ImageSubPath: "etc"},
		}
	})
	if got := h.exec(id, "cat", "/etc/hosts"); got != "1.2.3.4 mine" {
		t.Errorf("hosts %q", got)
	}
	h.exec(id, "touch", "/data/deep/file")
	if _, err := os.Stat(filepath.Join(dir, "new/file")); err != nil {
		t.Error(err)
	}
	for _, path := range []string{"/ro/x", "/image/x"} {
		if _, _, err := h.ExecSync(h.ctx, id, []string{"touch", path}, time.Minute); err == nil {
			t.Errorf("%s is writable", path)
		}
	}
	if got := h.exec(id, "grep", "web", "/image/group"); !strings.HasPrefix(got, "web:x:1001") {
		t.Errorf("image volume %q", got)
	}
	h.exec(id, "sh", "-c", "echo x > /dev/shm/shared")
	other := p.run("exec sleep 1000")
	if got := h.exec(other, "cat", "/dev/shm/shared"); got != "x" {
		t.Errorf("shared memory %q", got)
	}
}

func TestNamespaces(t *testing.T) {
	h := newHost(t)
	p := h.pod(func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_POD}
	})
	shared := func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_POD}
	}
	a := p.run("exec sleep 1111", shared)
	b := p.run("exec sleep 2222", shared)
	ps := h.exec(b, "ps")
	if !strings.Contains(ps, "sleep 1111") || !strings.Contains(ps, "pause") {
		t.Errorf("processes seen from a neighbour:\n%s", ps)
	}
	if err := h.StopContainer(h.ctx, a, 0); err != nil {
		t.Fatal(err)
	}
	if ps := h.exec(b, "ps"); strings.Contains(ps, "1111") {
		t.Errorf("after the stop:\n%s", ps)
	}
	if got := h.exec(b, "ls", "/sys/class/net"); !strings.Contains(got, "lo") {
		t.Errorf("links %q", got)
	}
	target := h.pod()
	c := target.run("exec sleep 3333")
	debug := target.run("exec sleep 4444", func(cc *runtimeapi.ContainerConfig) {
		cc.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET, TargetId: c}
	})
	if ps := h.exec(debug, "ps"); !strings.Contains(ps, "sleep 3333") {
		t.Errorf("processes seen from a debug container:\n%s", ps)
	}
	node := h.pod(func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{
			Network: runtimeapi.NamespaceMode_NODE, Pid: runtimeapi.NamespaceMode_NODE, Ipc: runtimeapi.NamespaceMode_NODE,
		}
	})
	d := node.run("exec sleep 5555", func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions = node.config.Linux.SecurityContext.NamespaceOptions
	})
	for _, ns := range []string{"net", "ipc", "uts", "pid"} {
		mine, _ := os.Readlink("/proc/self/ns/" + ns)
		theirs, err := os.Readlink("/proc/" + h.pid(d) + "/ns/" + ns)
		if err != nil || mine != theirs {
			t.Errorf("namespace %s: %s and %s (%v)", ns, mine, theirs, err)
		}
	}
	if err := h.StopPodSandbox(h.ctx, node.id); err != nil {
		t.Fatal(err)
	}
	if st := h.status(d); st.ExitCode != 137 {
		t.Errorf("after the stop of the sandbox: %v", st)
	}
}

func TestUserNamespace(t *testing.T) {
	h := newHost(t)
	// The users of the namespace must be able to reach the root file system.
	for dir := h.state; dir != "/tmp" && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	userns := &runtimeapi.UserNamespace{
		Mode: runtimeapi.NamespaceMode_POD,
		Uids: []*runtimeapi.IDMapping{{HostId: 200000, ContainerId: 0, Length: 65536}},
		Gids: []*runtimeapi.IDMapping{{HostId: 200000, ContainerId: 0, Length: 65536}},
	}
	p := h.pod(func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER, UsernsOptions: userns}
	})
	id := p.run("exec sleep 1000", func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER, UsernsOptions: userns}
	})
	got := h.exec(id, "sh", "-c", "touch /made; ls -ln /made /etc/passwd | cut -c1-40 2>/dev/null || ls -ln /made; cat /proc/self/uid_map; hostname")
	if !strings.Contains(got, "200000") || !strings.HasSuffix(got, "web") {
		t.Errorf("inside: %s", got)
	}
	info, err := os.Stat("/proc/" + h.pid(id))
	if err != nil {
		t.Fatal(err)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || st.Uid != 200000 {
		t.Errorf("user on the node: %+v", info.Sys())
	}
}

func TestResources(t *testing.T) {
	h := newHost(t)
	id := h.pod().run("exec sleep 1000", func(c *runtimeapi.ContainerConfig) {
		c.Linux.Resources = &runtimeapi.LinuxContainerResources{
			CpuShares: 256, CpuQuota: 30000, CpuPeriod: 100000, MemoryLimitInBytes: 50 << 20, OomScoreAdj: 900,
		}
	})
	read := func(name string) string {
		t.Helper()
		return strings.TrimSpace(h.cgroupFile(id, name))
	}
	if got := h.exec(id, "cat", "/proc/1/oom_score_adj"); got != "900" {
		t.Errorf("oom_score_adj %s", got)
	}
	memory := "memory.limit_in_bytes"
	if h.cgroup2() {
		memory = "memory.max"
	}
	if got := read(memory); got != "52428800" {
		t.Errorf("memory limit %s", got)
	}
	if err := h.UpdateContainerResources(h.ctx, id, &runtimeapi.ContainerResources{Linux: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 80 << 20}}); err != nil {
		t.Fatal(err)
	}
	if got := read(memory); got != "83886080" {
		t.Errorf("memory limit after the update %s", got)
	}
	res := h.status(id).Resources.Linux
	if res.MemoryLimitInBytes != 80<<20 || res.CpuShares != 256 {
		t.Errorf("status says %v", res)
	}
	stats, err := h.ContainerStats(h.ctx, id)
	if err != nil || stats.Memory.WorkingSetBytes.Value == 0 || stats.Memory.AvailableBytes.Value == 0 || stats.Cpu.UsageCoreNanoSeconds.Value == 0 {
		t.Errorf("stats %v %v", stats, err)
	}
	pods, err := h.ListPodSandboxStats(h.ctx, nil)
	if err != nil || len(pods) != 1 || len(pods[0].Linux.Containers) != 1 || pods[0].Linux.Memory.UsageBytes.Value == 0 {
		t.Errorf("pod stats %v %v", pods, err)
	}
	if pods[0].Linux.Process.ProcessCount.Value != 1 {
		t.Errorf("processes %v", pods[0].Linux.Process)
	}
	if m, err := h.ListPodSandboxMetrics(h.ctx); err != nil || len(m) != 1 || len(m[0].ContainerMetrics) != 1 {
		t.Errorf("metrics %v %v", m, err)
	}
}
