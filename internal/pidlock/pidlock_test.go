package pidlock

import (
	"bufio"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// holderEnv makes the test binary hold the lock it names until its input ends.
const holderEnv = "PIDLOCK_TEST_HOLD"

func TestMain(m *testing.M) {
	path := os.Getenv(holderEnv)
	if path == "" {
		os.Exit(m.Run())
	}
	if _, err := Take(path); err != nil {
		os.Stdout.WriteString(err.Error() + "\n")
		os.Exit(1)
	}
	os.Stdout.WriteString("held\n")
	_, _ = io.Copy(io.Discard, os.Stdin)
}

// holder starts a process that takes the lock; end ends it by closing its input.
func holder(t *testing.T, path string) (cmd *exec.Cmd, end func()) {
	t.Helper()
	cmd = exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), holderEnv+"="+path)
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { in.Close(); cmd.Wait() })
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	require.Equal(t, "held\n", line)
	return cmd, func() { in.Close() }
}

func requireOwner(t *testing.T, want int, path string) {
	t.Helper()
	pid, err := Owner(path)
	require.NoError(t, err)
	require.Equal(t, want, pid)
}

// TestLockNamesItsHolder: whose the lock is follows the process, not what the file holds.
func TestLockNamesItsHolder(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.lock")
	requireOwner(t, 0, path)
	require.NoError(t, os.WriteFile(path, []byte("1\n"), 0o600))
	requireOwner(t, 0, path)

	cmd, _ := holder(t, path)
	requireOwner(t, cmd.Process.Pid, path)
	_, err := Take(path)
	require.ErrorIs(t, err, ErrLocked)
	_, err = TakeWithin(path, time.Millisecond)
	require.ErrorIs(t, err, ErrLocked)
	requireOwner(t, cmd.Process.Pid, path)
	require.NoError(t, cmd.Process.Kill())
	_, _ = cmd.Process.Wait()
	requireOwner(t, 0, path)
}

// TestOwnLock: asking for one's own lock does not lose it.
func TestOwnLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.lock")
	l, err := Take(path)
	require.NoError(t, err)
	requireOwner(t, os.Getpid(), path)
	_, err = Take(path)
	require.ErrorIs(t, err, ErrLocked)
	other := exec.Command(os.Args[0])
	other.Env = append(os.Environ(), holderEnv+"="+path)
	out, err := other.Output()
	require.Error(t, err, "held still")
	require.Contains(t, string(out), ErrLocked.Error())

	l.Release()
	requireOwner(t, 0, path)
	require.FileExists(t, path)
	l, err = Take(path)
	require.NoError(t, err)
	l.Remove()
	require.NoFileExists(t, path)
}

// TestTakeWithin: who waits gets the lock when its holder ends.
func TestTakeWithin(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.lock")
	_, end := holder(t, path)
	time.AfterFunc(50*time.Millisecond, end)
	l, err := TakeWithin(path, 30*time.Second)
	require.NoError(t, err)
	requireOwner(t, os.Getpid(), path)
	l.Release()
}

// TestNotWritable: a lock that cannot be is an error, not an owner.
func TestNotWritable(t *testing.T) {
	_, err := Take(filepath.Join(t.TempDir(), "none", "x.lock"))
	require.ErrorIs(t, err, os.ErrNotExist)
}
