package probe

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	v1 "k8s.io/api/core/v1"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
	"k8s.io/kubernetes/pkg/kubelet/prober/results"
	upstream "k8s.io/kubernetes/pkg/probe"
	execprobe "k8s.io/kubernetes/pkg/probe/exec"
	grpcprobe "k8s.io/kubernetes/pkg/probe/grpc"
	httpprobe "k8s.io/kubernetes/pkg/probe/http"
	tcpprobe "k8s.io/kubernetes/pkg/probe/tcp"
	utilexec "k8s.io/utils/exec"
)

// attempts is how often a probe that could not be carried out is tried at once.
const attempts = 3

// Kind is what a probe is for.
type Kind string

// The kinds of probes, as their events name them.
const (
	Startup   Kind = "Startup"
	Readiness Kind = "Readiness"
	Liveness  Kind = "Liveness"
)

func (k Kind) of(c *v1.Container) *v1.Probe {
	switch k {
	case Startup:
		return c.StartupProbe
	case Readiness:
		return c.ReadinessProbe
	default:
		return c.LivenessProbe
	}
}

// prober carries out single probes. Safe for concurrent use.
type prober struct {
	exec   execprobe.Prober
	http   httpprobe.Prober
	tcp    tcpprobe.Prober
	grpc   grpcprobe.Prober
	runner kubecontainer.CommandRunner
}

func newProber(runner kubecontainer.CommandRunner) *prober {
	return &prober{exec: execprobe.New(), http: httpprobe.New(false), tcp: tcpprobe.New(), grpc: grpcprobe.New(), runner: runner}
}

// target is what a probe is aimed at.
type target struct {
	pod       *v1.Pod
	container *v1.Container
	id        kubecontainer.ContainerID
	podIP     string
}

// run probes once. A non-empty event is to be recorded as a warning with reason.
func (p *prober) run(ctx context.Context, kind Kind, t target) (res results.Result, reason, event string, err error) {
	var r upstream.Result
	var out string
	for range attempts {
		if r, out, err = p.once(ctx, kind.of(t.container), t); err == nil || ctx.Err() != nil {
			break
		}
	}
	switch {
	case err != nil:
		return results.Failure, reasonUnhealthy, fmt.Sprintf("%s probe errored and resulted in %s state: %s", kind, r, err), err
	case r == upstream.Success:
		return results.Success, "", "", nil
	case r == upstream.Warning:
		return results.Success, reasonWarning, fmt.Sprintf("%s probe warning: %s", kind, out), nil
	case r == upstream.Failure:
		return results.Failure, reasonUnhealthy, fmt.Sprintf("%s probe failed: %s", kind, out), nil
	}
	return results.Failure, "", "", nil
}

func (p *prober) once(ctx context.Context, spec *v1.Probe, t target) (upstream.Result, string, error) {
	timeout := time.Duration(spec.TimeoutSeconds) * time.Second
	switch {
	case spec.Exec != nil:
		cmd := kubecontainer.ExpandContainerCommandOnlyStatic(spec.Exec.Command, t.container.Env)
		return p.exec.Probe(&command{run: func() ([]byte, error) { return p.runner.RunInContainer(ctx, t.id, cmd, timeout) }})
	case spec.HTTPGet != nil:
		req, err := httpprobe.NewRequestForHTTPGetAction(spec.HTTPGet, t.container, t.podIP, "probe")
		if err != nil {
			return upstream.Unknown, "", err
		}
		return p.http.Probe(req, timeout)
	case spec.TCPSocket != nil:
		port, err := upstream.ResolveContainerPort(spec.TCPSocket.Port, t.container)
		if err != nil {
			return upstream.Unknown, "", err
		}
		host := spec.TCPSocket.Host
		if host == "" {
			host = t.podIP
		}
		return p.tcp.Probe(host, port, timeout)
	case spec.GRPC != nil:
		service := ""
		if spec.GRPC.Service != nil {
			service = *spec.GRPC.Service
		}
		return p.grpc.Probe(t.podIP, service, int(spec.GRPC.Port), timeout)
	}
	return upstream.Unknown, "", fmt.Errorf("missing probe handler for %s/%s:%s", t.pod.Namespace, t.pod.Name, t.container.Name)
}

// command lets upstream's exec probe run a command in a container: it uses
// SetStdout, SetStderr, Start and Wait, or CombinedOutput, and nothing else.
type command struct {
	run func() ([]byte, error)
	out io.Writer
}

var (
	_                 utilexec.Cmd = (*command)(nil)
	errNotForCommands              = errors.New("not available for commands in containers")
)

func (c *command) Run() error                         { return nil }
func (c *command) CombinedOutput() ([]byte, error)    { return c.run() }
func (c *command) Output() ([]byte, error)            { return nil, errNotForCommands }
func (c *command) SetDir(string)                      {}
func (c *command) SetStdin(io.Reader)                 {}
func (c *command) SetStdout(w io.Writer)              { c.out = w }
func (c *command) SetStderr(w io.Writer)              { c.out = w }
func (c *command) SetEnv([]string)                    {}
func (c *command) StdoutPipe() (io.ReadCloser, error) { return nil, errNotForCommands }
func (c *command) StderrPipe() (io.ReadCloser, error) { return nil, errNotForCommands }
func (c *command) Wait() error                        { return nil }
func (c *command) Stop()                              {}

func (c *command) Start() error {
	out, err := c.run()
	if c.out != nil {
		if _, werr := c.out.Write(out); werr != nil && err == nil {
			err = werr
		}
	}
	return err
}
