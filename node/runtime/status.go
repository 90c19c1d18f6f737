package runtime

import (
	"context"
	"fmt"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"knarr/node/shim"
)

// ListContainers implements internalapi.ContainerManager.
func (r *Runtime) ListContainers(_ context.Context, filter *runtimeapi.ContainerFilter) ([]*runtimeapi.Container, error) {
	r.mu.RLock()
	all := make([]*container, 0, len(r.containers))
	for _, c := range r.containers {
		all = append(all, c)
	}
	r.mu.RUnlock()
	sortByCreation(all)
	var out []*runtimeapi.Container
	for _, c := range all {
		if !c.matches(filter) {
			continue
		}
		out = append(out, &runtimeapi.Container{
			Id: c.id, PodSandboxId: c.rec.SandboxID, Metadata: c.config.GetMetadata(),
			Image: c.config.GetImage(), ImageRef: c.rec.ImageRef, ImageId: c.rec.ImageID, State: c.state(),
			CreatedAt: c.rec.CreatedAt, Labels: c.config.GetLabels(), Annotations: c.config.GetAnnotations(),
		})
	}
	return out, nil
}

func (c *container) matches(f *runtimeapi.ContainerFilter) bool {
	if f == nil {
		return true
	}
	if f.Id != "" && !strings.HasPrefix(c.id, f.Id) {
		return false
	}
	if f.PodSandboxId != "" && !strings.HasPrefix(c.rec.SandboxID, f.PodSandboxId) {
		return false
	}
	if f.State != nil && f.State.State != c.state() {
		return false
	}
	return selects(f.LabelSelector, c.config.GetLabels())
}

func (c *container) state() runtimeapi.ContainerState {
	p, _ := c.snapshot()
	switch p {
	case phaseRunning:
		return runtimeapi.ContainerState_CONTAINER_RUNNING
	case phaseExited:
		return runtimeapi.ContainerState_CONTAINER_EXITED
	}
	return runtimeapi.ContainerState_CONTAINER_CREATED
}

// ContainerStatus implements internalapi.ContainerManager.
func (r *Runtime) ContainerStatus(_ context.Context, id string, verbose bool) (*runtimeapi.ContainerStatusResponse, error) {
	c, err := r.findContainer(id)
	if err != nil {
		return nil, err
	}
	resp := &runtimeapi.ContainerStatusResponse{Status: c.criStatus()}
	if verbose {
		_, st := c.snapshot()
		resp.Info = map[string]string{
			"pid": fmt.Sprint(st.PID), "sandboxID": c.rec.SandboxID, "cgroup": c.rec.Cgroup, "rootfs": c.rootfs(),
		}
	}
	return resp, nil
}

func (c *container) criStatus() *runtimeapi.ContainerStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	st := &runtimeapi.ContainerStatus{
		Id: c.id, Metadata: c.config.GetMetadata(), CreatedAt: c.rec.CreatedAt,
		Image:    &runtimeapi.ImageSpec{Image: c.rec.ImageName, UserSpecifiedImage: c.config.GetImage().GetUserSpecifiedImage()},
		ImageRef: c.rec.ImageRef, ImageId: c.rec.ImageID,
		Labels: c.config.GetLabels(), Annotations: c.config.GetAnnotations(), Mounts: c.config.GetMounts(),
		LogPath: c.rec.LogPath, Resources: &runtimeapi.ContainerResources{Linux: c.resources},
		User: c.rec.User.cri(), StopSignal: c.config.GetStopSignal(),
	}
	switch {
	case c.phase == phaseCreated:
		st.State = runtimeapi.ContainerState_CONTAINER_CREATED
	case c.phase == phaseRunning:
		st.State = runtimeapi.ContainerState_CONTAINER_RUNNING
		st.StartedAt = nanos(c.last.StartedAt)
	case c.rec.StartError != "":
		st.State = runtimeapi.ContainerState_CONTAINER_EXITED
		st.ExitCode, st.Reason, st.Message = startErrorCode, reasonStartError, c.rec.StartError
		st.FinishedAt = c.rec.StartErrorAt
	default:
		st.State = runtimeapi.ContainerState_CONTAINER_EXITED
		st.StartedAt, st.FinishedAt = nanos(c.last.StartedAt), nanos(c.last.FinishedAt)
		st.ExitCode = int32(c.last.ExitCode)
		st.Reason, st.Message = exitReason(c.last)
	}
	return st
}

// exitReason names how a container ended, as kubelet expects it.
func exitReason(st shim.Status) (reason, message string) {
	switch {
	case st.Reason == shim.ReasonRebooted:
		return reasonUnknown, "the machine was restarted while the container ran"
	case st.Reason != "":
		return reasonUnknown, "the container ended while its supervisor was being restarted; its exit status is lost"
	case st.OOMKilled && st.ExitCode != 0:
		return reasonOOMKilled, ""
	case st.ExitCode == 0:
		return reasonCompleted, ""
	}
	return reasonError, ""
}

// nanos is CRI's time: 0 for none.
func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}
