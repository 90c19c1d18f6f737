package rig

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"knarr/internal/sysmon"
)

// Instructions of a function are counted by letting a child process run it one at a time: that needs no counters of the processor, which virtual
// machines seldom have, and gives the same number on a busy machine as on an idle one. What other threads do meanwhile (a commit that the
// function waits for) does not count, nor does the kernel.

// stepSignal tells the parent where the counted part begins and ends: it is never delivered.
const stepSignal = unix.SIGUSR2

// Stepped is the child's side of CountInstructions.
type Stepped struct {
	out io.Writer
	tid int
}

// NewStepped prepares the calling goroutine, which from now on keeps its thread, and waits until the parent watches it. There is no
// garbage collection from then on.
func NewStepped(in io.Reader, out io.Writer) (*Stepped, error) {
	runtime.LockOSThread()
	debug.SetGCPercent(-1)
	s := &Stepped{out: out, tid: unix.Gettid()}
	if _, err := fmt.Fprintf(out, "%s%d\n", threadWord, s.tid); err != nil {
		return nil, err
	}
	_, err := bufio.NewReader(in).ReadString('\n')
	return s, err
}

// Count lets the parent count the instructions of f, under a name without line breaks.
func (s *Stepped) Count(name string, f func()) error {
	if _, err := fmt.Fprintf(s.out, "%s%s\n", countWord, name); err != nil {
		return err
	}
	pid := os.Getpid()
	begin := unix.Tgkill(pid, s.tid, stepSignal)
	f()
	return errors.Join(begin, unix.Tgkill(pid, s.tid, stepSignal))
}

// End lets the parent watch no longer.
func (s *Stepped) End() error {
	if _, err := fmt.Fprintln(s.out, endWord); err != nil {
		return err
	}
	return unix.Tgkill(os.Getpid(), s.tid, stepSignal)
}

// The words that begin the child's lines. Each but the first comes with a signal.
const threadWord, countWord, endWord = "stepped: thread ", "stepped: count ", "stepped: end"

// CountInstructions runs a program that uses Stepped and gives the instructions of each function that it counts, the least where a name is counted more than
// once. The child is gone when it returns. It needs the right to trace, and a machine that does it fast: ErrMayNotTrace and ErrTooSlow.
func CountInstructions(cmd *exec.Cmd) (counts map[string]int, err error) {
	runtime.LockOSThread() // a tracer is a thread
	defer runtime.UnlockOSThread()
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	lines := bufio.NewReader(out)
	if counts, err = stepThrough(cmd.Process.Pid, in, lines); err != nil {
		_ = cmd.Process.Kill()
	}
	said, readErr := io.ReadAll(lines)
	waitErr := cmd.Wait()
	if err = errors.Join(err, readErr, waitErr); err != nil {
		return nil, fmt.Errorf("%w\n%s", err, said)
	}
	return counts, nil
}

// stepThrough counts until the child says that it has ended.
func stepThrough(pid int, in io.Writer, lines *bufio.Reader) (_ map[string]int, err error) {
	word, err := after(lines, threadWord)
	if err != nil {
		return nil, err
	}
	t, err := newTracer(pid, word)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			t.abandon(pid)
		}
	}()
	if _, err := io.WriteString(in, "\n"); err != nil {
		return nil, err
	}
	for counts := map[string]int{}; ; {
		if err := t.toSignal(); err != nil {
			return nil, err
		}
		name, err := after(lines, countWord)
		if errors.Is(err, errEnd) {
			return counts, t.detach()
		}
		n := 0
		if err == nil {
			n, err = t.count()
		}
		if err != nil {
			return nil, err
		}
		if before, ok := counts[name]; !ok || n < before {
			counts[name] = n
		}
	}
}

// errEnd says that the child will count no more.
var errEnd = errors.New("the end")

// after gives the rest of the next line that begins with a word.
func after(lines *bufio.Reader, word string) (string, error) {
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			return "", err
		}
		line = strings.TrimSuffix(line, "\n")
		if rest, ok := strings.CutPrefix(line, word); ok {
			return rest, nil
		}
		if line == endWord {
			return "", errEnd
		}
	}
}

// ErrMayNotTrace says that the machine lets nobody trace processes.
var ErrMayNotTrace = errors.New("tracing is not allowed here")

// ErrTooSlow says that steps take longer than slowStep, so that what is counted may run into its own deadlines.
var ErrTooSlow = errors.New("single steps take too long here")

// A step takes some microseconds, in a virtual machine inside another up to 150: half a million of them must take less than half a minute. It is looked at each so many steps.
const (
	slowStep   = 50 * time.Microsecond
	slowWindow = 5_000
)

// tracer holds a thread of the child, and the one by which its runtime takes processors away from goroutines that run for long, as all do that are
// counted.
type tracer struct {
	tid, monitor int
}

func newTracer(pid int, word string) (*tracer, error) {
	tid, err := strconv.Atoi(word)
	if err != nil {
		return nil, err
	}
	monitor, err := sysmon.Thread(pid)
	if err != nil {
		return nil, err
	}
	for t, options := range map[int]uintptr{tid: unix.PTRACE_O_TRACEEXIT, monitor: 0} {
		switch err := seize(t, options); {
		case errors.Is(err, unix.EPERM):
			return nil, fmt.Errorf("%w: %w", ErrMayNotTrace, err)
		case err != nil:
			return nil, fmt.Errorf("trace thread %d: %w", t, err)
		}
	}
	return &tracer{tid, monitor}, nil
}

func seize(tid int, options uintptr) error {
	if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(tid), 0, options, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// abandon ends the child, and waits for the ends of threads that others are not told of while they are traced.
func (t *tracer) abandon(pid int) {
	_ = unix.Kill(pid, unix.SIGKILL)
	for _, tid := range []int{t.tid, t.monitor} {
		for unix.PtraceDetach(tid) != nil { // it runs, or is gone
			if _, err := stop(tid); err != nil && !errors.Is(err, errEnding) {
				break
			}
		}
	}
}

// halt stops the runtime's monitor.
func (t *tracer) halt() error {
	if err := unix.PtraceInterrupt(t.monitor); err != nil {
		return err
	}
	_, err := stop(t.monitor)
	return err
}

// detach lets both threads go, of which the first is stopped.
func (t *tracer) detach() error {
	return errors.Join(t.halt(), unix.PtraceDetach(t.monitor), unix.PtraceDetach(t.tid))
}

// count goes from one signal, at which the thread is stopped, to the next.
func (t *tracer) count() (n int, err error) {
	if err := t.halt(); err != nil {
		return 0, err
	}
	for began := time.Now(); ; {
		if n%slowWindow == slowWindow-1 && time.Since(began) > time.Duration(n)*slowStep {
			return 0, ErrTooSlow
		}
		if err := unix.PtraceSingleStep(t.tid); err != nil {
			return 0, fmt.Errorf("step: %w", err)
		}
		signal, err := stop(t.tid)
		if err != nil {
			return 0, err
		}
		if signal == stepSignal {
			return n, t.release()
		}
		if signal == unix.SIGTRAP {
			n++
		}
	}
}

// release lets both threads run again. The signal has come before the stop after the step in which it was sent: that is still to come.
func (t *tracer) release() error {
	if err := unix.PtraceSingleStep(t.tid); err != nil {
		return err
	}
	_, err := stop(t.tid)
	return errors.Join(err, unix.PtraceCont(t.monitor, 0), unix.PtraceCont(t.tid, 0))
}

// toSignal lets the thread run to the signal.
func (t *tracer) toSignal() error {
	for {
		signal, err := stop(t.tid)
		if err != nil || signal == stepSignal {
			return err
		}
		if signal == unix.SIGTRAP { // a stop of its own, no signal
			signal = 0
		}
		if err := unix.PtraceCont(t.tid, int(signal)); err != nil {
			return err
		}
	}
}

// errEnding says that a thread is about to end. It is told of the counted one: that it has ended would not be, of a process's first thread, before the monitor was waited for.
var errEnding = errors.New("it ends")

// stop waits until a thread stops and says by which signal.
func stop(tid int) (unix.Signal, error) {
	var status unix.WaitStatus
	for {
		_, err := unix.Wait4(tid, &status, unix.WALL, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, fmt.Errorf("wait for thread %d: %w", tid, err)
		case status.TrapCause() == unix.PTRACE_EVENT_EXIT:
			return 0, fmt.Errorf("thread %d: %w", tid, errEnding)
		case !status.Stopped():
			return 0, fmt.Errorf("thread %d is gone (%#x)", tid, uint32(status))
		default:
			return status.StopSignal(), nil
		}
	}
}
