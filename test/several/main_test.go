package several

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"knarr/internal/rig"
)

const (
	// patience bounds every wait.
	patience = 90 * time.Second
	// etcdEnv tells the process that it is inside the machine; its value is the etcd program.
	etcdEnv = "KNARR_SEVERAL_ETCD"
)

// addresses are where the servers are reached, on the loopback link of the tests' own network namespace.
var addresses = []string{"198.51.100.1", "198.51.100.2"}

// TestMain runs the tests in a network of their own and with a /run/knarr of their own.
func TestMain(m *testing.M) {
	if os.Getenv(etcdEnv) != "" {
		if err := makeMachine(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	if err := outside(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func outside() error {
	dir, err := os.MkdirTemp("", "several")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	etcd := filepath.Join(dir, "etcd")
	if err := rig.BuildEtcd(context.Background(), filepath.Join("..", "etcdserver"), etcd); err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), etcdEnv+"="+etcd)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	return cmd.Run()
}

func makeMachine() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	errs := []error{netlink.LinkSetUp(lo)}
	for _, a := range addresses {
		addr, err := netlink.ParseAddr(a + "/32")
		errs = append(errs, err, netlink.AddrAdd(lo, addr))
	}
	errs = append(errs, os.MkdirAll("/run/knarr", 0o755), unix.Mount("tmpfs", "/run/knarr", "tmpfs", 0, "mode=0755"))
	return errors.Join(errs...)
}

// etcd is one member, which ends with the test.
type etcd struct {
	*rig.Etcd
	data string
}

func startEtcd(t *testing.T) *etcd {
	t.Helper()
	e := &etcd{data: t.TempDir()}
	e.serve(t, "127.0.0.1:0")
	t.Cleanup(func() { _ = e.Stop() }) // a test may have killed it
	return e
}

func (e *etcd) serve(t *testing.T, listen string) {
	t.Helper()
	var err error
	e.Etcd, err = rig.StartEtcd(os.Getenv(etcdEnv), e.data, listen)
	require.NoError(t, err)
}

// server is one knarr server, and an administrator's client of it.
type server struct {
	*kubernetes.Clientset
	config *rest.Config
	dir    string // of the cluster, as this server has it
	cmd    *exec.Cmd
	log    string
	exited chan struct{}
}

// knarr is the program.
func knarr(t *testing.T) string {
	t.Helper()
	path := filepath.Join(rig.Bin("../../bin"), "knarr")
	require.FileExists(t, path, "`make test` builds it")
	return path
}

// newServer describes server number i of a cluster on an etcd; several share nothing on the disk.
func newServer(t *testing.T, e *etcd, i int, args ...string) *server {
	t.Helper()
	root, name := t.TempDir(), fmt.Sprintf("s%d", i)
	s := &server{dir: filepath.Join(root, name), log: filepath.Join(root, "log")}
	s.cmd = exec.Command(knarr(t), append([]string{"server", "--no-agent", "--name", name, "--data-dir", root, "--bind-address", addresses[i],
		"--advertise-address", addresses[i], "--port", "6443"}, args...)...)
	if e != nil {
		s.cmd.Args = append(s.cmd.Args, "--datastore-endpoint", e.URL)
	}
	return s
}

// start starts the server, and returns when it is ready.
func (s *server) start(t *testing.T, env ...string) {
	t.Helper()
	args := s.cmd.Args
	s.cmd = exec.Command(args[0], args[1:]...)
	log, err := os.OpenFile(s.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	require.NoError(t, err)
	s.cmd.Stdout, s.cmd.Stderr = log, log
	ready, say, err := os.Pipe()
	require.NoError(t, err)
	s.cmd.ExtraFiles = []*os.File{say}
	s.cmd.Env = append(append(os.Environ(), "KNARR_READY_FD=3"), env...)
	require.NoError(t, s.cmd.Start())
	require.NoError(t, errors.Join(say.Close(), log.Close()))
	s.exited = make(chan struct{})
	cmd, exited := s.cmd, s.exited
	go func() { _ = cmd.Wait(); close(exited) }()
	t.Cleanup(func() { s.end(t) })
	line, _ := bufio.NewReader(ready).ReadString('\n')
	require.Equal(t, "READY\n", line, "the server did not start")
	s.config, err = clientcmd.BuildConfigFromFlags("", filepath.Join(s.dir, "admin.kubeconfig"))
	require.NoError(t, err)
	s.config.QPS = -1
	s.Clientset = kubernetes.NewForConfigOrDie(s.config)
}

// end stops the server. Of a test that failed it says what the server logged and, where KNARR_SEVERAL_LOGS names a directory, leaves there the whole
// of it, with what each goroutine did in the end.
func (s *server) end(t *testing.T) {
	if !t.Failed() {
		s.stop(unix.SIGTERM)
		return
	}
	data, _ := os.ReadFile(s.log)
	t.Logf("%s:\n%s", s.dir, data[max(0, len(data)-6000):])
	s.stop(unix.SIGQUIT)
	if dir := os.Getenv("KNARR_SEVERAL_LOGS"); dir != "" {
		data, _ = os.ReadFile(s.log)
		_ = os.WriteFile(filepath.Join(dir, fmt.Sprintf("%s-%d.log", filepath.Base(s.dir), s.cmd.Process.Pid)), data, 0o600)
	}
}

// fails runs the server, which must end by itself, and gives what it said.
func (s *server) fails(t *testing.T, env ...string) string {
	t.Helper()
	cmd := exec.Command(s.cmd.Args[0], s.cmd.Args[1:]...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	require.Error(t, err)
	return string(out)
}

// stop sends a signal and waits for the end.
func (s *server) stop(signal os.Signal) {
	_ = s.cmd.Process.Signal(signal) // it may have ended
	<-s.exited
}

// eventually asks until answer holds, and fails with what it said last.
func eventually(t *testing.T, what string, answer func() (bool, string)) {
	t.Helper()
	begin := time.Now()
	for {
		ok, said := answer()
		if ok {
			t.Logf("%s: after %v", what, time.Since(begin).Round(time.Millisecond))
			return
		}
		if time.Since(begin) > patience {
			t.Fatalf("%s: not within %v; last: %s", what, patience, said)
		}
		time.Sleep(50 * time.Millisecond)
	}
}
