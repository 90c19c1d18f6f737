package runtime_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	remote "k8s.io/cri-client/pkg"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"
)

func TestExecSync(t *testing.T) {
	h := newHost(t)
	id := h.pod().run("exec sleep 1000")
	out, errOut, err := h.ExecSync(h.ctx, id, []string{"sh", "-c", "echo o; echo e >&2; exit 5"}, 0)
	var exit utilexec.CodeExitError
	if !errors.As(err, &exit) || exit.Code != 5 || string(out) != "o\n" || string(errOut) != "e\n" {
		t.Errorf("%q %q %v", out, errOut, err)
	}
	begin := time.Now()
	_, _, err = h.ExecSync(h.ctx, id, []string{"sleep", "1000"}, time.Second)
	if !errors.Is(err, remote.ErrCommandTimedOut) || time.Since(begin) > 8*time.Second {
		t.Errorf("timeout: %v after %v", err, time.Since(begin))
	}
	if _, _, err := h.ExecSync(h.ctx, id, []string{"nothing"}, 0); err == nil || !strings.Contains(err.Error(), "nothing") {
		t.Errorf("missing command: %v", err)
	}
	// A process that stays behind does not hold the call.
	begin = time.Now()
	if got := h.exec(id, "sh", "-c", "sleep 100 & echo done"); got != "done" {
		t.Errorf("output %q", got)
	}
	if d := time.Since(begin); d > 8*time.Second {
		t.Errorf("took %v", d)
	}
}

func TestExecStream(t *testing.T) {
	h := newHost(t)
	id := h.pod().run("exec sleep 1000")
	big := strings.Repeat("0123456789abcdef", 1<<16)
	var out bytes.Buffer
	if err := h.Streams().Exec(h.ctx, id, []string{"cat"}, strings.NewReader(big), nopCloser{&out}, nil, false, nil); err != nil {
		t.Fatal(err)
	}
	if out.String() != big {
		t.Errorf("%d bytes of %d came back", out.Len(), len(big))
	}
	// A client that is slower than the grace for left-behind processes loses nothing.
	slow := &slowWriter{pause: 1500 * time.Millisecond}
	if err := h.Streams().Exec(h.ctx, id, []string{"head", "-c", "90000", "/dev/zero"}, nil, slow, nil, false, nil); err != nil {
		t.Fatal(err)
	}
	if slow.n != 90000 {
		t.Errorf("a slow client got %d bytes", slow.n)
	}
	in, typed := io.Pipe()
	defer in.Close()
	shown, screen := io.Pipe()
	resize := make(chan remotecommand.TerminalSize, 1)
	done := make(chan error, 1)
	go func() {
		done <- h.Streams().Exec(h.ctx, id, []string{"sh", "-c", "read a; stty size; exit 3"}, in, screen, nil, true, resize)
		_ = screen.Close()
	}()
	resize <- remotecommand.TerminalSize{Width: 101, Height: 42}
	for len(resize) > 0 {
		time.Sleep(time.Millisecond)
	}
	if _, err := io.WriteString(typed, "go\n"); err != nil {
		t.Fatal(err)
	}
	text, _ := io.ReadAll(shown)
	if !strings.Contains(string(text), "42 101") {
		t.Errorf("screen %q", text)
	}
	var exit utilexec.CodeExitError
	if err := <-done; !errors.As(err, &exit) || exit.Code != 3 {
		t.Errorf("end: %v", err)
	}
}

func TestAttachStream(t *testing.T) {
	h := newHost(t)
	p := h.pod()
	once := p.run("cat; echo eof; echo oops >&2", func(c *runtimeapi.ContainerConfig) { c.Stdin, c.StdinOnce = true, true })
	var out, errOut bytes.Buffer
	if err := h.AttachStream(h.ctx, once, strings.NewReader("hi\n"), nopCloser{&out}, nopCloser{&errOut}, false, nil); err != nil {
		t.Fatal(err)
	}
	if out.String() != "hi\neof\n" || errOut.String() != "oops\n" {
		t.Errorf("stdout %q stderr %q", out.String(), errOut.String())
	}
	tty := p.run("while read a; do echo got $a; done", func(c *runtimeapi.ContainerConfig) { c.Stdin, c.Tty = true, true })
	in, typed := io.Pipe()
	defer in.Close()
	shown, screen := io.Pipe()
	ctx, cancel := context.WithCancel(h.ctx)
	done := make(chan error, 1)
	go func() { done <- h.AttachStream(ctx, tty, in, screen, nil, true, nil) }()
	go func() { _, _ = io.WriteString(typed, "one\n") }()
	seen := make([]byte, 0, 64)
	buf := make([]byte, 64)
	for !strings.Contains(string(seen), "got one") {
		n, err := shown.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		seen = append(seen, buf[:n]...)
	}
	cancel()
	if err := <-done; err == nil {
		t.Error("the end of the context is no error")
	}
	if st := h.status(tty); st.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("after detaching: %v", st.State)
	}
}

func TestPortForward(t *testing.T) {
	h := newHost(t)
	p := h.pod()
	id := p.run("exec nc -ll -p 8080 -e cat")
	for range 200 { // until it listens
		if _, _, err := h.ExecSync(h.ctx, id, []string{"grep", "-q", ":1F90", "/proc/net/tcp", "/proc/net/tcp6"}, 0); err == nil {
			break
		}
	}
	ours, theirs := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- h.PortForwardStream(h.ctx, p.id, 8080, theirs) }()
	if _, err := io.WriteString(ours, "ping"); err != nil {
		t.Fatal(err, <-done, h.logOf(id))
	}
	got := make([]byte, 4)
	if _, err := io.ReadFull(ours, got); err != nil || string(got) != "ping" {
		t.Errorf("answer %q %v", got, err)
	}
	_ = ours.Close()
	if err := <-done; err != nil {
		t.Errorf("end: %v", err)
	}
	_, theirs = net.Pipe()
	if err := h.PortForwardStream(h.ctx, p.id, 9, theirs); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("closed port: %v", err)
	}
}

// slowWriter takes its time for each piece.
type slowWriter struct {
	pause time.Duration
	n     int
}

func (w *slowWriter) Write(p []byte) (int, error) {
	time.Sleep(w.pause)
	w.n += len(p)
	return len(p), nil
}

func (w *slowWriter) Close() error { return nil }
