//go:build cgo

package supervisor

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runc/libcontainer/utils"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"knarr/node/shim"
)

// pauseTarget is where the shim's binary appears in the root of a pause
// container.
const pauseTarget = "/pause"

// stdio is one container's standard streams on both sides.
type stdio struct {
	// ours
	stdin          *os.File
	stdout, stderr *os.File
	console        *os.File // our end of the socket that brings the terminal
	// the container's, closed after the start
	child []*os.File
}

func (s *stdio) closeChild() {
	for _, f := range s.child {
		_ = f.Close()
	}
	s.child = nil
}

func (s *stdio) closeAll() {
	s.closeChild()
	for _, f := range []*os.File{s.stdin, s.stdout, s.stderr, s.console} {
		if f != nil {
			_ = f.Close()
		}
	}
}

// start creates and starts a container; on an error nothing of it is left.
func (s *Supervisor) start(id string, req *shim.StartRequest) (*container, error) {
	if err := checkStart(id, req); err != nil {
		return nil, err
	}
	c, err := s.reserve(id)
	if err != nil {
		return nil, err
	}
	s.starting <- struct{}{}
	defer func() { <-s.starting; s.trim() }()
	if err := c.launch(req); err != nil {
		c.log.close()
		s.drop(c)
		return nil, err
	}
	return c, nil
}

func checkStart(id string, req *shim.StartRequest) error {
	if err := validID(id); err != nil {
		return shim.Errorf(shim.CodeInvalid, "%v", err)
	}
	if req == nil || req.Spec == nil || req.Spec.Process == nil || req.Spec.Linux == nil || req.Spec.Root == nil {
		return shim.Errorf(shim.CodeInvalid, "start of %s: the specification is incomplete", id)
	}
	if req.Spec.Linux.CgroupsPath == "" {
		return shim.Errorf(shim.CodeInvalid, "start of %s: no cgroup path", id)
	}
	return nil
}

// launch brings the reserved container up.
func (c *container) launch(req *shim.StartRequest) error {
	spec := req.Spec
	if req.Pause {
		if err := preparePause(spec); err != nil {
			return err
		}
	}
	c.sup.limits.clamp(spec)
	c.rec = record{
		Log: req.Log, Stdin: req.Stdin, StdinOnce: req.StdinOnce,
		Terminal: spec.Process.Terminal, PrivatePID: privatePID(spec), Process: spec.Process,
	}
	c.log = newCRILog(req.Log, c.sup.warn)
	if err := c.log.open(); err != nil {
		return shim.Errorf(shim.CodeStart, "open container log: %v", err)
	}
	if err := writeJSON(c.dir, startFile, &c.rec); err != nil {
		return err
	}
	io, err := openStdio(c.dir, &c.rec)
	if err != nil {
		return err
	}
	if err := c.run(spec, io); err != nil {
		io.closeAll()
		return err
	}
	return nil
}

// run turns the specification into a running process. From the translation on
// libcontainer may start helpers that it waits for itself.
func (c *container) run(spec *specs.Spec, io *stdio) error {
	end := c.sup.reaper.begin()
	defer end()
	config, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{CgroupName: c.id, Spec: spec, NoNewKeyring: true})
	if err != nil {
		return shim.Errorf(shim.CodeStart, "container specification: %v", err)
	}
	if err := chownStdio(io, config); err != nil {
		return err
	}
	mountHierarchies(config)
	ct, err := libcontainer.Create(c.sup.libDir, c.id, config)
	if err != nil {
		return shim.Errorf(shim.CodeStart, "create container: %v", err)
	}
	process, err := newProcess(spec.Process)
	if err != nil {
		return shim.Errorf(shim.CodeStart, "container process: %v", err)
	}
	process.Init = true
	io.attachTo(process)
	if err := ct.Run(process); err != nil {
		_ = ct.Destroy()
		return shim.Errorf(shim.CodeStart, "%v", err)
	}
	io.closeChild()
	pid, err := process.Pid()
	if err != nil {
		return err
	}
	c.sup.reaper.register(pid)
	pidfd, err := openPidfd(pid)
	if err == nil {
		err = c.takeStdio(io)
	}
	if err == nil {
		state, serr := ct.State()
		if serr == nil {
			c.process = process
			return c.running(pid, pidfd, state.CgroupPaths)
		}
		err = serr
	}
	_ = process.Signal(unix.SIGKILL)
	_, _ = process.Wait()
	c.sup.reaper.release(pid)
	_ = ct.Destroy()
	return err
}

func privatePID(spec *specs.Spec) bool {
	for _, ns := range spec.Linux.Namespaces {
		if ns.Type == specs.PIDNamespace {
			return ns.Path == ""
		}
	}
	return false
}

// preparePause makes the root of the pause process: a directory with nothing
// but a read-only bind mount of our own binary.
func preparePause(spec *specs.Spec) error {
	root := spec.Root.Path
	target := filepath.Join(root, pauseTarget)
	for _, dir := range []string{root, filepath.Join(root, "proc"), filepath.Join(root, "dev")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := os.WriteFile(target, nil, 0o555); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	if exe := os.Getenv(binaryEnv); exe != "" {
		self = exe
	}
	spec.Mounts = append(spec.Mounts, specs.Mount{
		Destination: pauseTarget, Source: self, Type: "bind", Options: []string{"bind", "ro", "nosuid", "nodev"},
	})
	spec.Process.Args = []string{pauseTarget, "pause"}
	spec.Process.Terminal = false
	return nil
}

// openStdio makes the FIFOs of a container, or the socket for its terminal.
func openStdio(dir string, rec *record) (_ *stdio, err error) {
	s := &stdio{}
	defer func() {
		if err != nil {
			s.closeAll()
		}
	}()
	if rec.Terminal {
		parent, child, err := utils.NewSockPair("console")
		if err != nil {
			return nil, err
		}
		s.console, s.child = parent, []*os.File{child}
		return s, nil
	}
	stdin, err := s.openStdin(dir, rec)
	if err != nil {
		return nil, err
	}
	s.child = append(s.child, stdin)
	for _, stream := range []struct {
		name string
		ours **os.File
	}{{"stdout", &s.stdout}, {"stderr", &s.stderr}} {
		path := filepath.Join(dir, stream.name)
		if err := unix.Mkfifo(path, 0o600); err != nil {
			return nil, &os.PathError{Op: "mkfifo", Path: path, Err: err}
		}
		theirs, err := openFIFO(path, unix.O_RDWR)
		if err != nil {
			return nil, err
		}
		s.child = append(s.child, theirs)
		if *stream.ours, err = openFIFO(path, unix.O_RDONLY|unix.O_NONBLOCK); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// openStdin opens the container's side of stdin and, if it has one, ours. A
// stdin that is never closed is held read-write by the container, so that it
// sees no end of file when the shim dies.
func (s *stdio) openStdin(dir string, rec *record) (*os.File, error) {
	if !rec.Stdin {
		return os.Open(os.DevNull)
	}
	path := filepath.Join(dir, "stdin")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return nil, &os.PathError{Op: "mkfifo", Path: path, Err: err}
	}
	var err error
	if s.stdin, err = openFIFO(path, unix.O_RDWR|unix.O_NONBLOCK); err != nil {
		return nil, err
	}
	if !rec.StdinOnce {
		return openFIFO(path, unix.O_RDWR)
	}
	theirs, err := openFIFO(path, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	// Ours must not be a reader, or a writer would block for good after the
	// container has ended.
	writer, err := openFIFO(path, unix.O_WRONLY|unix.O_NONBLOCK)
	if err != nil {
		_ = theirs.Close()
		return nil, err
	}
	_ = s.stdin.Close()
	s.stdin = writer
	return theirs, nil
}

func openFIFO(path string, flags int) (*os.File, error) {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// chownStdio gives the FIFOs to the root user of the container's user
// namespace; inside, libcontainer gives them on to the process's user.
func chownStdio(s *stdio, config *configs.Config) error {
	if len(config.UIDMappings) == 0 || s.console != nil {
		return nil
	}
	uid, err := config.HostRootUID()
	if err != nil {
		return err
	}
	gid, err := config.HostRootGID()
	if err != nil {
		return err
	}
	for _, f := range s.child {
		if f.Name() == os.DevNull {
			continue
		}
		if err := f.Chown(uid, gid); err != nil {
			return err
		}
	}
	return nil
}

func (s *stdio) attachTo(p *libcontainer.Process) {
	if s.console != nil {
		p.ConsoleSocket = s.child[0]
		return
	}
	p.Stdin, p.Stdout, p.Stderr = s.child[0], s.child[1], s.child[2]
}

// takeStdio makes our sides of the streams the container's.
func (c *container) takeStdio(s *stdio) error {
	if s.console == nil {
		c.stdin = s.stdin
		c.stdout = newOutput("stdout", s.stdout, c.log, c.sup.buffers)
		c.stderr = newOutput("stderr", s.stderr, c.log, c.sup.buffers)
		return nil
	}
	master, err := receiveConsole(s.console)
	_ = s.console.Close()
	s.console = nil
	if err != nil {
		return err
	}
	return c.takeConsole(master)
}

// takeConsole uses master for output and keeps a duplicate for input.
func (c *container) takeConsole(master *os.File) error {
	reader, err := dup(master)
	if err != nil {
		_ = master.Close()
		return err
	}
	c.console = master
	c.stdout = newOutput("stdout", reader, c.log, c.sup.buffers)
	return nil
}

// receiveConsole reads the terminal's master from the socket on which the
// container's init sent it.
func receiveConsole(socket *os.File) (*os.File, error) {
	conn, err := net.FileConn(socket)
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }()
	oob := make([]byte, unix.CmsgSpace(4))
	name := make([]byte, unix.PathMax)
	uc, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, fmt.Errorf("console socket is a %T", conn)
	}
	_, n, _, _, err := uc.ReadMsgUnix(name, oob)
	if err != nil {
		return nil, fmt.Errorf("receive terminal: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) != 1 {
		return nil, errors.Join(errors.New("receive terminal: no descriptor"), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil, errors.Join(errors.New("receive terminal: no descriptor"), err)
	}
	return pollable(fds[0], "terminal")
}

// pollable wraps a descriptor so that reads park in the poller.
func pollable(fd int, name string) (*os.File, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// dup duplicates f without changing its blocking mode.
func dup(f *os.File) (*os.File, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var (
		fd   int
		derr error
	)
	if err := raw.Control(func(old uintptr) {
		fd, derr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0)
	}); err != nil {
		return nil, err
	}
	if derr != nil {
		return nil, derr
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// newProcess translates an OCI process for libcontainer.
func newProcess(p *specs.Process) (*libcontainer.Process, error) {
	lp := &libcontainer.Process{
		Args: p.Args, Env: p.Env, Cwd: p.Cwd,
		UID: int(p.User.UID), GID: int(p.User.GID),
		Label: p.SelinuxLabel, AppArmorProfile: p.ApparmorProfile,
		NoNewPrivileges: &p.NoNewPrivileges,
		Scheduler:       p.Scheduler, IOPriority: p.IOPriority,
		LogLevel: "3", // logrus.WarnLevel
	}
	if p.ConsoleSize != nil {
		lp.ConsoleWidth, lp.ConsoleHeight = uint16(p.ConsoleSize.Width), uint16(p.ConsoleSize.Height)
	}
	if c := p.Capabilities; c != nil {
		lp.Capabilities = &configs.Capabilities{
			Bounding: c.Bounding, Effective: c.Effective, Inheritable: c.Inheritable,
			Permitted: c.Permitted, Ambient: c.Ambient,
		}
	}
	for _, gid := range p.User.AdditionalGids {
		lp.AdditionalGroups = append(lp.AdditionalGroups, int(gid))
	}
	for _, r := range p.Rlimits {
		number, ok := rlimitNumbers[r.Type]
		if !ok {
			return nil, fmt.Errorf("unknown rlimit %q", r.Type)
		}
		lp.Rlimits = append(lp.Rlimits, configs.Rlimit{Type: number, Hard: r.Hard, Soft: r.Soft})
	}
	return lp, nil
}
