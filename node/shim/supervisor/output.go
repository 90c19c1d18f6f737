//go:build cgo

package supervisor

import (
	"bytes"
	"errors"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// readBytes is the size of one read from a container's output.
	readBytes = 32 << 10
	// attachStall is how long an attached reader may not read before it is
	// dropped; until then it slows the container down.
	attachStall = 10 * time.Second
)

// newReadBuffers makes the pool of the outputs' buffers. They are borrowed only
// while there is something to read, so that an idle container holds none.
func newReadBuffers() *sync.Pool {
	return &sync.Pool{New: func() any { b := make([]byte, readBytes); return &b }}
}

// output copies one stream of a container to its log and to whoever is attached.
type output struct {
	stream string
	src    *os.File
	log    *criLog
	fan    *fanout
	bufs   *sync.Pool
	// pending is the beginning of a line whose end was not read yet.
	pending []byte
	done    chan struct{}
}

func newOutput(stream string, src *os.File, log *criLog, bufs *sync.Pool) *output {
	return &output{stream: stream, src: src, log: log, bufs: bufs, fan: &fanout{}, done: make(chan struct{})}
}

// run copies until the end of the stream and closes it.
func (o *output) run() {
	defer close(o.done)
	defer o.fan.closeAll()
	defer func() { _ = o.src.Close() }()
	raw, err := o.src.SyscallConn()
	if err != nil {
		return
	}
	for {
		more := o.step(raw.Read)
		if !more {
			break
		}
	}
	if len(o.pending) > 0 {
		o.log.entries(o.stream, time.Now(), nil, o.pending)
		o.pending = nil
	}
}

// step waits until something can be read, then handles one buffer of it.
func (o *output) step(whenReadable func(func(fd uintptr) bool) error) bool {
	var (
		buf  *[]byte
		n    int
		rerr error
	)
	err := whenReadable(func(fd uintptr) bool {
		if !readable(int(fd)) {
			return false
		}
		buf = o.bufs.Get().(*[]byte)
		n, rerr = unix.Read(int(fd), *buf)
		for errors.Is(rerr, unix.EINTR) {
			n, rerr = unix.Read(int(fd), *buf)
		}
		if errors.Is(rerr, unix.EAGAIN) {
			o.bufs.Put(buf)
			buf, rerr = nil, nil
			return false
		}
		return true
	})
	if buf == nil {
		return false
	}
	defer o.bufs.Put(buf)
	// A terminal gives EIO when its last process is gone.
	if err != nil || rerr != nil || n <= 0 {
		return false
	}
	chunk := (*buf)[:n]
	o.consume(chunk) // the log first: who sees output finds it there
	o.fan.write(chunk)
	return true
}

// consume logs the complete lines of chunk and keeps the rest.
func (o *output) consume(chunk []byte) {
	var lines [][]byte
	for {
		i := bytes.IndexByte(chunk, '\n')
		if i < 0 {
			break
		}
		line := chunk[:i]
		if len(o.pending) > 0 {
			line = append(o.pending, line...)
			o.pending = nil
		}
		lines = append(lines, line)
		chunk = chunk[i+1:]
	}
	o.pending = append(o.pending, chunk...)
	var partial []byte
	if whole := len(o.pending) / maxLogLine * maxLogLine; whole > 0 {
		partial, o.pending = o.pending[:whole], append([]byte(nil), o.pending[whole:]...)
	}
	if len(lines) > 0 || partial != nil {
		o.log.entries(o.stream, time.Now(), lines, partial)
	}
	if len(o.pending) == 0 {
		o.pending = nil
	}
}

// fanout is the set of attached readers of one stream.
type fanout struct {
	mu     sync.Mutex
	sinks  map[*sink]struct{}
	closed bool
}

// sink is the write side of a pipe whose read side the attached client has.
type sink struct {
	file *os.File
	gone chan struct{}
	once sync.Once
}

func newSink(f *os.File) (*sink, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	_ = f.Close()
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return &sink{file: os.NewFile(uintptr(fd), "attach"), gone: make(chan struct{})}, nil
}

func (s *sink) close() {
	s.once.Do(func() {
		_ = s.file.Close()
		close(s.gone)
	})
}

// add attaches s; a stream that has ended closes it at once.
func (f *fanout) add(s *sink) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		s.close()
		return
	}
	if f.sinks == nil {
		f.sinks = map[*sink]struct{}{}
	}
	f.sinks[s] = struct{}{}
}

func (f *fanout) remove(s *sink) {
	f.mu.Lock()
	delete(f.sinks, s)
	f.mu.Unlock()
	s.close()
}

func (f *fanout) write(p []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for s := range f.sinks {
		_ = s.file.SetWriteDeadline(time.Now().Add(attachStall))
		if n, err := s.file.Write(p); err != nil || n < len(p) {
			delete(f.sinks, s)
			s.close()
		}
	}
}

func (f *fanout) closeAll() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	for s := range f.sinks {
		s.close()
	}
	f.sinks = nil
}
