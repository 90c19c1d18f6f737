package image

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// pinnedLabel on the record of a name keeps its image from garbage collection.
	pinnedLabel = "knarr.dev/pinned"
	// maxConfigBytes bounds an image configuration or manifest that is read into memory.
	maxConfigBytes = 4 << 20
)

// Image describes one image. It is a copy; Config's maps and slices are shared and must not be changed.
type Image struct {
	// ID is the digest of the image's configuration, "sha256:...".
	ID string
	// RepoTags are the full names with tag, sorted; RepoDigests the full names with the manifest's digest, sorted.
	RepoTags, RepoDigests []string
	// Size is what the image's blobs (compressed layers, configuration, manifest) take, in bytes.
	Size uint64
	// Config is the image's configuration.
	Config ocispec.Image
	// Pinned images are never garbage-collected.
	Pinned bool
	// Created is the time of the build as the image says it; zero where it does not.
	Created time.Time
	// Added is when one of its names was last stored on this node: the last import or pull.
	Added time.Time
}

// index holds all that the database says about images, so that reads need no I/O. The zero value is empty.
type index struct {
	mu    sync.RWMutex
	names map[string]record   // by full name
	ids   map[string]*details // by image ID; exactly the IDs that names lead to
}

// record is one name of an image.
type record struct {
	id     string
	target ocispec.Descriptor
	pinned bool
	added  time.Time
}

// details is what the content of an image says; it never changes.
type details struct {
	id      string
	config  ocispec.Image
	size    uint64
	chainID string // snapshot of all layers; "" for an image without layers
}

// loadIndex fills the index from the database. A name whose content is not whole (a disk that lost blobs) is left out:
// the node then pulls the image again.
func (s *Store) loadIndex(ctx context.Context) error {
	list, err := s.images.List(ctx)
	if err != nil {
		return fmt.Errorf("list images: %w", err)
	}
	known := map[digest.Digest]*details{}
	for _, im := range list {
		d := known[im.Target.Digest]
		if d == nil {
			if d, err = s.inspect(ctx, im.Target); err != nil {
				continue
			}
			known[im.Target.Digest] = d
		}
		s.index.put(im, d)
	}
	return nil
}

// inspect reads what target, a manifest or an index, says about the image for this platform.
func (s *Store) inspect(ctx context.Context, target ocispec.Descriptor) (*details, error) {
	manifest, err := images.Manifest(ctx, s.content, target, s.platform)
	if err != nil {
		return nil, err
	}
	if manifest.Config.Size > maxConfigBytes {
		return nil, fmt.Errorf("image configuration of %d bytes is too large: %w", manifest.Config.Size, errdefs.ErrInvalidArgument)
	}
	raw, err := content.ReadBlob(ctx, s.content, manifest.Config)
	if err != nil {
		return nil, fmt.Errorf("image configuration: %w", err)
	}
	d := &details{id: manifest.Config.Digest.String()}
	if err := json.Unmarshal(raw, &d.config); err != nil {
		return nil, fmt.Errorf("image configuration %s: %w: %w", d.id, err, errdefs.ErrInvalidArgument)
	}
	if p := d.config.Platform; p.OS != "" && p.Architecture != "" && !s.platform.Match(p) {
		return nil, fmt.Errorf("image is for %s/%s, which this node cannot run: %w", p.OS, p.Architecture, errdefs.ErrInvalidArgument)
	}
	if len(d.config.RootFS.DiffIDs) != len(manifest.Layers) {
		return nil, fmt.Errorf("image configuration %s names %d layers, the manifest %d: %w", d.id, len(d.config.RootFS.DiffIDs), len(manifest.Layers), errdefs.ErrInvalidArgument)
	}
	if len(d.config.RootFS.DiffIDs) > 0 {
		d.chainID = identity.ChainID(d.config.RootFS.DiffIDs).String()
	}
	d.size = uint64(target.Size + manifest.Config.Size)
	for _, l := range manifest.Layers {
		d.size += uint64(l.Size)
	}
	return d, nil
}

// put makes im.Name lead to d.
func (x *index) put(im images.Image, d *details) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.names == nil {
		x.names, x.ids = map[string]record{}, map[string]*details{}
	}
	old, moved := x.names[im.Name]
	x.names[im.Name] = record{id: d.id, target: im.Target, pinned: im.Labels[pinnedLabel] != "", added: im.UpdatedAt}
	if x.ids[d.id] == nil {
		x.ids[d.id] = d
	}
	if moved {
		x.dropUnnamedLocked(old.id)
	}
}

// remove forgets name.
func (x *index) remove(name string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	r, ok := x.names[name]
	if !ok {
		return
	}
	delete(x.names, name)
	x.dropUnnamedLocked(r.id)
}

func (x *index) dropUnnamedLocked(id string) {
	for _, r := range x.names {
		if r.id == id {
			return
		}
	}
	delete(x.ids, id)
}

// find returns the image that ref means and, where ref is a name, the full name under which it is stored.
func (x *index) find(ref string) (d *details, name string, err error) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	if id, ok := parseID(ref); ok {
		if d := x.ids[id]; d != nil {
			return d, "", nil
		}
		return nil, "", notFound(ref)
	}
	full, err := Normalize(ref)
	if err != nil {
		return nil, "", err
	}
	if r, ok := x.names[full]; ok {
		return x.ids[r.id], full, nil
	}
	if repo, dgst, ok := strings.Cut(full, "@"); ok {
		for n, r := range x.names {
			if r.target.Digest.String() == dgst && repository(n) == repo {
				return x.ids[r.id], n, nil
			}
		}
		return nil, "", notFound(ref)
	}
	if prefix, ok := shortID(ref); ok {
		return x.findShortLocked(ref, prefix)
	}
	return nil, "", notFound(ref)
}

func (x *index) findShortLocked(ref, prefix string) (found *details, name string, err error) {
	for id, d := range x.ids {
		if !strings.HasPrefix(id, prefix) {
			continue
		}
		if found != nil {
			return nil, "", fmt.Errorf("image ID %q is ambiguous; give more digits: %w", ref, errdefs.ErrInvalidArgument)
		}
		found = d
	}
	if found == nil {
		return nil, "", notFound(ref)
	}
	return found, "", nil
}

func notFound(ref string) error {
	return fmt.Errorf("image %q: %w", ref, errdefs.ErrNotFound)
}

// image assembles what is told of an image to callers.
func (x *index) image(d *details) Image {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.imageLocked(d)
}

func (x *index) imageLocked(d *details) Image {
	im := Image{ID: d.id, Size: d.size, Config: d.config}
	if d.config.Created != nil {
		im.Created = *d.config.Created
	}
	for name, r := range x.names {
		if r.id != d.id {
			continue
		}
		im.Pinned = im.Pinned || r.pinned
		if r.added.After(im.Added) {
			im.Added = r.added
		}
		if repo := repository(name); repo != "" {
			im.RepoDigests = append(im.RepoDigests, repo+"@"+r.target.Digest.String())
			if !isDigested(name) {
				im.RepoTags = append(im.RepoTags, name)
			}
		}
	}
	slices.Sort(im.RepoTags)
	slices.Sort(im.RepoDigests)
	im.RepoDigests = slices.Compact(im.RepoDigests)
	return im
}

// all returns every image, sorted by its first tag and its ID.
func (x *index) all() []Image {
	x.mu.RLock()
	defer x.mu.RUnlock()
	list := make([]Image, 0, len(x.ids))
	for _, d := range x.ids {
		list = append(list, x.imageLocked(d))
	}
	slices.SortFunc(list, func(a, b Image) int {
		return strings.Compare(strings.Join(a.RepoTags, " ")+" "+a.ID, strings.Join(b.RepoTags, " ")+" "+b.ID)
	})
	return list
}

// namesOf returns every name of the image.
func (x *index) namesOf(id string) []string {
	x.mu.RLock()
	defer x.mu.RUnlock()
	var names []string
	for n, r := range x.names {
		if r.id == id {
			names = append(names, n)
		}
	}
	slices.Sort(names)
	return names
}

// targetOf returns the manifest or index behind name or, where that is not a name of image id, behind the first of its
// names. The zero Descriptor: the image is gone.
func (x *index) targetOf(id, name string) ocispec.Descriptor {
	names := x.namesOf(id)
	x.mu.RLock()
	defer x.mu.RUnlock()
	if r, ok := x.names[name]; ok && r.id == id {
		return r.target
	}
	for _, n := range names {
		if r, ok := x.names[n]; ok && r.id == id {
			return r.target
		}
	}
	return ocispec.Descriptor{}
}
