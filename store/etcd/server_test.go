package etcd_test

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// server is an etcd process of one member, in one data directory, that can be killed and started again.
type server struct {
	t    testing.TB
	dir  string
	args []string

	cmd    *exec.Cmd
	stdin  io.Closer
	stdout io.Reader
	stderr strings.Builder
	url    string
}

// binary builds the server once per test run; go's own cache makes that quick when nothing changed.
var binary = sync.OnceValues(func() (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "knarr-test")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return "", err
	}
	out := filepath.Join(dir, "etcdserver")
	cmd := exec.Command("go", "build", "-trimpath", "-o", out, ".")
	cmd.Dir = filepath.Join("..", "..", "test", "etcdserver")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the etcd server: %w\n%s", err, msg)
	}
	return out, nil
})

// newServer starts an empty etcd; it is gone when the test ends.
func newServer(t testing.TB, args ...string) *server {
	t.Helper()
	s := &server{t: t, dir: t.TempDir(), args: args}
	s.start(freshAddress())
	t.Cleanup(s.kill)
	return s
}

// freshAddress is a loopback address that nobody else uses, so that who lost a server never finds another one there.
func freshAddress() string {
	return fmt.Sprintf("127.%d.%d.%d:0", 1+rand.IntN(254), rand.IntN(256), 1+rand.IntN(254))
}

// address is where the server listens, without scheme.
func (s *server) address() string { return s.url[strings.Index(s.url, "://")+3:] }

func (s *server) start(address string) {
	s.t.Helper()
	s.launch(address)
	s.awaitReady()
}

// launch starts the process; awaitReady waits until it answers.
func (s *server) launch(address string) {
	s.t.Helper()
	path, err := binary()
	require.NoError(s.t, err)
	cmd := exec.Command(path, append([]string{"-data-dir", s.dir, "-listen", address}, s.args...)...)
	stdin, err := cmd.StdinPipe() // its end ends the server, also when the test dies
	require.NoError(s.t, err)
	s.stdout, err = cmd.StdoutPipe()
	require.NoError(s.t, err)
	s.stderr.Reset()
	cmd.Stderr = &s.stderr
	require.NoError(s.t, cmd.Start())
	s.cmd, s.stdin = cmd, stdin
}

func (s *server) awaitReady() {
	s.t.Helper()
	line, err := bufio.NewReader(s.stdout).ReadString('\n')
	if err != nil {
		s.kill()
		s.t.Fatalf("etcd did not start: %v\n%s", err, s.stderr.String())
	}
	s.url = strings.TrimSpace(line)
}

// kill ends the process at once, with signal 9.
func (s *server) kill() {
	if s.cmd == nil {
		return
	}
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait() // killed
	_ = s.stdin.Close()
	s.cmd = nil
}
