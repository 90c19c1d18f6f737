package image

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/metadata/boltutil"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
)

// Resolve returns the image that ref means: any form of a name ("whoami:1" is "docker.io/library/whoami:1"), name@digest,
// or an image ID, in full or its first eight digits or more, with or without "sha256:". The error is errdefs.ErrNotFound
// or, for what cannot be a name, errdefs.ErrInvalidArgument.
func (s *Store) Resolve(_ context.Context, ref string) (Image, error) {
	d, _, err := s.index.find(ref)
	if err != nil {
		return Image{}, err
	}
	return s.index.image(d), nil
}

// List returns all images, sorted by name.
func (s *Store) List(context.Context) ([]Image, error) { return s.index.all(), nil }

// Tag gives the image that ref means the further name, which loses the image that it meant before. The name is pinned
// where the image is.
func (s *Store) Tag(ctx context.Context, ref, name string) error {
	full, err := Normalize(name)
	if err != nil {
		return err
	}
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	s.naming.Lock()
	defer s.naming.Unlock()
	d, found, err := s.index.find(ref)
	if err != nil {
		return err
	}
	return s.name(ctx, full, s.index.targetOf(d.id, found), d, s.index.image(d).Pinned)
}

// name stores that the full name means target, whose content is d, and tells the index.
func (s *Store) name(ctx context.Context, full string, target ocispec.Descriptor, d *details, pinned bool) error {
	target.Annotations, target.Platform = nil, nil
	im := images.Image{Name: full, Target: target, Labels: map[string]string{}}
	if pinned {
		im.Labels[pinnedLabel] = "true"
	}
	stored, err := s.images.Create(ctx, im)
	if errdefs.IsAlreadyExists(err) {
		stored, err = s.images.Update(ctx, im, "target", "labels")
	}
	if err != nil {
		return fmt.Errorf("store image name %s: %w", full, err)
	}
	s.index.put(stored, d)
	return nil
}

// Remove removes the name ref, or all names of the image whose ID ref is. An image without a name is removed with the
// layers that no other image and no container uses; their disk space is free on return. A container that runs from the
// image keeps its root file system.
func (s *Store) Remove(ctx context.Context, ref string) error {
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	s.naming.Lock()
	defer s.naming.Unlock()
	d, name, err := s.index.find(ref)
	if err != nil {
		return err
	}
	names := s.index.namesOf(d.id)
	if name != "" && s.tagsBeside(names, name) {
		names = []string{name}
	}
	return s.removeNames(ctx, names)
}

// tagsBeside reports whether names has a tag other than name: then removing name leaves the image.
func (s *Store) tagsBeside(names []string, name string) bool {
	for _, n := range names {
		if n != name && !isDigested(n) {
			return true
		}
	}
	return false
}

func (s *Store) removeNames(ctx context.Context, names []string) error {
	for _, n := range names {
		if err := s.images.Delete(ctx, n); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("remove image name %s: %w", n, err)
		}
		s.index.remove(n)
	}
	if err := s.collect.collect(); err != nil {
		return fmt.Errorf("free the layers: %w", err)
	}
	return nil
}

// GC removes images until their sizes add up to at least target bytes (0: one image is enough; negative: all), the one
// with the earliest Added first. Images that are pinned, or for which inUse(id) is true, stay. It returns the sum
// of the sizes of the removed images; layers that others share make what is freed less than that.
func (s *Store) GC(ctx context.Context, inUse func(id string) bool, target int64) (freed int64, err error) {
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return 0, err
	}
	defer end()
	s.naming.Lock()
	defer s.naming.Unlock()
	var errs []error
	for _, im := range s.oldestFirst() {
		if target >= 0 && freed > 0 && freed >= target {
			break
		}
		if im.Pinned || inUse(im.ID) {
			continue
		}
		if err := s.removeNames(ctx, s.index.namesOf(im.ID)); err != nil {
			errs = append(errs, err)
			continue
		}
		freed += int64(im.Size)
	}
	return freed, errors.Join(errs...)
}

// collector removes snapshots, and what nothing refers to any more. Callers that come while it is at work share the next run, which has one transaction for all of them: pods that
// end together would otherwise have the disk sync some times for each.
type collector struct {
	run func(remove []string) error

	mu      sync.Mutex
	running bool
	next    *collection // asked for while another one runs; nil: nobody waits
}

type collection struct {
	remove []string // keys of snapshots
	done   chan struct{}
	err    error
}

// collect removes these snapshots, where they exist, and returns after a collection that began after the call. An error may be that of another one who shared it.
func (c *collector) collect(remove ...string) error {
	c.mu.Lock()
	if c.running {
		if c.next == nil {
			c.next = &collection{done: make(chan struct{})}
		}
		n := c.next
		n.remove = append(n.remove, remove...)
		c.mu.Unlock()
		<-n.done
		return n.err
	}
	c.running = true
	c.mu.Unlock()
	err := c.run(remove)
	for {
		c.mu.Lock()
		n := c.next
		c.next = nil
		if n == nil {
			c.running = false
			c.mu.Unlock()
			return err
		}
		c.mu.Unlock()
		n.err = c.run(n.remove)
		close(n.done)
	}
}

// collectGarbage is a run of the collector. Only one is under way at a time: a removal inside of a transaction and a collection of the snapshotter would wait for each other.
func (s *Store) collectGarbage(remove []string) error {
	ctx := s.background()
	if len(remove) > 0 {
		err := s.db.Update(func(tx *bolt.Tx) error {
			ctx := boltutil.WithTransaction(ctx, tx)
			for _, key := range remove {
				if err := s.snap.Remove(ctx, key); err != nil && !errdefs.IsNotFound(err) {
					return fmt.Errorf("remove %s: %w", key, err)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	_, err := s.db.GarbageCollect(ctx)
	return err
}
