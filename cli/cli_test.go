package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// noSystem stands for the parts in tests of command lines that end before any part starts.
type noSystem struct{}

func (noSystem) RunServer(_ context.Context, c ServerConfig) error {
	return fmt.Errorf("server of %s on port %d was reached", c.Name, c.Port)
}

func (noSystem) RunAgent(_ context.Context, c AgentConfig) error {
	return fmt.Errorf("agent %s for %s was reached", c.NodeName, c.Server)
}

// TestMain runs the tests in a network namespace of their own, where no other cluster runs.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) != "knarr" && os.Getenv("KNARR_CLI_TEST") == "" {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), "KNARR_CLI_TEST=inside")
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
		if err := cmd.Run(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	testscript.Main(m, map[string]func(){
		"knarr": func() { os.Exit(Execute(context.Background(), os.Args[1:], noSystem{})) },
	})
}

func TestScripts(t *testing.T) {
	l, err := net.Listen("tcp", "0.0.0.0:0")
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			e.Setenv("BUSYPORT", strconv.Itoa(l.Addr().(*net.TCPAddr).Port))
			shim := filepath.Join(e.WorkDir, "shim")
			if err := os.MkdirAll(shim, 0o755); err != nil {
				return err
			}
			e.Setenv("PATH", e.Getenv("PATH")+":"+shim)
			return os.WriteFile(filepath.Join(shim, "knarr-shim"), []byte("#!/bin/sh\n"), 0o755)
		},
	})
}

func TestStopProcesses(t *testing.T) {
	start := func(name string, args ...string) *exec.Cmd {
		cmd := exec.Command(name, args...)
		out, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		if name != "sleep" {
			_, err = out.Read(make([]byte, 8))
			require.NoError(t, err)
		}
		return cmd
	}
	polite, stubborn := start("sleep", "100"), start("sh", "-c", "trap '' TERM; trap 'true' TERM; echo up; while :; do sleep 100; done")
	begin := time.Now()
	require.NoError(t, stopProcesses(t.Context(), []int{polite.Process.Pid, stubborn.Process.Pid, 1 << 22}, 200*time.Millisecond))
	require.Less(t, time.Since(begin), 5*time.Second)
	for _, c := range []*exec.Cmd{polite, stubborn} {
		var exit *exec.ExitError
		require.True(t, errors.As(c.Wait(), &exit))
	}
}

func TestUnmountBelow(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{"a b", "a b/c"} {
		require.NoError(t, os.MkdirAll(filepath.Join(dir, d), 0o700))
		require.NoError(t, unix.Mount("tmpfs", filepath.Join(dir, d), "tmpfs", 0, ""))
		require.NoError(t, os.MkdirAll(filepath.Join(dir, "a b", "c"), 0o700))
	}
	found, err := mountsBelow(dir)
	require.NoError(t, err)
	require.Len(t, found, 2)
	c := &cluster{name: "x", dir: dir}
	require.ErrorContains(t, c.removeData(), "still mounted")
	require.NoError(t, unmountBelow(dir))
	found, err = mountsBelow(dir)
	require.NoError(t, err)
	require.Empty(t, found)
	require.NoError(t, unmountBelow(filepath.Join(dir, "gone")))
}

func TestCgroupsGoWithTheirProcesses(t *testing.T) {
	c := &cluster{name: fmt.Sprintf("test-%d", time.Now().UnixNano())}
	var made []string
	mounts, err := readMounts()
	require.NoError(t, err)
	for _, m := range mounts {
		if m.kind == "cgroup" && strings.Contains(m.point, "pids") || m.kind == "cgroup2" {
			dir := filepath.Join(m.point, "knarr-"+c.name, "node", "pod1")
			require.NoError(t, os.MkdirAll(dir, 0o755))
			made = append(made, dir)
		}
	}
	require.NotEmpty(t, made)
	t.Cleanup(func() { removeCgroups(context.Background(), c.cgroups()) })
	cmd := exec.Command("sleep", "100")
	require.NoError(t, cmd.Start())
	go cmd.Wait()
	for _, dir := range made {
		require.NoError(t, os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0o644))
	}
	require.NoError(t, c.stopContainers(t.Context(), time.Second))
	require.NoError(t, removeCgroups(t.Context(), c.cgroups()))
	require.Empty(t, c.cgroups())
}

func TestTailAndRotation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	require.NoError(t, os.WriteFile(path, []byte("old\nnew one\nnew two\n"), 0o600))
	require.Equal(t, "new one\nnew two", tail(path, 4))
	require.NoError(t, os.WriteFile(path, []byte(strings.Repeat("line\n", 10000)), 0o600))
	require.Equal(t, tailLines, strings.Count(tail(path, 0), "line"))
	require.Empty(t, tail(path+"none", 0))
	f, err := rotate(path)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	require.FileExists(t, path+".1")
	_, err = os.Stat(path)
	require.NotErrorIs(t, err, fs.ErrNotExist)
}

func TestNodeNames(t *testing.T) {
	require.Equal(t, "knarr-0", NodeName("default", 0))
	require.Equal(t, "blue-2", NodeName("blue", 2))
	dir := t.TempDir()
	for _, n := range []string{"blue-10", "blue-2", "blue-0", "not ours"} {
		require.NoError(t, os.MkdirAll(NodeDir(dir, n), 0o700))
	}
	names, err := (&cluster{dir: dir}).nodeNames()
	require.NoError(t, err)
	require.Equal(t, []string{"blue-0", "blue-2", "blue-10"}, names)
}

func TestProgressSaysOnlyWhatTakesLong(t *testing.T) {
	var out strings.Builder
	p := newProgress(&out)
	p.now("quick")
	p.now("slow")
	p.say() // what the timer does
	p.done()
	require.Contains(t, out.String(), "slow ...")
	require.NotContains(t, out.String(), "quick")
}

func TestFlagsOfTheAPIAreRememberedAndReplaced(t *testing.T) {
	var given []string
	c := &cobra.Command{}
	passedOn(c, &given)
	require.NoError(t, c.Flags().Parse([]string{"--audit-policy-file", "p.yaml", "--audit-log-path=-", "--anonymous-auth=false",
		"--authorization-mode", "Node,RBAC", "--oidc-required-claim", "a=b,c", "--oidc-required-claim", "d=e"}))
	here, err := os.Getwd()
	require.NoError(t, err)
	require.Equal(t, []string{"--audit-policy-file=" + filepath.Join(here, "p.yaml"), "--audit-log-path=-", "--anonymous-auth=false",
		"--authorization-mode=Node,RBAC", "--oidc-required-claim=a=b,c", "--oidc-required-claim=d=e"}, given)
	require.Equal(t, []string{"--audit-policy-file=/p", "--x=3"}, mergeArgs([]string{"--x=1", "--audit-policy-file=/p", "--x=2"}, []string{"--x=3"}))
	require.Error(t, checkArgs(given), "p.yaml does not exist")
	require.NoError(t, checkArgs([]string{"--anonymous-auth=false"}))
}
