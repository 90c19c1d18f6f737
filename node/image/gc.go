package image

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
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
	leased, done, err := s.withLease(ctx) // a write without a lease would stay for a day, should this process be killed too
	if err != nil {
		return err
	}
	key := fmt.Sprintf("recover-%d", time.Now().UnixNano())
	_, err = s.snap.Prepare(leased, key, "")
	if err == nil {
		err = content.WriteBlob(leased, s.content, key, strings.NewReader(key), ocispec.Descriptor{Size: int64(len(key))})
	}
	done()
	if err != nil {
		return err
	}
	return s.collect.collect()
}
