package runtime

import (
	"context"
	"log/slog"
	"net/netip"

	"github.com/containerd/containerd/v2/core/mount"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"knarr/node/image"
)

// Images is what the runtime needs of the image store; *image.Store is one.
type Images interface {
	// Resolve finds an image by any of its names, digests or its ID.
	Resolve(ctx context.Context, ref string) (image.Image, error)
	// NewRootfs returns the mounts of the writable root file system of a
	// container; a second call for the same id returns the same.
	NewRootfs(ctx context.Context, id, ref string) ([]mount.Mount, error)
	// RemoveRootfs removes it; removing what does not exist is no error.
	RemoveRootfs(ctx context.Context, id string) error
}

var _ Images = (*image.Store)(nil)

// rootfsLister is what an image store may have besides: the ids of all root
// file systems, so that Open can remove those that a power loss left behind.
type rootfsLister interface {
	Rootfs(ctx context.Context) ([]string, error)
}

var _ rootfsLister = (*image.Store)(nil)

// NetworkRequest names a sandbox to a Network.
type NetworkRequest struct {
	SandboxID    string
	Namespace    string
	Name         string
	UID          string
	NetnsPath    string // bind mount of the sandbox's network namespace
	PortMappings []*runtimeapi.PortMapping
	Labels       map[string]string
	Annotations  map[string]string
}

// NetworkStatus is what a Network gave to a sandbox.
type NetworkStatus struct {
	// IPs of the pod, the primary one first.
	IPs []netip.Addr
}

// Network connects sandboxes. Calls for different sandboxes are concurrent.
type Network interface {
	// SetUp connects the network namespace; it cleans up behind its own errors.
	SetUp(ctx context.Context, req NetworkRequest) (NetworkStatus, error)
	// TearDown disconnects it. It is called again after an error, and for
	// sandboxes whose SetUp never ended; both must be harmless. After a restart
	// of the machine NetnsPath does not lead to a namespace any more.
	TearDown(ctx context.Context, req NetworkRequest) error
}

// StreamServer makes the URLs of CRI's Exec, Attach and PortForward;
// k8s.io/cri-streaming's streaming.Server is one.
type StreamServer interface {
	GetExec(*runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error)
	GetAttach(*runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error)
	GetPortForward(*runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error)
}

// Options of Open.
type Options struct {
	// StateDir holds all state (0700). Required. It must be on a file system of
	// this machine; the sandboxes' bind mounts are made in it.
	StateDir string
	// CgroupParent is the cgroup, absolute in every hierarchy, below which pods
	// get theirs when a sandbox's configuration names none. Default "/knarr".
	CgroupParent string
	// Images is required.
	Images Images
	// Network connects pods; nil: they have a loopback device only.
	Network Network
	// ShimPath is the knarr-shim binary. Required, except when a shim runs.
	ShimPath string
	// Log is told what no caller learns; nil: slog.Default.
	Log *slog.Logger
	// LogMaxBytes and LogMaxFiles bound each container's log, as in
	// shim.LogConfig: 0 is 10 MiB and 5 files, negative bytes leave the rotation
	// to the caller (ReopenContainerLog).
	LogMaxBytes int64
	LogMaxFiles int
	// Version is what Version reports; empty: "dev".
	Version string
}
