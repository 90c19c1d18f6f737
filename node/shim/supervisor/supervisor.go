//go:build cgo

package supervisor

import (
	"context"
	"errors"
	"log"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"knarr/internal/pidlock"
	"knarr/node/shim"
	"knarr/node/shim/pages"
)

const (
	// maxParallelStarts bounds the containers that are brought up at a time;
	// more would only compete for the processors.
	maxParallelStarts = 8
	// eventBuffer bounds the events that a subscriber may be behind; one that
	// falls further behind is disconnected and starts again with a snapshot.
	eventBuffer = 1024
	// trimAfter is the quiet time after which unused memory goes back to the
	// kernel.
	trimAfter = time.Second
	// ownOOMScore protects the shim, where we may lower it.
	ownOOMScore = "-999"
	// lockWait bounds the wait for an earlier shim that is about to end.
	lockWait = 10 * time.Second
	// binaryEnv carries the path of the binary that the sealed copy was made of.
	binaryEnv = "_KNARR_SHIM_BINARY"
)

// Config of a Supervisor.
type Config struct {
	// Dir is the state directory (0700); it must be on a file system that
	// permits FIFOs and outlive the process.
	Dir string
	// Ready is called when the socket listens and all containers of an earlier
	// shim were taken over.
	Ready func() error
	// Log receives what has to be said.
	Log *log.Logger
}

// Supervisor is the shim of one node.
type Supervisor struct {
	dir     string // <dir>
	ctDir   string // <dir>/containers
	libDir  string // <dir>/libcontainer
	boot    string
	started time.Time
	limits  *limits
	reaper  *reaper
	logger  *log.Logger
	program func() pages.Program // cut at the first rest, for a start needs most of it at once

	buffers  *sync.Pool    // of the outputs, see newReadBuffers
	starting chan struct{} // a slot per container being started

	ctx    context.Context
	cancel context.CancelFunc
	tasks  sync.WaitGroup

	mu          sync.Mutex
	containers  map[string]*container
	subscribers map[*subscriber]struct{}
	trimmer     *time.Timer
}

type subscriber struct {
	events chan shim.Event
	lost   chan struct{} // closed when events overflowed
}

// ErrRunning: another shim serves the directory.
var ErrRunning = errors.New("a shim is already running in this state directory")

// Run serves until ctx ends or a client shuts it down. Containers go on without
// it. It returns ErrRunning if the directory has a living shim.
func Run(ctx context.Context, cfg Config) error {
	lock, err := acquire(cfg.Dir)
	if err != nil {
		return err
	}
	defer lock.Release()
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl(PR_SET_CHILD_SUBREAPER)", err)
	}
	s, err := newSupervisor(ctx, cfg)
	if err != nil {
		return err
	}
	defer s.cancel()
	s.spawn(func() { s.reaper.run(s.ctx) })
	if err := s.adoptAll(); err != nil {
		return err
	}
	listener, err := shim.Listen(cfg.Dir, shim.SocketName)
	if err != nil {
		return err
	}
	if cfg.Ready != nil {
		if err := cfg.Ready(); err != nil {
			return err
		}
	}
	err = s.serve(listener)
	_ = os.Remove(filepath.Join(cfg.Dir, shim.SocketName))
	return err
}

func newSupervisor(ctx context.Context, cfg Config) (*Supervisor, error) {
	own, err := ownLimits()
	if err != nil {
		return nil, err
	}
	s := &Supervisor{
		dir: cfg.Dir, ctDir: filepath.Join(cfg.Dir, "containers"), libDir: filepath.Join(cfg.Dir, "libcontainer"),
		boot: bootID(), started: time.Now().UTC(), limits: own, reaper: newReaper(), logger: cfg.Log,
		buffers:     newReadBuffers(),
		starting:    make(chan struct{}, maxParallelStarts),
		containers:  map[string]*container{},
		subscribers: map[*subscriber]struct{}{},
	}
	for _, dir := range []string{s.ctDir, s.libDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte(ownOOMScore), 0); err != nil {
		s.warn("the kernel may choose this process when memory runs out: %v", err)
	}
	s.ctx, s.cancel = context.WithCancel(ctx)
	s.program = sync.OnceValue(pages.Own)
	s.trimmer = time.AfterFunc(trimAfter, s.rest)
	return s, nil
}

// acquire makes the directory ours for the life of the process. It waits for a shim that is about to end; one that serves is
// ErrRunning.
func acquire(dir string) (*pidlock.Lock, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, shim.LockName)
	l, err := pidlock.Take(path)
	if !errors.Is(err, pidlock.ErrLocked) {
		return l, err
	}
	if conn, err := shim.Dial(dir, shim.SocketName); err == nil {
		_ = conn.Close()
		return nil, ErrRunning
	}
	l, err = pidlock.TakeWithin(path, lockWait)
	if errors.Is(err, pidlock.ErrLocked) {
		return nil, ErrRunning
	}
	return l, err
}

func (s *Supervisor) warn(format string, args ...any) { s.logger.Printf(format, args...) }

func (s *Supervisor) stopping() bool { return s.ctx.Err() != nil }

func (s *Supervisor) spawn(f func()) {
	s.tasks.Add(1)
	go func() {
		defer s.tasks.Done()
		f()
	}()
}

// rest gives memory back that is not needed while nothing happens.
func (s *Supervisor) rest() {
	debug.FreeOSMemory()
	s.program().Drop()
}

// trim asks for memory to be given back when it has been quiet for a while.
func (s *Supervisor) trim() { s.trimmer.Reset(trimAfter) }

// serve accepts connections until the context ends.
func (s *Supervisor) serve(l *net.UnixListener) error {
	stop := context.AfterFunc(s.ctx, func() { _ = l.Close() })
	defer stop()
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			if s.stopping() {
				return nil
			}
			return err
		}
		go s.handle(conn)
	}
}

// reserve enters a new container into the table and makes its directory.
func (s *Supervisor) reserve(id string) (*container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.containers[id]; ok {
		return nil, shim.Errorf(shim.CodeExists, "container %s exists", id)
	}
	c := &container{id: id, dir: filepath.Join(s.ctDir, id), sup: s, exited: make(chan struct{})}
	c.status = shim.Status{ID: id, State: shim.StateStarting, BootID: s.boot}
	c.log = newCRILog(shim.LogConfig{}, s.warn)
	if err := os.Mkdir(c.dir, 0o700); err != nil {
		return nil, err
	}
	s.containers[id] = c
	return c, nil
}

// drop takes a container out of the table and removes its directory.
func (s *Supervisor) drop(c *container) {
	if err := os.RemoveAll(c.dir); err != nil {
		s.warn("container %s: %v", c.id, err)
	}
	_ = os.RemoveAll(filepath.Join(s.libDir, c.id))
	s.mu.Lock()
	delete(s.containers, c.id)
	s.mu.Unlock()
}

func (s *Supervisor) find(id string) (*container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, ok := s.containers[id]
	if !ok {
		return nil, shim.Errorf(shim.CodeNotFound, "container %s not found", id)
	}
	return c, nil
}

func (s *Supervisor) list() []shim.Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.listLocked()
}

func (s *Supervisor) listLocked() []shim.Status {
	out := make([]shim.Status, 0, len(s.containers))
	for _, c := range s.containers {
		out = append(out, c.snapshot())
	}
	return out
}

// publish gives an event to every subscriber; one that is too far behind is cut.
func (s *Supervisor) publish(e shim.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for sub := range s.subscribers {
		select {
		case sub.events <- e:
		default:
			close(sub.lost)
			delete(s.subscribers, sub)
		}
	}
}

// subscribe returns the present state and everything that happens after it.
func (s *Supervisor) subscribe() (*subscriber, []shim.Status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sub := &subscriber{events: make(chan shim.Event, eventBuffer), lost: make(chan struct{})}
	s.subscribers[sub] = struct{}{}
	return sub, s.listLocked()
}

func (s *Supervisor) unsubscribe(sub *subscriber) {
	s.mu.Lock()
	delete(s.subscribers, sub)
	s.mu.Unlock()
}

// remove deletes an ended container, with force also a running one.
func (s *Supervisor) remove(id string, force bool) error {
	c, err := s.find(id)
	if err != nil {
		return err
	}
	switch c.snapshot().State {
	case shim.StateStarting:
		return shim.Errorf(shim.CodeState, "container %s is being started", id)
	case shim.StateRunning:
		if !force {
			return shim.Errorf(shim.CodeState, "container %s is running", id)
		}
		if err := c.signal(unix.SIGKILL, false); err != nil && c.snapshot().State == shim.StateRunning {
			return err
		}
	}
	select {
	case <-c.exited:
	case <-s.ctx.Done():
		return s.ctx.Err()
	}
	s.drop(c)
	s.publish(shim.Event{Type: shim.EventDeleted, Status: c.snapshot()})
	return nil
}

// shutdown ends the shim when it has no running container; with force always.
func (s *Supervisor) shutdown(force bool) error {
	if !force {
		for _, st := range s.list() {
			if st.State != shim.StateExited {
				return shim.Errorf(shim.CodeState, "container %s is %s", st.ID, st.State)
			}
		}
	}
	return nil
}
