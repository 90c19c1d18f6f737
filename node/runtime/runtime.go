package runtime

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	internalapi "k8s.io/cri-api/pkg/apis"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"knarr/node/shim"
)

const (
	runtimeName       = "knarr"
	runtimeAPIVersion = "v1"
	defaultParent     = "/knarr"
	// cleanupLimit bounds what is undone after an operation failed or its caller
	// went away.
	cleanupLimit = 30 * time.Second
)

// Runtime implements internalapi.RuntimeService. Make it with Open.
type Runtime struct {
	opts  Options
	log   *slog.Logger
	shim  *shim.Client
	boot  string
	feats features

	events eventHub

	ctx    context.Context
	cancel context.CancelFunc
	tasks  sync.WaitGroup

	expecting atomic.Bool // see expectStart

	mu         sync.RWMutex
	sandboxes  map[string]*sandbox
	containers map[string]*container
	streams    StreamServer
}

var _ internalapi.RuntimeService = (*Runtime)(nil)

// Open starts or finds the shim of the state directory and takes up all
// sandboxes and containers that are recorded there. ctx bounds the opening only.
func Open(ctx context.Context, opts Options) (*Runtime, error) {
	if opts.StateDir == "" || opts.Images == nil {
		return nil, errors.New("container runtime: StateDir and Images are required")
	}
	if opts.CgroupParent == "" {
		opts.CgroupParent = defaultParent
	}
	if opts.Log == nil {
		opts.Log = slog.Default()
	}
	if opts.Version == "" {
		opts.Version = "dev"
	}
	r := &Runtime{
		opts: opts, log: opts.Log, boot: bootID(), feats: probeFeatures(),
		sandboxes: map[string]*sandbox{}, containers: map[string]*container{},
	}
	for _, dir := range []string{r.podsDir(), r.containersDir()} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return nil, fmt.Errorf("container runtime: %w", err)
		}
	}
	if err := r.makeMountPoints(); err != nil {
		return nil, fmt.Errorf("container runtime: %w", err)
	}
	client, err := shim.Start(ctx, shim.Options{
		Dir: filepath.Join(opts.StateDir, "shim"), Path: opts.ShimPath,
		Log: func(format string, args ...any) { r.log.Warn(fmt.Sprintf(format, args...)) },
	})
	if err != nil {
		return nil, fmt.Errorf("container runtime: %w", err)
	}
	r.shim = client
	r.ctx, r.cancel = context.WithCancel(context.Background())
	if err := r.loadAll(ctx); err != nil {
		r.cancel()
		return nil, fmt.Errorf("container runtime: %w", err)
	}
	r.spawn(func() { r.shim.Watch(r.ctx, &watcher{r}) })
	return r, nil
}

// Close ends the work of this process. Containers, sandboxes and the shim go on.
func (r *Runtime) Close(context.Context) error {
	r.cancel()
	r.tasks.Wait()
	r.events.close()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.containers {
		c.dropTTY()
	}
	return nil
}

// ShutdownShim ends the shim. Without force that fails while a container runs;
// with force containers run on unsupervised until the next Open.
func (r *Runtime) ShutdownShim(ctx context.Context, force bool) error {
	return rpcError(r.shim.Shutdown(ctx, force))
}

// ShimPID returns the process id of the living shim.
func (r *Runtime) ShimPID(ctx context.Context) (int, error) {
	p, err := r.shim.Ping(ctx)
	return p.PID, err
}

// SetStreamServer says who makes the URLs of Exec, Attach and PortForward; until
// then these calls are unimplemented.
func (r *Runtime) SetStreamServer(s StreamServer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.streams = s
}

func (r *Runtime) spawn(f func()) {
	r.tasks.Add(1)
	go func() {
		defer r.tasks.Done()
		f()
	}()
}

func (r *Runtime) podsDir() string       { return filepath.Join(r.opts.StateDir, "pods") }
func (r *Runtime) containersDir() string { return filepath.Join(r.opts.StateDir, "containers") }

// newID makes an identifier as other runtimes do: 64 hexadecimal digits.
func newID() string {
	b := make([]byte, 32)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

func bootID() string {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}

// cleanupContext outlives the caller's, for what must be undone anyway.
func cleanupContext(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), cleanupLimit)
}

// findSandbox accepts a full ID or a unique prefix, as CRI's tools use them.
func (r *Runtime) findSandbox(id string) (*sandbox, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if s, ok := r.sandboxes[id]; ok {
		return s, nil
	}
	return byPrefix(r.sandboxes, "sandbox", id)
}

func (r *Runtime) findContainer(id string) (*container, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if c, ok := r.containers[id]; ok {
		return c, nil
	}
	return byPrefix(r.containers, "container", id)
}

func byPrefix[T any](table map[string]T, kind, id string) (T, error) {
	var found, none T
	n := 0
	if id != "" {
		for key, v := range table {
			if strings.HasPrefix(key, id) {
				found = v
				n++
			}
		}
	}
	switch n {
	case 0:
		return none, notFound(kind, id)
	case 1:
		return found, nil
	}
	return none, invalid("%s id %q is ambiguous", kind, id)
}

// containersOf returns the containers of a sandbox, the oldest first.
func (r *Runtime) containersOf(sandboxID string) []*container {
	r.mu.RLock()
	defer r.mu.RUnlock()
	var out []*container
	for _, c := range r.containers {
		if c.rec.SandboxID == sandboxID {
			out = append(out, c)
		}
	}
	sortByCreation(out)
	return out
}

// Version implements internalapi.RuntimeVersioner.
func (r *Runtime) Version(context.Context, string) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{
		Version: "0.1.0", RuntimeName: runtimeName, RuntimeVersion: r.opts.Version, RuntimeApiVersion: runtimeAPIVersion,
	}, nil
}

// Status implements internalapi.RuntimeService. The network is ready whenever
// the runtime is: it is injected ready or not at all.
func (r *Runtime) Status(ctx context.Context, _ bool) (*runtimeapi.StatusResponse, error) {
	ready := &runtimeapi.RuntimeCondition{Type: runtimeapi.RuntimeReady, Status: true}
	if _, err := r.shim.Ping(ctx); err != nil {
		ready.Status, ready.Reason, ready.Message = false, "ShimUnavailable", err.Error()
	}
	return &runtimeapi.StatusResponse{
		Status: &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{
			ready, {Type: runtimeapi.NetworkReady, Status: true},
		}},
		RuntimeHandlers: []*runtimeapi.RuntimeHandler{{
			Features: &runtimeapi.RuntimeHandlerFeatures{
				RecursiveReadOnlyMounts: r.feats.recursiveReadOnly, UserNamespaces: r.feats.idmappedMounts,
			},
		}},
		Features: &runtimeapi.RuntimeFeatures{SupplementalGroupsPolicy: true},
	}, nil
}

// UpdateRuntimeConfig implements internalapi.RuntimeService. Pod address ranges
// are given to the Network by other ways.
func (r *Runtime) UpdateRuntimeConfig(context.Context, *runtimeapi.RuntimeConfig) error { return nil }

// RuntimeConfig implements internalapi.RuntimeService.
func (r *Runtime) RuntimeConfig(context.Context) (*runtimeapi.RuntimeConfigResponse, error) {
	return &runtimeapi.RuntimeConfigResponse{
		Linux: &runtimeapi.LinuxRuntimeConfiguration{CgroupDriver: runtimeapi.CgroupDriver_CGROUPFS},
	}, nil
}

// CheckpointContainer is not implemented: it needs CRIU.
func (r *Runtime) CheckpointContainer(context.Context, *runtimeapi.CheckpointContainerRequest) error {
	return status.Error(codes.Unimplemented, "checkpoints of containers are not implemented")
}
