package image

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/unpack"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/semaphore"
)

// unpack makes the image behind target whole: it fetches what is missing with fetch (nil: all must be there), labels
// blobs so that each keeps its children alive, picks this platform's manifest, and unpacks its layers in order. Layers
// download beside each other and beside the unpacking; what another call fetches or unpacks at the same time is waited
// for, not done twice. ctx must carry a lease.
//
// Layers are unpacked one after the other although overlay could take them in any order: a layer may leave out the
// entry of a directory that a lower layer has, and only on top of that one it gets the right owner and mode.
func (s *Store) unpack(ctx context.Context, target ocispec.Descriptor, fetch images.Handler) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	children := images.ChildrenHandler(s.content)
	children = images.SetChildrenMappedLabels(s.content, children, nil)
	children = images.FilterPlatforms(children, s.platform)
	children = images.LimitManifests(children, s.platform, 1)
	handler := images.Handler(children)
	if fetch != nil {
		handler = images.Handlers(fetch, children)
	}
	u, err := unpack.NewUnpacker(ctx, s.content,
		unpack.WithUnpackPlatform(unpack.Platform{
			Platform:       platforms.All,
			SnapshotterKey: s.kind,
			Snapshotter:    s.snap,
			Applier:        applier{s.content},
		}),
		unpack.WithDuplicationSuppressor(&s.keys),
		unpack.WithLimiter(semaphore.NewWeighted(maxConcurrentLayers)),
		unpack.WithFetchAllContent(),
	)
	if err != nil {
		return err
	}
	if err := images.Dispatch(ctx, u.Unpack(handler), nil, target); err != nil {
		cancel()
		_, unpackErr := u.Wait()
		if errors.Is(err, context.Canceled) && unpackErr != nil {
			return unpackErr
		}
		return err
	}
	_, err = u.Wait()
	return err
}

// adopt unpacks target, whose blobs fetch gets, and stores that names mean it. A name that cannot run here is refused.
func (s *Store) adopt(ctx context.Context, target ocispec.Descriptor, fetch images.Handler, names []string, pinned bool) (*details, error) {
	if err := s.unpack(ctx, target, fetch); err != nil {
		return nil, err
	}
	d, err := s.inspect(ctx, target)
	if err != nil {
		return nil, err
	}
	if len(names) == 0 {
		names = []string{d.id}
	}
	for _, n := range names {
		if err := s.name(ctx, n, target, d, pinned); err != nil {
			return nil, fmt.Errorf("%s: %w", n, err)
		}
	}
	return d, nil
}
