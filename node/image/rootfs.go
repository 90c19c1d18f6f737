package image

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

const (
	// rootfsPrefix begins the snapshot key of a container's root file system, viewPrefix that of a read-only view.
	rootfsPrefix = "rootfs/"
	viewPrefix   = "view/"
	// gcRootLabel makes a snapshot stay, and all below it, until it is removed.
	gcRootLabel = "containerd.io/gc.root"
)

// NewRootfs prepares the writable root file system of container id on the image that ref means, and returns what to
// mount. It is idempotent: where id has a root file system already, that one is returned, whatever ref means now.
// Nothing is mounted. The mounts are valid until RemoveRootfs, also after a restart of the process.
func (s *Store) NewRootfs(ctx context.Context, id, ref string) ([]mount.Mount, error) {
	return s.newSnapshot(ctx, rootfsPrefix, id, ref, s.snap.Prepare)
}

// NewView is as NewRootfs, but what it returns is read-only: for volumes that are images.
func (s *Store) NewView(ctx context.Context, id, ref string) ([]mount.Mount, error) {
	return s.newSnapshot(ctx, viewPrefix, id, ref, s.snap.View)
}

// makeSnapshot is Prepare or View of a snapshotter.
type makeSnapshot func(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error)

func (s *Store) newSnapshot(ctx context.Context, prefix, id, ref string, create makeSnapshot) ([]mount.Mount, error) {
	if id == "" {
		return nil, fmt.Errorf("root file system without an ID: %w", errdefs.ErrInvalidArgument)
	}
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	key := prefix + id
	if err := s.keys.Lock(ctx, key); err != nil {
		return nil, err
	}
	defer s.keys.Unlock(key)
	mounts, err := s.snap.Mounts(ctx, key)
	if err == nil {
		return mounts, nil
	}
	if !errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("root file system of %s: %w", id, err)
	}
	return s.onImage(ctx, key, ref, create)
}

// onImage makes snapshot key on the layers of the image that ref means.
func (s *Store) onImage(ctx context.Context, key, ref string, create makeSnapshot) ([]mount.Mount, error) {
	d, _, err := s.index.find(ref)
	if err != nil {
		return nil, err
	}
	label := snapshots.WithLabels(map[string]string{gcRootLabel: time.Now().UTC().Format(time.RFC3339)})
	mounts, err := create(ctx, key, d.chainID, label)
	if errdefs.IsNotFound(err) {
		// The layers are gone though the image is there (a lost snapshot database): unpack them again.
		leased, done, lerr := s.withLease(ctx)
		if lerr != nil {
			return nil, lerr
		}
		defer done()
		if err := s.unpack(leased, s.index.targetOf(d.id, ""), nil); err != nil {
			return nil, fmt.Errorf("unpack image %s: %w", ref, err)
		}
		mounts, err = create(leased, key, d.chainID, label)
	}
	if err != nil {
		return nil, fmt.Errorf("root file system on image %s: %w", ref, err)
	}
	return mounts, nil
}

// RemoveRootfs removes the root file system of container id with all that was written to it; the disk space is free on
// return. It must not be mounted any more. Where there is none the result is nil.
func (s *Store) RemoveRootfs(ctx context.Context, id string) error {
	return s.removeSnapshot(ctx, rootfsPrefix+id)
}

// RemoveView removes what NewView made.
func (s *Store) RemoveView(ctx context.Context, id string) error {
	return s.removeSnapshot(ctx, viewPrefix+id)
}

func (s *Store) removeSnapshot(ctx context.Context, key string) error {
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	if _, err := s.snap.Stat(ctx, key); err != nil {
		if errdefs.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("remove %s: %w", key, err)
	}
	return s.collect.collect(key)
}

// Rootfs returns the container IDs that have a root file system, so that an agent finds those that outlived a crash.
func (s *Store) Rootfs(ctx context.Context) ([]string, error) {
	var ids []string
	err := s.snap.Walk(s.scope(ctx), func(_ context.Context, info snapshots.Info) error {
		if id, ok := strings.CutPrefix(info.Name, rootfsPrefix); ok {
			ids = append(ids, id)
		}
		return nil
	})
	return ids, err
}

// Usage returns what container id has written to its root file system, in bytes and inodes. It walks those files.
func (s *Store) Usage(ctx context.Context, id string) (snapshots.Usage, error) {
	return s.snap.Usage(s.scope(ctx), rootfsPrefix+id)
}
