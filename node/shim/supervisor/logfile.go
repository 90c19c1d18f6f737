//go:build cgo

package supervisor

import (
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"sync"
	"time"

	"knarr/node/shim"
)

const (
	defaultLogBytes = 10 << 20
	defaultLogFiles = 5
	// maxLogLine is the longest piece of a line in one log entry, in bytes; what
	// is longer is written as partial entries ("P").
	maxLogLine = 16 << 10
	// flushBytes is the size of one write to the file, about.
	flushBytes = 32 << 10
	// logTime is RFC 3339 with all nine digits, so that entries sort as text.
	logTime = "2006-01-02T15:04:05.000000000Z07:00"
	// rotatedSuffix is the name that kubelet gives to rotated files, so that its
	// reader and its cleaner find them.
	rotatedSuffix = "20060102-150405"
)

// criLog is a log file in the format that kubelet reads:
//
//	<time> stdout|stderr F|P <content>
//
// Both streams of a container share one. A write error (a full disk) loses the
// entries, is told once, and never stops the container.
type criLog struct {
	path     string
	maxBytes int64
	maxFiles int
	warn     func(format string, args ...any)

	mu     sync.Mutex
	file   *os.File
	size   int64
	failed bool
	buf    []byte
}

func newCRILog(cfg shim.LogConfig, warn func(string, ...any)) *criLog {
	l := &criLog{path: cfg.Path, maxBytes: cfg.MaxBytes, maxFiles: cfg.MaxFiles, warn: warn}
	if l.maxBytes == 0 {
		l.maxBytes = defaultLogBytes
	}
	if l.maxFiles <= 0 {
		l.maxFiles = defaultLogFiles
	}
	return l
}

// open makes the file; it is an error of the start when that is impossible.
func (l *criLog) open() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.openLocked()
}

func (l *criLog) openLocked() error {
	if l.path == "" {
		return nil
	}
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		_ = f.Close()
		return err
	}
	if l.file != nil {
		_ = l.file.Close()
	}
	l.file, l.size, l.failed = f, info.Size(), false
	return nil
}

// reopen goes on in a new file at the path, after someone renamed the old one.
func (l *criLog) reopen() error { return l.open() }

func (l *criLog) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil {
		_ = l.file.Close()
		l.file = nil
	}
}

// entries writes lines (without their newline) as full entries, then rest, if
// any, as partial ones, with one write per flushBytes.
func (l *criLog) entries(stream string, now time.Time, lines [][]byte, rest []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return
	}
	l.buf = l.buf[:0]
	for _, line := range lines {
		for len(line) > maxLogLine {
			l.appendLocked(stream, now, 'P', line[:maxLogLine])
			line = line[maxLogLine:]
		}
		l.appendLocked(stream, now, 'F', line)
	}
	for len(rest) > 0 {
		piece := rest[:min(len(rest), maxLogLine)]
		l.appendLocked(stream, now, 'P', piece)
		rest = rest[len(piece):]
	}
	l.flushLocked(now)
	if cap(l.buf) > flushBytes/2 {
		l.buf = nil
	}
}

// flushLocked writes the buffer and rotates when the file is full.
func (l *criLog) flushLocked(now time.Time) {
	if len(l.buf) == 0 || l.file == nil {
		return
	}
	n, err := l.file.Write(l.buf)
	l.buf = l.buf[:0]
	l.size += int64(n)
	if err != nil && !l.failed {
		l.warn("log %s: %v; output is lost until writing works again", l.path, err)
	}
	l.failed = err != nil
	if l.maxBytes > 0 && l.size >= l.maxBytes {
		l.rotateLocked(now)
	}
}

func (l *criLog) appendLocked(stream string, now time.Time, tag byte, content []byte) {
	l.buf = now.AppendFormat(l.buf, logTime)
	l.buf = append(l.buf, ' ')
	l.buf = append(l.buf, stream...)
	l.buf = append(l.buf, ' ', tag, ' ')
	l.buf = append(l.buf, content...)
	l.buf = append(l.buf, '\n')
	if len(l.buf) >= flushBytes {
		l.flushLocked(now)
	}
}

// rotateLocked renames the file and removes the oldest beyond maxFiles.
func (l *criLog) rotateLocked(now time.Time) {
	target := l.path + "." + now.Format(rotatedSuffix)
	for i := 1; ; i++ {
		if _, err := os.Lstat(target); err != nil {
			break
		}
		target = fmt.Sprintf("%s.%s-%04d", l.path, now.Format(rotatedSuffix), i)
	}
	if err := os.Rename(l.path, target); err != nil {
		l.warn("log %s: rotate: %v", l.path, err)
		l.size = 0
		return
	}
	if err := l.openLocked(); err != nil {
		l.warn("log %s: reopen after rotation: %v", l.path, err)
	}
	old, err := filepath.Glob(l.path + ".*")
	if err != nil {
		return
	}
	sort.Strings(old)
	for len(old) > l.maxFiles-1 {
		_ = os.Remove(old[0])
		old = old[1:]
	}
}
