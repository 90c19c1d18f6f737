package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	v1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
	"k8s.io/kubernetes/pkg/kubelet/images"

	"knarr/node/server"
)

const (
	// drainTimeout bounds how long requests may go on after Run is told to end.
	drainTimeout = 2 * time.Second
	// runTimeout bounds a command of the run endpoint.
	runTimeout = 2 * time.Minute
)

// listen opens the listener of the HTTPS API and returns what serves it.
func (a *Agent) listen() (func(ctx context.Context), error) {
	if a.opts.ServingTLS == nil {
		return func(context.Context) {}, nil
	}
	l, err := a.opts.Listen("tcp", a.opts.ListenAddress)
	if err != nil {
		return nil, fmt.Errorf("agent: HTTPS API of the node: %w", err)
	}
	a.mu.Lock()
	a.address = l.Addr().String()
	a.mu.Unlock()
	cfg := a.opts.ServingTLS.Clone()
	if cfg.ClientCAs != nil {
		cfg.ClientAuth = tls.VerifyClientCertIfGiven
	}
	cfg.NextProtos = []string{"http/1.1"} // SPDY and WebSocket take over the connection
	srv := server.New(server.Options{NodeName: a.opts.NodeName, Host: apiHost{a}, Streaming: a.opts.Streaming, Client: a.opts.Client})
	return func(ctx context.Context) {
		h := srv.HTTP(ctx)
		h.TLSConfig = cfg
		h.ErrorLog = nil
		done := make(chan struct{})
		go func() {
			defer close(done)
			<-ctx.Done()
			sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
			defer cancel()
			if h.Shutdown(sctx) != nil {
				_ = h.Close()
			}
		}()
		if err := h.ServeTLS(l, "", ""); err != nil && !errors.Is(err, http.ErrServerClosed) {
			klog.FromContext(ctx).Error(err, "HTTPS API of the node ended")
			return
		}
		<-done
	}, nil
}

// apiHost is what the node's API sees of the agent.
type apiHost struct{ a *Agent }

var _ server.Host = apiHost{}

// Healthy asks the runtime, without which nothing works.
func (h apiHost) Healthy() error { return h.a.runtimeProblem() }

// Pods returns the pods with their newest status.
func (h apiHost) Pods() []*v1.Pod {
	var out []*v1.Pod
	for _, w := range h.a.allWorkers() {
		pod, _ := w.current()
		out = append(out, h.fresh(pod))
	}
	return out
}

// fresh returns a copy of the pod with its newest status.
func (h apiHost) fresh(pod *v1.Pod) *v1.Pod {
	p := *pod
	if st, ok := h.a.statuses.Get(pod.UID); ok {
		p.Status = st
	}
	return &p
}

func (h apiHost) PodByName(namespace, name string) (*v1.Pod, bool) {
	pod, ok := h.a.podOf(namespace, name)
	if !ok {
		return nil, false
	}
	return h.fresh(pod), true
}

// Logs writes the log of a container's last run, or of the one before it.
func (h apiHost) Logs(ctx context.Context, pod *v1.Pod, container string, opts *v1.PodLogOptions, stdout, stderr io.Writer) error {
	id, err := loggedContainer(pod, container, opts.Previous)
	if err != nil {
		return err
	}
	if stdout != nil {
		if _, err := stdout.Write(nil); err != nil { // headers go out before the first line
			return err
		}
	}
	return h.a.runtime.GetContainerLogs(ctx, pod, id, opts, stdout, stderr)
}

// loggedContainer finds the run of a container whose log is asked for.
func loggedContainer(pod *v1.Pod, name string, previous bool) (kubecontainer.ContainerID, error) {
	fail := func(format string, args ...any) (kubecontainer.ContainerID, error) {
		return kubecontainer.ContainerID{}, fmt.Errorf(format, args...)
	}
	cs, found := statusOf(pod, name)
	if !found {
		return fail("container %q in pod %q is not available", name, pod.Name)
	}
	last := cs.LastTerminationState.Terminated
	if previous {
		if last == nil || last.ContainerID == "" {
			return fail("previous terminated container %q in pod %q not found", name, pod.Name)
		}
		return kubecontainer.ParseContainerID(last.ContainerID), nil
	}
	ended := cs.State.Terminated
	switch {
	case cs.State.Running != nil:
		return kubecontainer.ParseContainerID(cs.ContainerID), nil
	case ended != nil && ended.ContainerID != "":
		return kubecontainer.ParseContainerID(ended.ContainerID), nil
	case last != nil && last.ContainerID != "":
		return kubecontainer.ParseContainerID(last.ContainerID), nil
	case ended != nil || last != nil:
		return fail("container %q in pod %q is terminated", name, pod.Name)
	case cs.State.Waiting != nil:
		switch reason := cs.State.Waiting.Reason; reason {
		case images.ErrImagePull.Error():
			return fail("container %q in pod %q is waiting to start: image can't be pulled", name, pod.Name)
		case images.ErrImagePullBackOff.Error():
			return fail("container %q in pod %q is waiting to start: trying and failing to pull image", name, pod.Name)
		default:
			return fail("container %q in pod %q is waiting to start: %v", name, pod.Name, reason)
		}
	}
	return fail("container %q in pod %q is waiting to start - no logs yet", name, pod.Name)
}

func statusOf(pod *v1.Pod, name string) (v1.ContainerStatus, bool) {
	for _, list := range [][]v1.ContainerStatus{pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses, pod.Status.EphemeralContainerStatuses} {
		if cs, ok := podutil.GetContainerStatus(list, name); ok {
			return cs, true
		}
	}
	return v1.ContainerStatus{}, false
}

// ContainerID asks the runtime, which knows of a start before the status does.
func (h apiHost) ContainerID(ctx context.Context, pod *v1.Pod, container string) (string, error) {
	list, err := h.a.opts.Runtime.ListContainers(ctx, &runtimeapi.ContainerFilter{
		State:         &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING},
		LabelSelector: map[string]string{labelPodUID: string(pod.UID)},
	})
	if err != nil {
		return "", err
	}
	for _, c := range list {
		if c.GetMetadata().GetName() == container {
			return c.Id, nil
		}
	}
	return "", fmt.Errorf("container not found (%q)", container)
}

func (h apiHost) SandboxID(ctx context.Context, pod *v1.Pod) (string, error) {
	list, err := h.a.opts.Runtime.ListPodSandbox(ctx, &runtimeapi.PodSandboxFilter{
		State:         &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY},
		LabelSelector: map[string]string{labelPodUID: string(pod.UID)},
	})
	if err != nil {
		return "", err
	}
	if len(list) == 0 {
		return "", fmt.Errorf("pod %s/%s is not running", pod.Namespace, pod.Name)
	}
	return list[0].Id, nil
}

func (h apiHost) Exec(ctx context.Context, id string, cmd []string) ([]byte, error) {
	return h.a.runtime.RunInContainer(ctx, kubecontainer.BuildContainerID(h.a.runtime.Type(), id), cmd, runTimeout)
}
