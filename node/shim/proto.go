package shim

import (
	"fmt"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// ProtocolVersion is announced by OpPing. A client refuses a shim whose version
// is another one.
const ProtocolVersion = 1

// Names of the files that a shim keeps in its state directory.
const (
	// SocketName is the unix socket (mode 0600) that the shim listens on.
	SocketName = "shim.sock"
	// LockName is held by the living shim (internal/pidlock).
	LockName = "shim.lock"
	// LogName receives what the shim has to say: a few lines per day.
	LogName = "shim.log"
)

// Operations of the protocol, see PROTOCOL.md.
const (
	OpPing       = "ping"
	OpStart      = "start"
	OpSignal     = "signal"
	OpDelete     = "delete"
	OpStatus     = "status"
	OpList       = "list"
	OpWait       = "wait"
	OpExec       = "exec"
	OpAttach     = "attach"
	OpCloseStdin = "close-stdin"
	OpResize     = "resize"
	OpUpdate     = "update"
	OpReopenLog  = "reopen-log"
	OpEvents     = "events"
	OpShutdown   = "shutdown"
	OpKeepTTY    = "keep-tty"
)

// Error codes of the protocol.
const (
	CodeNotFound = "not-found"
	CodeExists   = "exists"
	CodeState    = "state"   // the container is in a state that forbids the operation
	CodeStart    = "start"   // the process could not be started; the message is the runtime's
	CodeInvalid  = "invalid" // the request makes no sense
	CodeInternal = "internal"
)

// Error is a failure that the shim reports.
type Error struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

// Error implements error.
func (e *Error) Error() string { return e.Message }

// Errorf makes an Error.
func Errorf(code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// Request is the first message on each connection.
type Request struct {
	Op        string `json:"op"`
	Container string `json:"container,omitempty"`

	Start    *StartRequest         `json:"start,omitempty"`
	Signal   *SignalRequest        `json:"signal,omitempty"`
	Exec     *ExecRequest          `json:"exec,omitempty"`
	Attach   *AttachRequest        `json:"attach,omitempty"`
	Resize   *Size                 `json:"resize,omitempty"`
	Update   *specs.LinuxResources `json:"update,omitempty"`
	Force    bool                  `json:"force,omitempty"`
	FDLabels []string              `json:"fds,omitempty"` // names of the descriptors that come with the message, in order
}

// Reply is each message of the shim.
type Reply struct {
	Error      *Error   `json:"error,omitempty"`
	Ping       *Ping    `json:"ping,omitempty"`
	Status     *Status  `json:"status,omitempty"`
	Containers []Status `json:"containers,omitempty"`
	Exec       *ExecEnd `json:"exec,omitempty"`
	Event      *Event   `json:"event,omitempty"`
	FDLabels   []string `json:"fds,omitempty"`
}

// Ping describes the living shim.
type Ping struct {
	Version    int       `json:"version"`
	PID        int       `json:"pid"`
	StartedAt  time.Time `json:"startedAt"`
	Containers int       `json:"containers"`
}

// LogConfig says where the CRI-format log of a container goes.
type LogConfig struct {
	// Path of the log file; empty: output is read and thrown away.
	Path string `json:"path,omitempty"`
	// MaxBytes is the size at which the file is rotated. 0: 10 MiB; negative: never.
	MaxBytes int64 `json:"maxBytes,omitempty"`
	// MaxFiles is the number of files kept, the current one included. 0: 5.
	MaxFiles int `json:"maxFiles,omitempty"`
}

// StartRequest asks for a container to be created and started.
type StartRequest struct {
	// Spec is the OCI specification. Spec.Linux.CgroupsPath is the full cgroup
	// path, the same in every hierarchy.
	Spec *specs.Spec `json:"spec"`
	Log  LogConfig   `json:"log"`
	// Stdin keeps a standard input open for attach.
	Stdin bool `json:"stdin,omitempty"`
	// StdinOnce closes the standard input when the first attach with stdin ends.
	StdinOnce bool `json:"stdinOnce,omitempty"`
	// Pause runs the shim's own pause process instead of Spec.Process.Args: the
	// first process of a pod-wide PID namespace.
	Pause bool `json:"pause,omitempty"`
}

// SignalRequest sends a signal to the first process or to all of a container.
type SignalRequest struct {
	Signal int  `json:"signal"`
	All    bool `json:"all,omitempty"`
}

// Size of a terminal in characters.
type Size struct {
	Width  uint16 `json:"width"`
	Height uint16 `json:"height"`
}

// ExecRequest starts one more process in a container. The descriptors
// "stdin", "stdout", "stderr" of the message become its stdio; what is missing
// is /dev/null. With TTY they are ignored and the reply carries the master
// side of the terminal as "tty".
type ExecRequest struct {
	Args []string `json:"args"`
	TTY  bool     `json:"tty,omitempty"`
	Size Size     `json:"size"`
}

// ExecEnd is the last reply of an exec.
type ExecEnd struct {
	ExitCode int `json:"exitCode"`
	Signal   int `json:"signal,omitempty"`
}

// AttachRequest joins the stdio of a running container. Descriptors "stdout"
// and "stderr" of the message receive copies of the output from now on.
// With Stdin the reply carries "stdin" (a pipe or the terminal). With a
// terminal the reply always carries "tty".
type AttachRequest struct {
	Stdin bool `json:"stdin,omitempty"`
}

// State of a container as the shim sees it.
type State string

// States of a container.
const (
	StateStarting State = "starting"
	StateRunning  State = "running"
	StateExited   State = "exited"
)

// Reasons of an exit status that the kernel did not tell us.
const (
	// ReasonStatusLost: the process ended while no shim was its parent and the
	// kernel is too old to tell others; the exit code is 137 by definition.
	ReasonStatusLost = "StatusLost"
	// ReasonRebooted: the machine was restarted; the exit code is 137 by definition.
	ReasonRebooted = "Rebooted"
)

// LostExitCode is the exit code of a process whose status nobody received.
const LostExitCode = 137

// Status is everything the shim knows about a container. It is also the
// content of status.json in the container's directory.
type Status struct {
	ID         string    `json:"id"`
	State      State     `json:"state"`
	PID        int       `json:"pid,omitempty"`
	PIDStart   uint64    `json:"pidStart,omitempty"` // field 22 of /proc/<pid>/stat
	BootID     string    `json:"bootID,omitempty"`
	StartedAt  time.Time `json:"startedAt"`
	FinishedAt time.Time `json:"finishedAt"`
	// ExitCode is the process's, or 128+signal.
	ExitCode int `json:"exitCode"`
	// Signal that ended the process, 0 for none.
	Signal int `json:"signal,omitempty"`
	// OOMKilled: the kernel killed a process of the container for its memory limit.
	OOMKilled bool `json:"oomKilled,omitempty"`
	// Reason is empty or one of the Reason constants.
	Reason string `json:"reason,omitempty"`
	// CgroupPaths maps a v1 controller (or "" on v2) to the absolute directory.
	CgroupPaths map[string]string `json:"cgroupPaths,omitempty"`
	Terminal    bool              `json:"terminal,omitempty"`
}

// EventType of an Event.
type EventType string

// Types of events.
const (
	EventStarted EventType = "started"
	EventExited  EventType = "exited"
	EventOOM     EventType = "oom"
	EventDeleted EventType = "deleted"
)

// Event tells of a change; Status is the container's after it.
type Event struct {
	Type   EventType `json:"type"`
	Status Status    `json:"status"`
}
