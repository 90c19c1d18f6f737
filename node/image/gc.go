package image

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// oldestFirst returns all images, the one that was added first at the front.
func (s *Store) oldestFirst() []Image {
	list := s.index.all()
	slices.SortStableFunc(list, func(a, b Image) int { return a.Added.Compare(b.Added) })
	return list
}

// recover collects what a killed process left: layers half unpacked, blobs and snapshots without a name. The database
// cleans a backend only when it drops an entry of that backend, so two entries are made for it to drop.
func (s *Store) recover(ctx context.Context) error {
	key := fmt.Sprintf("recover-%d", time.Now().UnixNano())
	if _, err := s.snap.Prepare(ctx, key, ""); err != nil {
		return err
	}
	if err := content.WriteBlob(ctx, s.content, key, bytes.NewReader([]byte(key)), ocispec.Descriptor{Size: int64(len(key))}); err != nil && !errdefs.IsAlreadyExists(err) {
		return err
	}
	return s.collect.collect()
}
