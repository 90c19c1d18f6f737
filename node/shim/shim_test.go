package shim_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"sync"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"strings"
	"testing"
	"time"

	"knarr/node/shim"
)

func TestRunAndExit(t *testing.T) {
	n := newNode(t)
	id, log, _ := n.run("echo out; echo err >&2; printf unfinished; exit 7")
	st := n.wait(id)
	if st.State != shim.StateExited || st.ExitCode != 7 || st.Signal != 0 || st.OOMKilled {
		t.Fatalf("status %+v", st)
	}
	if st.StartedAt.IsZero() || st.FinishedAt.Before(st.StartedAt) {
		t.Errorf("times %v %v", st.StartedAt, st.FinishedAt)
	}
	text := readLog(t, log)
	if got := content(text, "stdout"); got != "out\nunfinished" {
		t.Errorf("stdout %q of log %q", got, text)
	}
	if got := content(text, "stderr"); got != "err\n" {
		t.Errorf("stderr %q", got)
	}
	first := strings.SplitN(text, " ", 2)[0]
	if at, err := time.Parse(time.RFC3339Nano, first); err != nil || time.Since(at) > time.Minute {
		t.Errorf("time %q: %v", first, err)
	}
}

func TestSignalEndsWithIt(t *testing.T) {
	n := newNode(t)
	id, _, _ := n.run("exec sleep 1000")
	if err := n.client.Signal(n.ctx, id, unix.SIGKILL, false); err != nil {
		t.Fatal(err)
	}
	if st := n.wait(id); st.ExitCode != 137 || st.Signal != 9 || st.OOMKilled {
		t.Fatalf("status %+v", st)
	}
	err := n.client.Signal(n.ctx, id, unix.SIGTERM, false)
	var told *shim.Error
	if !errors.As(err, &told) || told.Code != shim.CodeState {
		t.Errorf("signal to an ended container: %v", err)
	}
}

func TestStartErrors(t *testing.T) {
	n := newNode(t)
	code := func(err error) string {
		var told *shim.Error
		if errors.As(err, &told) {
			return told.Code
		}
		return "none"
	}
	id := "ct-" + random()
	spec := n.spec(id, "")
	spec.Process.Args = []string{"/no/such/file"}
	_, _, err := n.client.Run(n.ctx, id, &shim.StartRequest{Spec: spec})
	if code(err) != shim.CodeStart || !strings.Contains(err.Error(), "/no/such/file") || !strings.Contains(err.Error(), "no such file or directory") {
		t.Errorf("missing command: %v", err)
	}
	if _, err := n.client.Status(n.ctx, id); code(err) != shim.CodeNotFound {
		t.Errorf("status of what never started: %v", err)
	}
	if _, _, err := n.client.Run(n.ctx, "../x", &shim.StartRequest{Spec: n.spec("x", "true")}); code(err) != shim.CodeInvalid {
		t.Errorf("bad id: %v", err)
	}
	running, _, _ := n.run("exec sleep 1000")
	if _, _, err := n.client.Run(n.ctx, running, &shim.StartRequest{Spec: n.spec(running, "true")}); code(err) != shim.CodeExists {
		t.Errorf("second start: %v", err)
	}
	if err := n.client.Delete(n.ctx, running, false); code(err) != shim.CodeState {
		t.Errorf("delete of a running container: %v", err)
	}
	if err := n.client.Shutdown(n.ctx, false); code(err) != shim.CodeState {
		t.Errorf("shutdown with a running container: %v", err)
	}
}

func TestOOMKill(t *testing.T) {
	n := newNode(t)
	events := n.watch()
	limit := int64(10 << 20)
	id, _, _ := n.run("exec tail /dev/zero", func(r *shim.StartRequest) {
		r.Spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit}
		r.Spec.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	})
	st := n.wait(id)
	if !st.OOMKilled || st.ExitCode != 137 {
		t.Fatalf("status %+v", st)
	}
	events.expect(shim.EventStarted, id)
	events.expect(shim.EventOOM, id)
	events.expect(shim.EventExited, id)
}

func TestLimitsAreInTheCgroup(t *testing.T) {
	n := newNode(t)
	cgroups2 := exists("/sys/fs/cgroup/cgroup.controllers")
	memory, shares, quota, period, pids := int64(64<<20), uint64(512), int64(20000), uint64(100000), int64(50)
	id, _, _ := n.run("exec sleep 1000", func(r *shim.StartRequest) {
		r.Spec.Linux.Resources = &specs.LinuxResources{
			Memory: &specs.LinuxMemory{Limit: &memory}, CPU: &specs.LinuxCPU{Shares: &shares, Quota: &quota, Period: &period},
			Pids: &specs.LinuxPids{Limit: &pids},
		}
	})
	st, err := n.client.Status(n.ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	check := func(v1dir, v1, v1want, v2, v2want string) {
		t.Helper()
		path, want := filepath.Join(st.CgroupPaths[v1dir], v1), v1want
		if root := st.CgroupPaths[""]; cgroups2 {
			path, want = filepath.Join(root, v2), v2want
		}
		data, err := os.ReadFile(path)
		if got := strings.TrimSpace(string(data)); err != nil || got != want {
			t.Errorf("%s is %q, want %q (%v)", path, got, want, err)
		}
	}
	check("memory", "memory.limit_in_bytes", "67108864", "memory.max", "67108864")
	check("cpu", "cpu.shares", "512", "cpu.weight", "59")
	check("cpu", "cpu.cfs_quota_us", "20000", "cpu.max", "20000 100000")
	check("pids", "pids.max", "50", "pids.max", "50")
	if dir := st.CgroupPaths["memory"]; dir != "" && !strings.HasSuffix(dir, n.cgroup+"/"+id) {
		t.Errorf("cgroup %s", dir)
	}
	memory, quota = 128<<20, 40000
	if err := n.client.Update(n.ctx, id, &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: &memory}, CPU: &specs.LinuxCPU{Quota: &quota},
	}); err != nil {
		t.Fatal(err)
	}
	check("memory", "memory.limit_in_bytes", "134217728", "memory.max", "134217728")
	check("cpu", "cpu.cfs_quota_us", "40000", "cpu.max", "40000 100000")
	check("cpu", "cpu.shares", "512", "cpu.weight", "59")
}

func TestLogRotationAndLongLines(t *testing.T) {
	n := newNode(t)
	id, log, _ := n.run("seq 1 20000; head -c 40000 /dev/zero | tr '\\0' x; echo; echo end", func(r *shim.StartRequest) {
		r.Log.MaxBytes, r.Log.MaxFiles = 300_000, 3
	})
	n.wait(id)
	files, err := filepath.Glob(log + "*")
	if err != nil || len(files) != 3 {
		t.Fatalf("files %v %v", files, err)
	}
	for _, f := range files {
		if info, err := os.Stat(f); err != nil || info.Size() > 300_000+64<<10 {
			t.Errorf("%s has %d bytes (%v)", f, info.Size(), err)
		}
	}
	// The oldest is gone, nothing of the rest is missing or twice.
	sort.Strings(files[1:])
	all := readLog(t, files[1]) + readLog(t, files[2]) + readLog(t, log)
	lines := strings.Split(strings.TrimSuffix(content(all, "stdout"), "\n"), "\n")
	first := atoi(t, lines[0])
	for i, line := range lines[:len(lines)-2] {
		if line != strconv.Itoa(first+i) {
			t.Fatalf("line %d is %q, want %d", i, line, first+i)
		}
	}
	if long := lines[len(lines)-2]; len(long) != 40000 || strings.Trim(long, "x") != "" {
		t.Errorf("long line has %d bytes", len(long))
	}
	if !strings.Contains(all, " stdout P xxx") {
		t.Error("no partial entry")
	}
}

func TestReopenLog(t *testing.T) {
	n := newNode(t)
	id, log, _ := n.run("read a; echo $a; read b; echo $b; exec sleep 1000", func(r *shim.StartRequest) { r.Stdin = true })
	a, err := n.client.Attach(n.ctx, id, true, true, false)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	say := func(s string) {
		t.Helper()
		if _, err := io.WriteString(a.Stdin, s+"\n"); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(s)+1)
		if _, err := io.ReadFull(a.Stdout, got); err != nil || string(got) != s+"\n" {
			t.Fatalf("attached output %q %v", got, err)
		}
	}
	say("one")
	if err := os.Rename(log, log+".moved"); err != nil {
		t.Fatal(err)
	}
	if err := n.client.ReopenLog(n.ctx, id); err != nil {
		t.Fatal(err)
	}
	say("two")
	n.remove(id)
	if got := content(readLog(t, log+".moved"), "stdout"); got != "one\n" {
		t.Errorf("old log %q", got)
	}
	if got := content(readLog(t, log), "stdout"); got != "two\n" {
		t.Errorf("new log %q", got)
	}
}

func TestExec(t *testing.T) {
	n := newNode(t)
	id, _, _ := n.run("exec sleep 1000")
	out, errOut, code := n.exec(id, "cat; echo failed >&2; exit 9", "some input")
	if out != "some input" || errOut != "failed\n" || code != 9 {
		t.Errorf("stdout %q stderr %q code %d", out, errOut, code)
	}
	_, err := n.client.Exec(n.ctx, id, &shim.ExecRequest{Args: []string{"/no/such"}}, shim.Stdio{})
	var told *shim.Error
	if !errors.As(err, &told) || told.Code != shim.CodeStart {
		t.Errorf("missing command: %v", err)
	}
	// The end of the context kills.
	ctx, cancel := context.WithCancel(n.ctx)
	p, err := n.client.Exec(ctx, id, &shim.ExecRequest{Args: []string{"sleep", "999"}}, shim.Stdio{})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := p.Wait(); !errors.Is(err, context.Canceled) {
		t.Errorf("wait: %v", err)
	}
	p.Close()
	for range 100 {
		if out, _, _ = n.exec(id, "ps | grep -c '[s]leep 999'", ""); out == "0\n" {
			return
		}
	}
	t.Errorf("the process runs on: %s", out)
}

func TestExecTTY(t *testing.T) {
	n := newNode(t)
	id, _, _ := n.run("exec sleep 1000")
	p, err := n.client.Exec(n.ctx, id, &shim.ExecRequest{
		Args: []string{"sh", "-c", "stty size; read a; stty size; echo bye-$a-$TERM; exit 4"}, TTY: true, Size: shim.Size{Width: 91, Height: 33},
	}, shim.Stdio{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	out := bufio.NewReader(p.TTY)
	expectLine(t, out, "33 91")
	if err := shim.Resize(p.TTY, shim.Size{Width: 120, Height: 50}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(p.TTY, "x\n"); err != nil {
		t.Fatal(err)
	}
	expectLine(t, out, "x") // the terminal's echo
	expectLine(t, out, "50 120")
	expectLine(t, out, "bye-x-xterm")
	if code, err := p.Wait(); err != nil || code != 4 {
		t.Errorf("code %d %v", code, err)
	}
}

func expectLine(t *testing.T, r *bufio.Reader, want string) {
	t.Helper()
	line, err := r.ReadString('\n')
	if got := strings.TrimRight(line, "\r\n"); got != want {
		t.Fatalf("line %q (%v), want %q", got, err, want)
	}
}

func TestAttachTTYAndResize(t *testing.T) {
	n := newNode(t)
	id, log, tty := n.run("read a; stty size; echo got-$a; exit 5", func(r *shim.StartRequest) { r.Spec.Process.Terminal, r.Stdin = true, true })
	defer tty.Close()
	a, err := n.client.Attach(n.ctx, id, true, true, false)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if a.TTY == nil {
		t.Fatal("no terminal")
	}
	if err := n.client.Resize(n.ctx, id, shim.Size{Width: 77, Height: 22}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(a.Stdin, "hello\n"); err != nil {
		t.Fatal(err)
	}
	out := bufio.NewReader(a.Stdout)
	expectLine(t, out, "hello")
	expectLine(t, out, "22 77")
	expectLine(t, out, "got-hello")
	if _, err := out.ReadString('\n'); !errors.Is(err, io.EOF) {
		t.Errorf("after the end: %v", err)
	}
	if st := n.wait(id); st.ExitCode != 5 {
		t.Errorf("status %+v", st)
	}
	if got := content(readLog(t, log), "stdout"); got != "hello\r\n22 77\r\ngot-hello\r\n" {
		t.Errorf("log %q", got)
	}
}

func TestStdinOnce(t *testing.T) {
	n := newNode(t)
	id, log, _ := n.run("cat; echo eof", func(r *shim.StartRequest) { r.Stdin, r.StdinOnce = true, true })
	a, err := n.client.Attach(n.ctx, id, true, true, true)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if _, err := io.WriteString(a.Stdin, "line\n"); err != nil {
		t.Fatal(err)
	}
	_ = a.Stdin.Close()
	if err := n.client.CloseStdin(n.ctx, id); err != nil {
		t.Fatal(err)
	}
	if st := n.wait(id); st.ExitCode != 0 {
		t.Errorf("status %+v", st)
	}
	if got := content(readLog(t, log), "stdout"); got != "line\neof\n" {
		t.Errorf("log %q", got)
	}
	if data, err := io.ReadAll(a.Stdout); err != nil || string(data) != "line\neof\n" {
		t.Errorf("attached %q %v", data, err)
	}
}

// TestKilledShim: containers go on, lose no output, and a new shim learns how
// they end.
func TestKilledShim(t *testing.T) {
	n := newNode(t)
	script := "read a; echo before-$a; read a; echo after-$a; exit 6"
	id, log, _ := n.run(script, func(r *shim.StartRequest) { r.Stdin = true })
	forever, _, _ := n.run("exec sleep 1000")
	gone, _, _ := n.run("exit 3")
	n.wait(gone)
	termID, termLog, tty := n.run("stty -echo; read a; echo tty-$a; exit 8", func(r *shim.StartRequest) { r.Spec.Process.Terminal, r.Stdin = true, true })
	defer tty.Close()
	a, err := n.client.Attach(n.ctx, id, true, false, false)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	before, err := n.client.Status(n.ctx, forever)
	if err != nil {
		t.Fatal(err)
	}
	n.kill()
	if _, err := io.WriteString(a.Stdin, "x\n"); err != nil { // said while no shim lives
		t.Fatal(err)
	}
	n.start()
	after, err := n.client.Status(n.ctx, forever)
	if err != nil || after.PID != before.PID || after.State != shim.StateRunning {
		t.Fatalf("before %+v after %+v %v", before, after, err)
	}
	if st := n.wait(gone); st.ExitCode != 3 {
		t.Errorf("earlier end %+v", st)
	}
	if err := n.client.KeepTTY(n.ctx, termID, tty); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(tty, "y\n"); err != nil {
		t.Fatal(err)
	}
	if st := n.wait(termID); st.ExitCode != 8 && st.Reason != shim.ReasonStatusLost {
		t.Errorf("end of the terminal's container %+v", st)
	}
	if got := content(readLog(t, termLog), "stdout"); got != "tty-y\r\n" {
		t.Errorf("terminal's log %q", got)
	}
	b, err := n.client.Attach(n.ctx, id, true, false, false)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if out, _, code := n.exec(id, "echo alive", ""); out != "alive\n" || code != 0 {
		t.Errorf("exec after re-adoption %q %d", out, code)
	}
	if _, err := io.WriteString(b.Stdin, "z\n"); err != nil {
		t.Fatal(err)
	}
	st := n.wait(id)
	if st.ExitCode != 6 && st.Reason != shim.ReasonStatusLost {
		t.Errorf("end %+v", st)
	}
	t.Logf("exit status after re-adoption: %d %q", st.ExitCode, st.Reason)
	if got := content(readLog(t, log), "stdout"); got != "before-x\nafter-z\n" {
		t.Errorf("log %q", got)
	}
}

// TestEndWithoutShim: a container that ends while no shim lives.
func TestEndWithoutShim(t *testing.T) {
	n := newNode(t)
	id, _, _ := n.run("read a; exit 6", func(r *shim.StartRequest) { r.Stdin = true })
	a, err := n.client.Attach(n.ctx, id, true, false, false)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	st, err := n.client.Status(n.ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	pidfd, err := unix.PidfdOpen(st.PID, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	n.kill()
	if _, err := io.WriteString(a.Stdin, "\n"); err != nil {
		t.Fatal(err)
	}
	if k, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 5000); k != 1 {
		t.Fatalf("the container did not end: %v", err)
	}
	n.start()
	st = n.wait(id)
	// The kernel tells the status if the process was not reaped yet when the
	// new shim came; else it is lost.
	lost := st.ExitCode == shim.LostExitCode && st.Reason == shim.ReasonStatusLost
	if !lost && st.ExitCode != 6 || st.FinishedAt.IsZero() || len(st.CgroupPaths) == 0 {
		t.Errorf("status %+v", st)
	}
}

func TestSecondShimConnects(t *testing.T) {
	n := newNode(t)
	pid := n.pid()
	n.start()
	if again := n.pid(); again != pid {
		t.Errorf("process %d, then %d", pid, again)
	}
	cmd := exec.Command(binary, "-dir", n.dir)
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "already running") {
		t.Errorf("second shim: %v %s", err, out)
	}
}

func TestClamping(t *testing.T) {
	n := newNode(t)
	id, log, _ := n.run("cat /proc/self/oom_score_adj; grep CapBnd /proc/self/status; ulimit -n")
	n.wait(id)
	lines := strings.Split(content(readLog(t, log), "stdout"), "\n")
	if len(lines) != 4 {
		t.Fatalf("lines %q", lines)
	}
	t.Logf("granted: %q", lines)
	caps, err := strconv.ParseUint(strings.TrimSpace(strings.TrimPrefix(lines[1], "CapBnd:")), 16, 64)
	if err != nil || caps&(1<<0|1<<5) != 1<<0|1<<5 || caps&^(1<<0|1<<5|1<<24) != 0 {
		t.Errorf("capabilities %x %v", caps, err)
	}
}

func TestManyAtOnce(t *testing.T) {
	n := newNode(t)
	const many = 30
	var wg sync.WaitGroup
	for i := range many {
		wg.Add(1)
		go func() {
			defer wg.Done()
			id := fmt.Sprintf("many-%d", i)
			_, _, err := n.client.Run(n.ctx, id, &shim.StartRequest{Spec: n.spec(id, fmt.Sprintf("exit %d", i))})
			if err != nil {
				t.Errorf("run %d: %v", i, err)
				return
			}
			if st, err := n.client.Wait(n.ctx, id); err != nil || st.ExitCode != i {
				t.Errorf("end of %d: %+v %v", i, st, err)
			}
		}()
	}
	wg.Wait()
}

// TestOrphansAreReaped: a process that a container without a PID namespace of
// its own leaves behind becomes the shim's child.
func TestOrphansAreReaped(t *testing.T) {
	n := newNode(t)
	id, log, _ := n.run("(sleep 0.2 & echo $!); exec sleep 1000", func(r *shim.StartRequest) {
		r.Spec.Linux.Namespaces = slices.DeleteFunc(r.Spec.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == specs.PIDNamespace })
	})
	_ = id
	var orphan int
	for range 200 {
		if text := content(readLog(t, log), "stdout"); text != "" {
			orphan = atoi(t, text)
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	pidfd, err := unix.PidfdOpen(orphan, 0)
	if err == nil {
		defer unix.Close(pidfd)
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 5000)
	}
	for range 400 {
		if !exists(fmt.Sprintf("/proc/%d", orphan)) {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Errorf("process %d stays a zombie", orphan)
}

// What containers see of their control groups is the same whether we mount the
// hierarchies of cgroup v1 or libcontainer does, which gets what is not plain.
func TestHierarchies(t *testing.T) {
	n := newNode(t)
	for _, options := range [][]string{{"nosuid", "noexec", "nodev", "relatime", "ro"}, {"nosuid", "noexec", "nodev", "relatime", "rw", "rslave"}} {
		t.Run(strings.Join(options, ","), func(t *testing.T) {
			seen := func(more ...specs.Mount) []string {
				id, log, _ := n.run("cat /proc/self/mountinfo", func(r *shim.StartRequest) {
					r.Spec.Mounts = append(r.Spec.Mounts, specs.Mount{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "ro"}},
						specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: options})
					r.Spec.Mounts = append(r.Spec.Mounts, more...)
				})
				n.wait(id)
				var out []string
				for _, line := range strings.Split(content(readLog(t, log), "stdout"), "\n") {
					f := strings.Fields(strings.ReplaceAll(line, id, "ID"))
					if len(f) > 5 && strings.HasPrefix(f[4], "/sys/fs/cgroup") {
						out = append(out, strings.Join(f[3:], " ")) // without numbers, which are each mount's own
					}
				}
				return out
			}
			ours := seen()
			theirs := seen(specs.Mount{Destination: "/sys/kernel", Type: "tmpfs", Source: "tmpfs"})
			if len(ours) == 0 || !slices.Equal(ours, theirs) {
				t.Errorf("ours:\n%s\nlibcontainer's:\n%s", strings.Join(ours, "\n"), strings.Join(theirs, "\n"))
			}
		})
	}
	if said := n.log(); strings.Contains(said, "cannot serialize") {
		t.Errorf("the shim says %s", said)
	}
}

// The slack of timers that a container's init has for itself is not the
// container's, neither now nor after a reset.
func TestTimerSlack(t *testing.T) {
	n := newNode(t)
	own, err := os.ReadFile("/proc/self/timerslack_ns")
	if err != nil {
		t.Fatal(err)
	}
	id, _, _ := n.run("exec sleep 1000")
	st, err := n.client.Status(n.ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	path := fmt.Sprintf("/proc/%d/timerslack_ns", st.PID)
	for range 2 {
		if got, err := os.ReadFile(path); err != nil || string(got) != string(own) {
			t.Errorf("slack %q, want %q (%v)", got, own, err)
		}
		if err := os.WriteFile(path, []byte("0"), 0); err != nil {
			t.Fatal(err)
		}
	}
	out, _, _ := n.exec(id, "cat /proc/self/timerslack_ns", "")
	if out != string(own) {
		t.Errorf("slack of an exec %q, want %q", out, own)
	}
}
