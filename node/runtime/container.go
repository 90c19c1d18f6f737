package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/moby/sys/signal"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"knarr/node/image"
	"knarr/node/shim"
	"knarr/node/sweep"
)

// phase of a container.
type phase int

const (
	phaseCreated phase = iota
	phaseRunning
	phaseExited
)

// container is one container of a sandbox.
type container struct {
	id  string
	dir string
	// op serialises Start and Remove.
	op sync.Mutex
	// ended is closed when the container has ended.
	ended chan struct{}
	// saving serialises writes of the record.
	saving sync.Mutex

	mu        sync.Mutex
	rec       containerRecord
	config    *runtimeapi.ContainerConfig
	resources *runtimeapi.LinuxContainerResources
	phase     phase
	last      shim.Status // as the shim told it, from running on
	tty       *os.File    // keeps the terminal alive over the death of the shim
	removed   bool
}

func newContainer(id, dir string) *container {
	return &container{id: id, dir: dir, ended: make(chan struct{})}
}

func (c *container) rootfs() string { return filepath.Join(c.dir, "rootfs") }

func (c *container) snapshot() (phase, shim.Status) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.phase, c.last
}

func (c *container) dropTTY() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.tty != nil {
		_ = c.tty.Close()
		c.tty = nil
	}
}

// CreateContainer implements internalapi.ContainerManager.
func (r *Runtime) CreateContainer(ctx context.Context, sandboxID string, config *runtimeapi.ContainerConfig, sandboxConfig *runtimeapi.PodSandboxConfig) (string, error) {
	s, err := r.findSandbox(sandboxID)
	if err != nil {
		return "", err
	}
	if !s.record().Ready {
		return "", precondition("sandbox %s is not ready", sandboxID)
	}
	if config.GetMetadata().GetName() == "" {
		return "", invalid("container configuration without a name")
	}
	r.expectStart()
	img, err := r.opts.Images.Resolve(ctx, config.GetImage().GetImage())
	if err != nil {
		return "", rpcError(fmt.Errorf("image %q: %w", config.GetImage().GetImage(), err))
	}
	c, err := r.newContainer(s, config, sandboxConfig, img)
	if err != nil {
		return "", rpcError(err)
	}
	if err := r.buildContainer(ctx, s, c, img); err != nil {
		clean, cancel := cleanupContext(ctx)
		defer cancel()
		if cerr := r.demolishContainer(clean, c); cerr != nil {
			r.log.Warn("clean up after a failed container", "container", c.id, "error", cerr)
		}
		return "", rpcError(fmt.Errorf("create container %q: %w", config.GetMetadata().GetName(), err))
	}
	r.mu.Lock()
	r.containers[c.id] = c
	r.mu.Unlock()
	r.emit(c, runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT)
	return c.id, nil
}

func (r *Runtime) newContainer(s *sandbox, config *runtimeapi.ContainerConfig, sandboxConfig *runtimeapi.PodSandboxConfig, img image.Image) (*container, error) {
	data, err := encode(config)
	if err != nil {
		return nil, err
	}
	id := newID()
	c := newContainer(id, filepath.Join(r.containersDir(), id))
	c.config = config
	c.resources = config.GetLinux().GetResources()
	c.rec = containerRecord{
		ID: id, SandboxID: s.id, CreatedAt: time.Now().UnixNano(), Config: data,
		ImageID: img.ID, ImageRef: img.ID, ImageName: config.GetImage().GetImage(),
		Cgroup: filepath.Join(s.rec.CgroupParent, id), StopSignal: stopSignalName(config, img),
	}
	if len(img.RepoDigests) > 0 {
		c.rec.ImageRef = img.RepoDigests[0]
	}
	if len(img.RepoTags) > 0 {
		c.rec.ImageName = img.RepoTags[0]
	}
	logDir := s.config.GetLogDirectory()
	if sandboxConfig != nil {
		logDir = sandboxConfig.GetLogDirectory()
	}
	if logDir != "" && config.GetLogPath() != "" {
		c.rec.LogPath = filepath.Join(logDir, config.GetLogPath())
	}
	if err := os.Mkdir(c.dir, 0o711); err != nil {
		return nil, err
	}
	return c, nil
}

// buildContainer makes the root file system and then the record: a directory
// without a record is removed by the next Open.
func (r *Runtime) buildContainer(ctx context.Context, s *sandbox, c *container, img image.Image) error {
	if err := r.mountRootfs(ctx, s, c); err != nil {
		return err
	}
	user, err := resolveUser(c.rootfs(), c.config.GetLinux().GetSecurityContext(), img.Config.Config.User)
	if err != nil {
		return err
	}
	c.rec.User = user
	if err := r.mountVolumes(ctx, c); err != nil {
		return err
	}
	// The specification is built again at the start; a configuration that cannot
	// be one is refused now.
	if _, err := r.spec(s, c, img); err != nil {
		return err
	}
	return c.persist()
}

// persist writes the record as it is now.
func (c *container) persist() error {
	c.saving.Lock()
	defer c.saving.Unlock()
	c.mu.Lock()
	rec := c.rec
	c.mu.Unlock()
	return save(c.dir, containerFile, &rec, true)
}

// mountRootfs mounts the container's root file system where it outlives us.
func (r *Runtime) mountRootfs(ctx context.Context, s *sandbox, c *container) error {
	mounts, err := r.opts.Images.NewRootfs(ctx, c.id, c.rec.ImageID)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(c.rootfs(), 0o711); err != nil {
		return err
	}
	if s.rec.UserNS {
		if mounts, err = mapRootfs(mounts, s.options().GetUsernsOptions()); err != nil {
			return err
		}
	} else {
		mounts = r.aboveMountPoints(mounts, c)
	}
	return mount.All(mounts, c.rootfs())
}

// mountVolumes mounts the images that the container wants as volumes.
func (r *Runtime) mountVolumes(ctx context.Context, c *container) error {
	for n, m := range c.config.GetMounts() {
		if m.GetImage().GetImage() == "" {
			continue
		}
		if err := os.Mkdir(c.volume(n), 0o711); err != nil {
			return err
		}
		mounts, err := r.opts.Images.NewRootfs(ctx, c.volumeID(n), m.GetImage().GetImage())
		if err != nil {
			return fmt.Errorf("image volume %s: %w", m.GetContainerPath(), err)
		}
		if err := mount.All(mounts, c.volume(n)); err != nil {
			return fmt.Errorf("image volume %s: %w", m.GetContainerPath(), err)
		}
	}
	return nil
}

// volumePrefix begins the directories of image volumes; the number of the mount
// follows.
const volumePrefix = "volume-"

func (c *container) volumeID(n int) string { return fmt.Sprintf("%s-%s%d", c.id, volumePrefix, n) }
func (c *container) volume(n int) string {
	return filepath.Join(c.dir, fmt.Sprintf("%s%d", volumePrefix, n))
}

// demolishContainer undoes buildContainer, however far that came. It is
// idempotent.
func (r *Runtime) demolishContainer(ctx context.Context, c *container) error {
	if err := unmount(c.rootfs()); err != nil {
		return err
	}
	if err := r.opts.Images.RemoveRootfs(ctx, c.id); err != nil {
		return err
	}
	volumes, err := filepath.Glob(filepath.Join(c.dir, volumePrefix+"*"))
	if err != nil {
		return err
	}
	for _, dir := range volumes {
		if err := unmount(dir); err != nil {
			return err
		}
		if err := r.opts.Images.RemoveRootfs(ctx, c.id+"-"+filepath.Base(dir)); err != nil {
			return err
		}
	}
	return sweep.RemoveAll(c.dir)
}

// scrapContainer removes a container's directory that has no record.
func (r *Runtime) scrapContainer(id, dir string) error {
	ctx, cancel := context.WithTimeout(context.Background(), cleanupLimit)
	defer cancel()
	if err := r.shim.Delete(ctx, id, true); err != nil && !shimNotFound(err) {
		return err
	}
	return r.demolishContainer(ctx, &container{id: id, dir: dir})
}

// StartContainer implements internalapi.ContainerManager.
func (r *Runtime) StartContainer(ctx context.Context, id string) error {
	c, err := r.findContainer(id)
	if err != nil {
		return err
	}
	c.op.Lock()
	defer c.op.Unlock()
	if p, _ := c.snapshot(); p != phaseCreated || c.removed {
		return precondition("container %s is not in created state", c.id)
	}
	s, err := r.findSandbox(c.rec.SandboxID)
	if err != nil {
		return err
	}
	if !s.record().Ready {
		return precondition("sandbox %s of container %s is not ready", s.id, c.id)
	}
	if err := r.startProcess(ctx, s, c); err != nil {
		r.startFailed(c, err)
		return rpcError(fmt.Errorf("start container %q: %w", c.config.GetMetadata().GetName(), err))
	}
	return nil
}

func (r *Runtime) startProcess(ctx context.Context, s *sandbox, c *container) error {
	img, err := r.opts.Images.Resolve(ctx, c.rec.ImageID)
	if err != nil {
		return err
	}
	spec, err := r.spec(s, c, img)
	if err != nil {
		return err
	}
	// A start that is under way cannot be called back: one given up halfway would run on, taken for ended.
	ctx, cancel := cleanupContext(ctx)
	defer cancel()
	st, tty, err := r.shim.Run(ctx, c.id, &shim.StartRequest{
		Spec:  spec,
		Log:   shim.LogConfig{Path: c.rec.LogPath, MaxBytes: r.opts.LogMaxBytes, MaxFiles: r.opts.LogMaxFiles},
		Stdin: c.config.GetStdin(), StdinOnce: c.config.GetStdinOnce(),
	})
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.tty = tty
	c.mu.Unlock()
	r.apply(c, st)
	if ended(c) {
		c.dropTTY()
	}
	return nil
}

// startFailed makes the container one that has ended.
func (r *Runtime) startFailed(c *container, cause error) {
	c.mu.Lock()
	c.rec.StartError, c.rec.StartErrorAt = cause.Error(), time.Now().UnixNano()
	c.phase = phaseExited
	close(c.ended)
	c.mu.Unlock()
	if err := c.persist(); err != nil {
		r.log.Warn("write container record", "container", c.id, "error", err)
	}
	r.emit(c, runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT)
}

// StopContainer implements internalapi.ContainerManager: the stop signal, then
// after timeout seconds SIGKILL; with timeout 0 at once.
func (r *Runtime) StopContainer(ctx context.Context, id string, timeout int64) error {
	c, err := r.findContainer(id)
	if err != nil {
		return nil // stopping is idempotent, also after the removal
	}
	if p, _ := c.snapshot(); p != phaseRunning {
		return nil
	}
	if timeout > 0 {
		if err := r.shim.Signal(ctx, c.id, c.stopSignal(), false); err != nil && !ended(c) {
			return rpcError(fmt.Errorf("stop container %s: %w", c.id, err))
		}
		grace := time.NewTimer(time.Duration(timeout) * time.Second)
		defer grace.Stop()
		select {
		case <-c.ended:
			return nil
		case <-grace.C:
		case <-ctx.Done():
			return rpcError(ctx.Err())
		}
	}
	return rpcError(r.kill(ctx, c))
}

func ended(c *container) bool {
	select {
	case <-c.ended:
		return true
	default:
		return false
	}
}

// kill ends a running container and returns when it has ended.
func (r *Runtime) kill(ctx context.Context, c *container) error {
	if p, _ := c.snapshot(); p != phaseRunning {
		return nil
	}
	if err := r.shim.Signal(ctx, c.id, unix.SIGKILL, false); err != nil && !ended(c) {
		var told *shim.Error
		if !errors.As(err, &told) || told.Code != shim.CodeState {
			return fmt.Errorf("kill container %s: %w", c.id, err)
		}
	}
	select {
	case <-c.ended:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-r.ctx.Done():
		return errors.New("the container runtime is being closed")
	}
}

func stopSignalName(config *runtimeapi.ContainerConfig, img image.Image) string {
	if s := config.GetStopSignal(); s != runtimeapi.Signal_RUNTIME_DEFAULT {
		return s.String()
	}
	return img.Config.Config.StopSignal
}

func (c *container) stopSignal() unix.Signal {
	if c.rec.StopSignal == "" {
		return unix.SIGTERM
	}
	name := strings.Replace(c.rec.StopSignal, "SIGRTMINPLUS", "SIGRTMIN+", 1)
	name = strings.Replace(name, "SIGRTMAXMINUS", "SIGRTMAX-", 1)
	s, err := signal.ParseSignal(name)
	if err != nil {
		return unix.SIGTERM
	}
	return s
}

// RemoveContainer implements internalapi.ContainerManager.
func (r *Runtime) RemoveContainer(ctx context.Context, id string) error {
	c, err := r.findContainer(id)
	if err != nil {
		return nil
	}
	return rpcError(r.removeContainer(ctx, c))
}

func (r *Runtime) removeContainer(ctx context.Context, c *container) error {
	c.op.Lock()
	defer c.op.Unlock()
	if c.removed {
		return nil
	}
	if err := r.kill(ctx, c); err != nil {
		return err
	}
	if err := r.shim.Delete(ctx, c.id, true); err != nil && !shimNotFound(err) {
		return fmt.Errorf("remove container %s: %w", c.id, err)
	}
	if err := r.demolishContainer(ctx, c); err != nil {
		return fmt.Errorf("remove container %s: %w", c.id, err)
	}
	c.removed = true
	c.dropTTY()
	r.mu.Lock()
	delete(r.containers, c.id)
	r.mu.Unlock()
	r.emit(c, runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT)
	return nil
}

// ReopenContainerLog implements internalapi.ContainerManager.
func (r *Runtime) ReopenContainerLog(ctx context.Context, id string) error {
	c, err := r.findContainer(id)
	if err != nil {
		return err
	}
	return rpcError(r.shim.ReopenLog(ctx, c.id))
}

// UpdateContainerResources implements internalapi.ContainerManager.
func (r *Runtime) UpdateContainerResources(ctx context.Context, id string, res *runtimeapi.ContainerResources) error {
	c, err := r.findContainer(id)
	if err != nil {
		return err
	}
	linux := res.GetLinux()
	if linux == nil {
		return nil
	}
	c.op.Lock()
	defer c.op.Unlock()
	p, _ := c.snapshot()
	if p == phaseExited {
		return precondition("container %s has ended", c.id)
	}
	merged := mergeResources(c.resources, linux)
	if p == phaseRunning {
		if err := r.shim.Update(ctx, c.id, r.feats.resources(merged)); err != nil {
			return rpcError(fmt.Errorf("update the resources of container %s: %w", c.id, err))
		}
	}
	data, err := encode(merged)
	if err != nil {
		return rpcError(err)
	}
	c.mu.Lock()
	c.resources, c.rec.Resources = merged, data
	c.mu.Unlock()
	return rpcError(c.persist())
}
