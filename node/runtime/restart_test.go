package runtime_test

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"knarr/node/runtime"
)

// TestAgentRestart: a second runtime on the same state knows everything, and
// what ended in between is told as an event.
func TestAgentRestart(t *testing.T) {
	h := newHost(t)
	p := h.pod()
	running := p.run("exec sleep 1000")
	created := p.create("exit 1")
	ends := p.run("read a; exit 7", func(c *runtimeapi.ContainerConfig) { c.Stdin, c.StdinOnce = true, true })
	ended := p.run("exit 2")
	h.ended(ended)
	pid, before := h.pid(running), h.status(running)
	endsPID := h.pid(ends)
	shim, err := h.ShimPID(h.ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Close(h.ctx); err != nil {
		t.Fatal(err)
	}
	var n int
	if _, err := fmt.Sscan(endsPID, &n); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(n, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	h.awaitGone(n)
	h.open()
	if again, err := h.ShimPID(h.ctx); err != nil || again != shim {
		t.Errorf("shim %d, then %d (%v)", shim, again, err)
	}
	if got := h.pid(running); got != pid {
		t.Errorf("process %s, then %s", pid, got)
	}
	if after := h.status(running); after.String() != before.String() {
		t.Errorf("status\n%v\nthen\n%v", before, after)
	}
	if st := h.status(created); st.State != runtimeapi.ContainerState_CONTAINER_CREATED {
		t.Errorf("created: %v", st)
	}
	if st := h.status(ended); st.ExitCode != 2 {
		t.Errorf("ended: %v", st)
	}
	events := make(chan *runtimeapi.ContainerEventResponse)
	ctx, cancel := context.WithTimeout(h.ctx, 10*time.Second)
	defer cancel()
	go func() { _ = h.GetContainerEvents(ctx, events, nil) }()
	for {
		select {
		case e := <-events:
			if e.ContainerId == ended {
				t.Errorf("an end is told twice: %v", e)
			}
			if e.ContainerId != ends || e.ContainerEventType != runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT {
				continue
			}
			if len(e.ContainersStatuses) != 4 || e.PodSandboxStatus.GetId() != p.id {
				t.Errorf("event %v", e)
			}
		case <-ctx.Done():
			t.Fatal("the end in between is not told")
		}
		break
	}
	if st := h.status(ends); st.ExitCode != 137 {
		t.Errorf("ended in between: %v", st)
	}
	if got := h.exec(running, "echo", "alive"); got != "alive" {
		t.Errorf("exec %q", got)
	}
	if list, err := h.ListContainers(h.ctx, &runtimeapi.ContainerFilter{PodSandboxId: p.id}); err != nil || len(list) != 4 {
		t.Errorf("list %v %v", list, err)
	}
}

// TestShimKilled: the runtime starts another shim by itself and goes on.
func TestShimKilled(t *testing.T) {
	h := newHost(t)
	p := h.pod()
	id := p.run("echo a; read x; echo b-$x; exec sleep 1000", func(c *runtimeapi.ContainerConfig) { c.Stdin, c.Tty = true, true })
	h.awaitLog(id, "a\r\n")
	pid := h.pid(id)
	old, err := h.ShimPID(h.ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(old, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	h.awaitGone(old)
	if got := h.exec(id, "echo", "alive"); got != "alive" {
		t.Errorf("exec %q", got)
	}
	if now, err := h.ShimPID(h.ctx); err != nil || now == old {
		t.Errorf("shim %d (%v)", now, err)
	}
	if got := h.pid(id); got != pid {
		t.Errorf("process %s, then %s", pid, got)
	}
	other := p.run("exit 4")
	if st := h.ended(other); st.ExitCode != 4 {
		t.Errorf("started after the crash: %v", st)
	}
	// The terminal survived.
	in, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if _, err := out.WriteString("x\n"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(h.ctx)
	done := make(chan error, 1)
	go func() { done <- h.AttachStream(ctx, id, in, nil, nil, true, nil) }()
	h.awaitLog(id, "a\r\nx\r\nb-x\r\n")
	_ = out.Close()
	cancel()
	<-done
	if err := h.StopContainer(h.ctx, id, 0); err != nil {
		t.Fatal(err)
	}
	if st := h.status(id); st.ExitCode != 137 {
		t.Errorf("end %v", st)
	}
}

// TestHalfMade: what a crash leaves of sandboxes and containers is removed.
func TestHalfMade(t *testing.T) {
	h := newHost(t)
	p := h.pod()
	id := p.create("exit 1")
	if err := h.Close(h.ctx); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{h.state + "/containers/" + id + "/container.json", h.state + "/pods/" + p.id + "/sandbox.json"} {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	h.open()
	if list, err := h.ListContainers(h.ctx, nil); err != nil || len(list) != 0 {
		t.Errorf("containers %v %v", list, err)
	}
	if list, err := h.ListPodSandbox(h.ctx, nil); err != nil || len(list) != 0 {
		t.Errorf("sandboxes %v %v", list, err)
	}
	h.checkLeftovers() // the cgroup of the test was never made
}

// testNetwork notes what it is asked.
type testNetwork struct {
	mu   sync.Mutex
	up   map[string]string
	fail error
}

func (n *testNetwork) SetUp(_ context.Context, req runtime.NetworkRequest) (runtime.NetworkStatus, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.fail != nil {
		return runtime.NetworkStatus{}, n.fail
	}
	if _, err := os.Stat(req.NetnsPath); err != nil {
		return runtime.NetworkStatus{}, err
	}
	n.up[req.SandboxID] = req.Namespace + "/" + req.Name
	return runtime.NetworkStatus{IPs: []netip.Addr{netip.MustParseAddr("10.42.0.9"), netip.MustParseAddr("fd00::9")}}, nil
}

func (n *testNetwork) TearDown(_ context.Context, req runtime.NetworkRequest) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.up, req.SandboxID)
	return nil
}

func TestNetwork(t *testing.T) {
	network := &testNetwork{up: map[string]string{}}
	h := newHost(t, func(o *runtime.Options) { o.Network = network })
	p := h.pod()
	check := func() {
		t.Helper()
		resp, err := h.PodSandboxStatus(h.ctx, p.id, false)
		if err != nil {
			t.Fatal(err)
		}
		st := resp.Status
		if st.Network.Ip != "10.42.0.9" || len(st.Network.AdditionalIps) != 1 || st.Network.AdditionalIps[0].Ip != "fd00::9" || st.State != runtimeapi.PodSandboxState_SANDBOX_READY {
			t.Errorf("status %v", st)
		}
	}
	check()
	if network.up[p.id] != "default/web" {
		t.Errorf("network %v", network.up)
	}
	if err := h.Close(h.ctx); err != nil {
		t.Fatal(err)
	}
	h.open()
	check()
	if err := h.StopPodSandbox(h.ctx, p.id); err != nil {
		t.Fatal(err)
	}
	if len(network.up) != 0 {
		t.Errorf("network %v", network.up)
	}
	if list, err := h.ListPodSandbox(h.ctx, nil); err != nil || list[0].State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("list %v %v", list, err)
	}
	network.fail = fmt.Errorf("no address is free")
	if _, err := h.RunPodSandbox(h.ctx, p.config, ""); err == nil {
		t.Error("a sandbox without its network")
	}
}

// TestSixtyAtOnce starts sixty containers in parallel.
func TestSixtyAtOnce(t *testing.T) {
	h := newHost(t)
	const many = 60
	p := h.pod()
	var wg sync.WaitGroup
	begin := time.Now()
	ids := make([]string, many)
	for i := range many {
		wg.Add(1)
		go func() {
			defer wg.Done()
			ids[i] = p.run(fmt.Sprintf("exit %d", i))
		}()
	}
	wg.Wait()
	t.Logf("%d containers started in %v", many, time.Since(begin))
	for i, id := range ids {
		if st := h.ended(id); int(st.ExitCode) != i {
			t.Errorf("container %d: %v", i, st)
		}
	}
}

// TestPurge: with the agent gone and the shim killed, everything goes.
func TestPurge(t *testing.T) {
	for _, killShim := range []bool{false, true} {
		t.Run(fmt.Sprintf("shim killed %v", killShim), func(t *testing.T) {
			h := newHost(t)
			p := h.pod(func(c *runtimeapi.PodSandboxConfig) {
				c.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_POD}
			})
			id := p.run("exec sleep 1000")
			var pid int
			if _, err := fmt.Sscan(h.pid(id), &pid); err != nil {
				t.Fatal(err)
			}
			shim, err := h.ShimPID(h.ctx)
			if err != nil {
				t.Fatal(err)
			}
			if err := h.Close(h.ctx); err != nil {
				t.Fatal(err)
			}
			if killShim {
				if err := unix.Kill(shim, unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
			}
			if err := runtime.Purge(h.ctx, h.state, h.cgroup); err != nil {
				t.Fatal(err)
			}
			h.awaitGone(shim)
			h.awaitGone(pid)
			for _, left := range []string{"pods", "containers", "shim"} {
				if _, err := os.Stat(h.state + "/" + left); !os.IsNotExist(err) {
					t.Errorf("%s: %v", left, err)
				}
			}
			if err := runtime.Purge(h.ctx, h.state, h.cgroup); err != nil {
				t.Errorf("again: %v", err)
			}
			h.images.live = map[string]bool{}
			h.open() // an empty state works as before
		})
	}
}
