package image

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	internalapi "k8s.io/cri-api/pkg/apis"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// CRI returns the image service of the Container Runtime Interface over the store, as plain calls in this process.
// Its Close does nothing: the store is closed by its owner. Errors are gRPC statuses, as of a remote runtime.
func (s *Store) CRI() internalapi.ImageManagerService { return criService{s} }

type criService struct{ store *Store }

// ListImages lists the images, or the one image that the filter names.
func (c criService) ListImages(ctx context.Context, filter *runtimeapi.ImageFilter) ([]*runtimeapi.Image, error) {
	if ref := filter.GetImage().GetImage(); ref != "" {
		im, err := c.store.Resolve(ctx, ref)
		if errdefs.IsNotFound(err) {
			return nil, nil
		}
		if err != nil {
			return nil, criError(err)
		}
		return []*runtimeapi.Image{criImage(im)}, nil
	}
	all, err := c.store.List(ctx)
	if err != nil {
		return nil, criError(err)
	}
	list := make([]*runtimeapi.Image, len(all))
	for i, im := range all {
		list[i] = criImage(im)
	}
	return list, nil
}

// ImageStatus returns the image that spec names; a response without image where there is none.
func (c criService) ImageStatus(ctx context.Context, spec *runtimeapi.ImageSpec, verbose bool) (*runtimeapi.ImageStatusResponse, error) {
	im, err := c.store.Resolve(ctx, spec.GetImage())
	if errdefs.IsNotFound(err) {
		return &runtimeapi.ImageStatusResponse{}, nil
	}
	if err != nil {
		return nil, criError(err)
	}
	resp := &runtimeapi.ImageStatusResponse{Image: criImage(im)}
	if verbose {
		info, err := json.Marshal(map[string]any{"imageSpec": im.Config})
		if err != nil {
			return nil, criError(err)
		}
		resp.Info = map[string]string{"info": string(info)}
	}
	return resp, nil
}

// PullImage pulls the image that spec names and returns its ID.
func (c criService) PullImage(ctx context.Context, spec *runtimeapi.ImageSpec, auth *runtimeapi.AuthConfig, _ *runtimeapi.PodSandboxConfig) (string, error) {
	im, err := c.store.Pull(ctx, spec.GetImage(), Auth{
		Username:      auth.GetUsername(),
		Password:      auth.GetPassword(),
		Auth:          auth.GetAuth(),
		IdentityToken: auth.GetIdentityToken(),
		RegistryToken: auth.GetRegistryToken(),
		ServerAddress: auth.GetServerAddress(),
	}, nil)
	if err != nil {
		return "", criError(err)
	}
	return im.ID, nil
}

// RemoveImage removes all names of the image that spec means. An image that is not there is no error.
func (c criService) RemoveImage(ctx context.Context, spec *runtimeapi.ImageSpec) error {
	im, err := c.store.Resolve(ctx, spec.GetImage())
	if err == nil {
		err = c.store.Remove(ctx, im.ID)
	}
	if errdefs.IsNotFound(err) {
		return nil
	}
	return criError(err)
}

// ImageFsInfo returns what images and writable layers take on disk.
func (c criService) ImageFsInfo(ctx context.Context) (*runtimeapi.ImageFsInfoResponse, error) {
	u, err := c.store.DiskUsage(ctx)
	if err != nil {
		return nil, criError(err)
	}
	fs := func(bytes, inodes int64) []*runtimeapi.FilesystemUsage {
		return []*runtimeapi.FilesystemUsage{{
			Timestamp:  time.Now().UnixNano(),
			FsId:       &runtimeapi.FilesystemIdentifier{Mountpoint: c.store.Root()},
			UsedBytes:  &runtimeapi.UInt64Value{Value: uint64(bytes)},
			InodesUsed: &runtimeapi.UInt64Value{Value: uint64(inodes)},
		}}
	}
	return &runtimeapi.ImageFsInfoResponse{
		ImageFilesystems:     fs(u.Blobs+u.Layers.Size, u.Layers.Inodes),
		ContainerFilesystems: fs(u.Writable.Size, u.Writable.Inodes),
	}, nil
}

// Close implements the interface.
func (criService) Close(context.Context) error { return nil }

// criImage is im in CRI's terms.
func criImage(im Image) *runtimeapi.Image {
	out := &runtimeapi.Image{
		Id:          im.ID,
		RepoTags:    im.RepoTags,
		RepoDigests: im.RepoDigests,
		Size:        im.Size,
		Spec:        &runtimeapi.ImageSpec{Image: im.ID},
		Pinned:      im.Pinned,
	}
	// The group does not matter for who the process is by default.
	user, _, _ := strings.Cut(im.Config.Config.User, ":")
	if uid, err := strconv.ParseInt(user, 10, 64); err == nil {
		out.Uid = &runtimeapi.Int64Value{Value: uid}
	} else {
		out.Username = user
	}
	return out
}

// DiskUsage is what a store takes on disk, in bytes and inodes.
type DiskUsage struct {
	// Blobs are compressed layers, configurations and manifests (those shared with other nodes too), in bytes.
	Blobs int64
	// Layers are unpacked; Writable is what containers wrote to their root file systems.
	Layers, Writable snapshots.Usage
}

// DiskUsage adds up what the store takes on disk. It walks the files that containers have written, and no others.
func (s *Store) DiskUsage(ctx context.Context) (DiskUsage, error) {
	ctx = s.scope(ctx)
	var u DiskUsage
	err := s.content.Walk(ctx, func(info content.Info) error {
		u.Blobs += info.Size
		return nil
	})
	if err != nil {
		return u, fmt.Errorf("blobs: %w", err)
	}
	// The usage of each is asked for after the walk, which holds a transaction.
	var infos []snapshots.Info
	err = s.snap.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		infos = append(infos, info)
		return nil
	})
	if err != nil {
		return u, fmt.Errorf("snapshots: %w", err)
	}
	for _, info := range infos {
		one, err := s.snap.Usage(ctx, info.Name)
		if errdefs.IsNotFound(err) {
			continue // removed meanwhile
		}
		if err != nil {
			return u, fmt.Errorf("snapshot %s: %w", info.Name, err)
		}
		if info.Kind == snapshots.KindCommitted {
			u.Layers.Add(one)
		} else {
			u.Writable.Add(one)
		}
	}
	return u, nil
}
