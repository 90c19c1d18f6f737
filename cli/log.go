package cli

import (
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"strings"
	"sync"
	"syscall"

	"k8s.io/klog/v2"
)

// Bounds of a process's log: the file and one older one.
const (
	maxLogBytes = 16 << 20
	// tailBytes is how much of a log an error message may carry.
	tailBytes = 4 << 10
	tailLines = 15
)

// boundedLog writes to standard error, which is the file at path, and starts a new file when the old one is full. What
// writes to the descriptor itself (a panic) lands in the newest file too.
type boundedLog struct {
	mu   sync.Mutex
	path string
	size int64 // guarded by mu
}

// boundLog sends the process's log through a boundedLog on the file at path; an empty path changes nothing.
func boundLog(path string) error {
	if path == "" {
		return nil
	}
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("%s: %w", logEnv, err)
	}
	b := &boundedLog{path: path, size: info.Size()}
	// Without these, an error is written once for each severity up to its own, and once more to standard error.
	flags := flag.NewFlagSet("", flag.ContinueOnError)
	klog.InitFlags(flags)
	for name, value := range map[string]string{"logtostderr": "false", "one_output": "true", "stderrthreshold": "FATAL"} {
		if err := flags.Set(name, value); err != nil {
			return fmt.Errorf("set up the log: %s: %w", name, err)
		}
	}
	klog.SetOutput(b)
	log.SetOutput(b)
	return nil
}

// Write implements io.Writer.
func (b *boundedLog) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.size+int64(len(p)) > maxLogBytes {
		b.rotateLocked()
	}
	n, err := os.Stderr.Write(p)
	b.size += int64(n)
	return n, err
}

// rotateLocked keeps writing to the old file where the new one cannot be made: a log is worth less than the process.
func (b *boundedLog) rotateLocked() {
	b.size = 0
	f, err := rotate(b.path)
	if err != nil {
		return
	}
	defer f.Close()
	syscall.Dup3(int(f.Fd()), 1, 0)
	syscall.Dup3(int(f.Fd()), 2, 0)
}

// rotate makes path an empty file and its present content path.1.
func rotate(path string) (*os.File, error) {
	if err := os.Rename(path, path+".1"); err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	return os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
}

// openLog opens a log for a process to be started; a full one is rotated.
func openLog(path string) (*os.File, error) {
	if info, err := os.Stat(path); err == nil && info.Size() > maxLogBytes/2 {
		return rotate(path)
	}
	return os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
}

// tail returns the last lines of a log from offset on, for an error message.
func tail(path string, offset int64) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil {
		offset = max(offset, info.Size()-tailBytes)
	}
	b, err := io.ReadAll(io.NewSectionReader(f, max(offset, 0), tailBytes))
	if err != nil {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	if len(lines) > tailLines {
		lines = lines[len(lines)-tailLines:]
	}
	return strings.Join(lines, "\n")
}
