package test

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/rogpeppe/go-internal/testscript"
	"github.com/stretchr/testify/require"

	"knarr/internal/rig/script"
)

// expectTimeout bounds each step of an interactive session.
const expectTimeout = 30 * time.Second

// TestCourse runs the beginners' course and the bad input, each script with the kubectl that is built into knarr and with
// upstream's own program, in a namespace of its own.
func TestCourse(t *testing.T) {
	c := theCluster(t)
	config, err := c.Kubeconfig(t.Context())
	require.NoError(t, err)
	commands := script.Commands()
	commands["pty"] = scriptPTY
	for variant, program := range map[string]string{"embedded": "knarr", "upstream": "kubectl"} {
		t.Run(variant, func(t *testing.T) {
			dir := t.TempDir()
			require.NoError(t, os.Symlink(filepath.Join(programs, program), filepath.Join(dir, "kubectl")))
			testscript.Run(t, testscript.Params{
				Dir: "testdata/course",
				Setup: func(e *testscript.Env) error {
					return script.SetUp(e, dir, config)
				},
				Cmds: commands,
			})
		})
	}
}

// scriptPTY is `pty FILE PROGRAM ARGS...`: the program runs on a terminal; lines of the file that start with "> " are
// typed, those with "< " are regular expressions that its output must match next. The program must end well.
func scriptPTY(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 || neg {
		ts.Fatalf("usage: pty FILE PROGRAM ARGS...")
	}
	program := filepath.Join(strings.Split(ts.Getenv("PATH"), ":")[0], args[1])
	cmd := exec.Command(program, args[2:]...)
	cmd.Dir = ts.Getenv("WORK")
	for _, name := range []string{"PATH", "KUBECONFIG", "HOME"} {
		cmd.Env = append(cmd.Env, name+"="+ts.Getenv(name))
	}
	cmd.Env = append(cmd.Env, "TERM=xterm")
	s, err := startSession(cmd)
	ts.Check(err)
	for line := range strings.Lines(ts.ReadFile(args[0])) {
		line = strings.TrimRight(line, "\n")
		switch {
		case strings.HasPrefix(line, "> "):
			err = s.send(line[2:])
		case strings.HasPrefix(line, "< "):
			err = s.expect(line[2:])
		}
		if err != nil {
			s.kill()
			ts.Fatalf("%v", err)
		}
	}
	if err := s.end(); err != nil {
		ts.Fatalf("%s: %v\n%s", strings.Join(args[1:], " "), err, s.text())
	}
}

// session is a program on a terminal.
type session struct {
	cmd  *exec.Cmd
	tty  *os.File
	more chan struct{}

	mu   sync.Mutex
	out  strings.Builder // all output; guarded by mu
	seen int             // how far expect has read; guarded by mu
}

func startSession(cmd *exec.Cmd) (*session, error) {
	tty, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 24, Cols: 80})
	if err != nil {
		return nil, err
	}
	s := &session{cmd: cmd, tty: tty, more: make(chan struct{}, 1)}
	go s.read()
	return s, nil
}

func (s *session) read() {
	defer close(s.more)
	buf := make([]byte, 4096)
	for {
		n, err := s.tty.Read(buf)
		s.mu.Lock()
		s.out.Write(buf[:n])
		s.mu.Unlock()
		if err != nil {
			return
		}
		select {
		case s.more <- struct{}{}:
		default:
		}
	}
}

func (s *session) send(line string) error {
	_, err := io.WriteString(s.tty, line+"\r")
	return err
}

// expect waits until the output after the last match matches.
func (s *session) expect(pattern string) error {
	want := regexp.MustCompile("(?m)" + pattern)
	limit := time.After(expectTimeout)
	for {
		s.mu.Lock()
		at := want.FindStringIndex(s.out.String()[s.seen:])
		if at != nil {
			s.seen += at[1]
		}
		s.mu.Unlock()
		if at != nil {
			return nil
		}
		select {
		case _, open := <-s.more:
			if !open {
				return fmt.Errorf("the program ended before %q: %q", pattern, s.text())
			}
		case <-limit:
			return fmt.Errorf("%q does not come within %v: %q", pattern, expectTimeout, s.text())
		}
	}
}

func (s *session) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.out.String()
}

func (s *session) kill() {
	s.cmd.Process.Kill()
	s.cmd.Wait()
	s.tty.Close()
}

// end waits for the program.
func (s *session) end() error {
	defer s.tty.Close()
	timer := time.AfterFunc(expectTimeout, func() { s.cmd.Process.Kill() })
	defer timer.Stop()
	return s.cmd.Wait()
}
