package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// maxManifestBytes bounds manifest.json, index.json and oci-layout of an archive.
	maxManifestBytes = 20 << 20
	// maxArchiveFiles bounds the files of an archive.
	maxArchiveFiles = 100_000
	dockerManifest  = "manifest.json"
)

// Import stores the images of an archive: the output of docker save or an OCI image layout as a tar, plain or compressed
// with gzip or zstd. Names of the archive move to its images; names, where given, take their place (for an archive of
// one image). The images are pinned: garbage collection never takes them, Remove does. The archive is read once, from
// beginning to end; blobs that are here or in the shared directory are skipped. On an error nothing of it stays.
func (s *Store) Import(ctx context.Context, r io.Reader, names ...string) ([]Image, error) {
	full := make([]string, 0, len(names))
	for _, n := range names {
		f, err := Normalize(n)
		if err != nil {
			return nil, err
		}
		full = append(full, f)
	}
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	ctx, done, err := s.withLease(ctx)
	if err != nil {
		return nil, err
	}
	list, err := s.importArchive(ctx, r, full)
	done()
	// What the archive had beside its images goes, and so do images that lost their last name.
	if gcErr := s.collect.collect(); err == nil && gcErr != nil {
		err = fmt.Errorf("free what the archive replaced: %w", gcErr)
	}
	if err != nil {
		return nil, fmt.Errorf("import: %w", err)
	}
	return list, nil
}

func (s *Store) importArchive(ctx context.Context, r io.Reader, names []string) ([]Image, error) {
	plain, closePlain, err := decompress(r)
	if err != nil {
		return nil, err
	}
	defer closePlain()
	a := archiveReader{store: s, blobs: map[string]ocispec.Descriptor{}, links: map[string]string{}}
	if err := a.read(ctx, plain); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = fmt.Errorf("the archive is cut off: %w", err)
		}
		return nil, err
	}
	targets, err := a.targets(ctx)
	if err != nil {
		return nil, err
	}
	if len(targets) == 0 {
		return nil, fmt.Errorf("the archive has no images: %w", errdefs.ErrInvalidArgument)
	}
	if len(names) > 0 {
		if len(targets) > 1 {
			return nil, fmt.Errorf("a name was given for an archive of %d images: %w", len(targets), errdefs.ErrInvalidArgument)
		}
		targets[0].names = names
	}
	var list []Image
	for _, t := range targets {
		d, err := s.adopt(ctx, t.desc, nil, t.names, true)
		if err != nil {
			return nil, err
		}
		list = append(list, s.index.image(d))
	}
	return list, nil
}

// archiveReader takes an archive apart: blobs go to the content store, the small files that say what they are to memory.
type archiveReader struct {
	store  *Store
	files  int
	layout []byte // oci-layout
	index  []byte // index.json
	docker []byte // manifest.json
	blobs  map[string]ocispec.Descriptor
	links  map[string]string // symbolic links of docker's old format: name to target
}

// imported is one image of an archive with its full names.
type imported struct {
	desc  ocispec.Descriptor
	names []string
}

func (a *archiveReader) read(ctx context.Context, r io.Reader) error {
	tr := tar.NewReader(r)
	for {
		hdr, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			if a.files == 0 {
				return fmt.Errorf("not an image archive (docker save or OCI layout): %w: %w", err, errdefs.ErrInvalidArgument)
			}
			return fmt.Errorf("read archive: %w", err)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if a.files++; a.files > maxArchiveFiles {
			return fmt.Errorf("archive has more than %d files: %w", maxArchiveFiles, errdefs.ErrInvalidArgument)
		}
		if err := a.entry(ctx, tr, hdr); err != nil {
			return fmt.Errorf("%s in archive: %w", hdr.Name, err)
		}
	}
}

func (a *archiveReader) entry(ctx context.Context, tr *tar.Reader, hdr *tar.Header) (err error) {
	name := path.Clean(hdr.Name)
	switch {
	case hdr.Typeflag == tar.TypeSymlink:
		a.links[name] = path.Join(path.Dir(name), hdr.Linkname)
	case hdr.Typeflag != tar.TypeReg:
	case name == ocispec.ImageLayoutFile:
		a.layout, err = readSmall(tr)
	case name == ocispec.ImageIndexFile:
		a.index, err = readSmall(tr)
	case name == dockerManifest:
		a.docker, err = readSmall(tr)
	case name == "repositories" || path.Base(name) == "VERSION" || path.Base(name) == "json":
		// Docker's oldest format; manifest.json says the same.
	default:
		a.blobs[name], err = a.blob(ctx, tr, name, hdr.Size)
	}
	return err
}

func readSmall(r io.Reader) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxManifestBytes+1))
	if err == nil && len(b) > maxManifestBytes {
		err = fmt.Errorf("larger than %d bytes: %w", maxManifestBytes, errdefs.ErrInvalidArgument)
	}
	return b, err
}

// blob stores one file of an archive. Its name may tell its digest (blobs/sha256/<hex>): then a blob that is here
// already is not read, and one that is not what its name says is refused.
func (a *archiveReader) blob(ctx context.Context, r io.Reader, name string, size int64) (ocispec.Descriptor, error) {
	s := a.store
	desc := ocispec.Descriptor{Size: size}
	ref := fmt.Sprintf("import-%p-%d", a, a.files)
	if hex, ok := strings.CutPrefix(name, ocispec.ImageBlobsDir+"/sha256/"); ok {
		desc.Digest = digest.NewDigestFromEncoded(digest.SHA256, hex)
		if err := desc.Digest.Validate(); err != nil {
			return desc, err
		}
		ref = "import-" + desc.Digest.String()
	}
	w, err := content.OpenWriter(ctx, s.content, content.WithRef(ref), content.WithDescriptor(desc))
	if errdefs.IsAlreadyExists(err) {
		return desc, nil
	}
	if err != nil {
		return desc, err
	}
	defer w.Close()
	expected := desc.Digest
	if st, err := w.Status(); err != nil || st.Offset != size || expected == "" {
		if err := w.Truncate(0); err != nil {
			return desc, err
		}
		if _, err := io.Copy(w, r); err != nil {
			return desc, err
		}
	}
	desc.Digest = w.Digest()
	if err := w.Commit(ctx, size, expected); err != nil && !errdefs.IsAlreadyExists(err) {
		_ = s.content.Abort(ctx, ref)
		return desc, err
	}
	return desc, nil
}

// targets returns the images of the archive. An OCI layout rules over docker's manifest.json beside it.
func (a *archiveReader) targets(ctx context.Context) ([]imported, error) {
	for name, to := range a.links {
		if desc, ok := a.blobs[to]; ok {
			a.blobs[name] = desc
		}
	}
	switch {
	case a.layout != nil && a.index != nil:
		return a.ociTargets()
	case a.docker != nil:
		return a.dockerTargets(ctx)
	}
	return nil, fmt.Errorf("neither manifest.json (docker save) nor oci-layout and index.json in the archive: %w", errdefs.ErrInvalidArgument)
}

// dockerImage is an entry of manifest.json.
type dockerImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

func (a *archiveReader) dockerImages() ([]dockerImage, error) {
	var list []dockerImage
	if err := json.Unmarshal(a.docker, &list); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", dockerManifest, err, errdefs.ErrInvalidArgument)
	}
	return list, nil
}

func normalizeAll(names []string) ([]string, error) {
	var full []string
	for _, n := range names {
		f, err := Normalize(n)
		if err != nil {
			return nil, err
		}
		full = append(full, f)
	}
	return full, nil
}

func (a *archiveReader) ociTargets() ([]imported, error) {
	var idx ocispec.Index
	if err := json.Unmarshal(a.index, &idx); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", ocispec.ImageIndexFile, err, errdefs.ErrInvalidArgument)
	}
	var list []imported
	seen := map[digest.Digest]int{}
	for _, m := range idx.Manifests {
		if !images.IsManifestType(m.MediaType) && !images.IsIndexType(m.MediaType) {
			continue
		}
		names, err := normalizeAll(annotatedNames(m))
		if err != nil {
			return nil, err
		}
		if i, ok := seen[m.Digest]; ok {
			list[i].names = append(list[i].names, names...)
			continue
		}
		seen[m.Digest] = len(list)
		list = append(list, imported{desc: m, names: names})
	}
	return list, a.namesOfDocker(list)
}

// annotatedNames returns the name that index.json gives a manifest. A bare tag, which the OCI allows, names no image.
func annotatedNames(m ocispec.Descriptor) []string {
	if n := m.Annotations[images.AnnotationImageName]; n != "" {
		return []string{n}
	}
	if n := m.Annotations[ocispec.AnnotationRefName]; strings.ContainsAny(n, ":/") {
		return []string{n}
	}
	return nil
}

// namesOfDocker gives images that index.json does not name the names that manifest.json has for them, by its order.
func (a *archiveReader) namesOfDocker(list []imported) error {
	if a.docker == nil {
		return nil
	}
	entries, err := a.dockerImages()
	if err != nil || len(entries) != len(list) {
		return err
	}
	for i := range list {
		if len(list[i].names) == 0 {
			if list[i].names, err = normalizeAll(entries[i].RepoTags); err != nil {
				return err
			}
		}
	}
	return nil
}

// dockerTargets writes the manifests that docker's format does not have.
func (a *archiveReader) dockerTargets(ctx context.Context) ([]imported, error) {
	entries, err := a.dockerImages()
	if err != nil {
		return nil, err
	}
	var list []imported
	for _, e := range entries {
		config, ok := a.blobs[path.Clean(e.Config)]
		if !ok {
			return nil, fmt.Errorf("image configuration %q is missing: %w", e.Config, errdefs.ErrInvalidArgument)
		}
		config.MediaType = images.MediaTypeDockerSchema2Config
		m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: images.MediaTypeDockerSchema2Manifest, Config: config}
		for _, l := range e.Layers {
			layer, ok := a.blobs[path.Clean(l)]
			if !ok {
				return nil, fmt.Errorf("layer %q is missing: %w", l, errdefs.ErrInvalidArgument)
			}
			if layer.MediaType, err = a.layerType(ctx, layer); err != nil {
				return nil, err
			}
			m.Layers = append(m.Layers, layer)
		}
		desc, err := a.writeManifest(ctx, m)
		if err != nil {
			return nil, err
		}
		names, err := normalizeAll(e.RepoTags)
		if err != nil {
			return nil, err
		}
		list = append(list, imported{desc, names})
	}
	return list, nil
}

// layerType returns the media type of a layer by its first bytes.
func (a *archiveReader) layerType(ctx context.Context, desc ocispec.Descriptor) (string, error) {
	ra, err := a.store.content.ReaderAt(ctx, desc)
	if err != nil {
		return "", err
	}
	defer ra.Close()
	head := make([]byte, len(zstdMagic))
	if _, err := ra.ReadAt(head, 0); err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	switch {
	case bytes.HasPrefix(head, gzipMagic):
		return images.MediaTypeDockerSchema2LayerGzip, nil
	case bytes.HasPrefix(head, zstdMagic):
		return images.MediaTypeDockerSchema2LayerZstd, nil
	}
	return images.MediaTypeDockerSchema2Layer, nil
}

func (a *archiveReader) writeManifest(ctx context.Context, m ocispec.Manifest) (ocispec.Descriptor, error) {
	raw, err := json.Marshal(m)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{MediaType: m.MediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	err = content.WriteBlob(ctx, a.store.content, "import-"+desc.Digest.String(), bytes.NewReader(raw), desc)
	return desc, err
}
