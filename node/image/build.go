package image

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	tarBlock      = 512
	defaultPath   = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	caBundle      = "/etc/ssl/certs/ca-certificates.crt"
	passwdContent = "root:x:0:0:root:/root:/sbin/nologin\nnobody:x:65534:65534:nobody:/nonexistent:/sbin/nologin\n"
	groupContent  = "root:x:0:\nnogroup:x:65534:\n"
)

// BuildOptions says what to pack into an image and how its containers run.
type BuildOptions struct {
	// Ref is the name of the image. Required.
	Ref string
	// Path is what the image is made of, see Build. Required.
	Path string
	// Arch is the architecture, in Go's names. Empty: that of this machine.
	Arch string
	// Entrypoint, Cmd, Env ("NAME=value"), User, WorkingDir, ExposedPorts ("8080" or "8080/udp") and Labels are what the
	// image's containers run by. Entrypoint of a binary defaults to that binary, Env always has a PATH.
	Entrypoint, Cmd, Env []string
	User, WorkingDir     string
	ExposedPorts         []string
	Labels               map[string]string
	// GoCommand is the go command for a Path that is a Go package. Empty: "go" of the PATH.
	GoCommand string
	// Output receives what the go command prints. Nil: it is part of the error.
	Output io.Writer
}

// Archive is a built image: an OCI image layout in a tar file that Import reads. It is a nameless temporary file, so
// nothing of it stays when the process dies. Close it when done.
type Archive struct {
	*os.File
	// Ref is the full name of the image, ID its image ID, Manifest the digest of its manifest.
	Ref, ID  string
	Manifest digest.Digest
	// Size is the size of the archive, in bytes.
	Size int64
}

// Build packs o.Path into an image of one layer, without a base image:
//
//   - a static binary: the image is that binary as /<file name>, an /etc/passwd with root and nobody, /tmp, and the CA
//     certificates of this machine where it has some;
//   - a directory with Go files: the program in it, built without cgo, as such a binary;
//   - any other directory: a root file system, with modes, owners, links, devices and file capabilities as they are.
//
// The same input gives the same digest: all times in the image are zero, files are sorted. The archive is read from its
// beginning. Build needs no Store and no rights beyond reading Path.
func Build(ctx context.Context, o BuildOptions) (*Archive, error) {
	a, err := build(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("build image %s from %s: %w", o.Ref, o.Path, err)
	}
	return a, nil
}

func build(ctx context.Context, o BuildOptions) (*Archive, error) {
	if o.Ref == "" || o.Path == "" {
		return nil, errors.New("a name (-t) and a path are needed")
	}
	full, err := Normalize(o.Ref)
	if err != nil {
		return nil, err
	}
	if isDigested(full) {
		return nil, fmt.Errorf("name %q has a digest; give a tag", o.Ref)
	}
	if o.Arch == "" {
		o.Arch = runtime.GOARCH
	}
	fi, err := os.Stat(o.Path)
	if err != nil {
		return nil, err
	}
	switch {
	case fi.Mode().IsRegular():
		return packBinary(ctx, full, o, o.Path, filepath.Base(o.Path))
	case !fi.IsDir():
		return nil, errors.New("neither a file nor a directory")
	}
	isGo, err := hasGoFiles(o.Path)
	if err != nil {
		return nil, err
	}
	if !isGo {
		return pack(ctx, full, o, treeLayer(o.Path))
	}
	tmp, err := os.MkdirTemp("", "knarr-build-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	name, err := goBuild(ctx, o, tmp)
	if err != nil {
		return nil, err
	}
	return packBinary(ctx, full, o, filepath.Join(tmp, name), name)
}

// packBinary packs the program in the file path, which the image has as /name.
func packBinary(ctx context.Context, full string, o BuildOptions, path, name string) (*Archive, error) {
	if err := checkStatic(path, o.Arch); err != nil {
		return nil, err
	}
	if len(o.Entrypoint) == 0 {
		o.Entrypoint = []string{"/" + name}
	}
	return pack(ctx, full, o, binaryLayer(path, name))
}

func hasGoFiles(dir string) (bool, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return false, err
	}
	for _, e := range entries {
		if e.Type().IsRegular() && strings.HasSuffix(e.Name(), ".go") && !strings.HasSuffix(e.Name(), "_test.go") {
			return true, nil
		}
	}
	return false, nil
}

// goBuild builds the program in o.Path into dir and returns its file name.
func goBuild(ctx context.Context, o BuildOptions, dir string) (string, error) {
	abs, err := filepath.Abs(o.Path)
	if err != nil {
		return "", err
	}
	name := filepath.Base(abs)
	command := o.GoCommand
	if command == "" {
		command = "go"
	}
	cmd := exec.CommandContext(ctx, command, "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -buildid=", "-o", filepath.Join(dir, name), ".")
	cmd.Dir = abs
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+o.Arch)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if o.Output != nil {
		cmd.Stdout, cmd.Stderr = o.Output, o.Output
	}
	if err := cmd.Run(); err != nil {
		if errors.Is(err, exec.ErrNotFound) {
			return "", fmt.Errorf("%w: a directory with Go files needs the go command; or give a binary that is built already", err)
		}
		return "", fmt.Errorf("go build: %w\n%s", err, bytes.TrimSpace(out.Bytes()))
	}
	return name, nil
}

// checkStatic refuses a file that cannot run in an image of its own.
func checkStatic(path, arch string) error {
	f, err := elf.Open(path)
	if err != nil {
		return fmt.Errorf("not a Linux program (%w); give a static binary, a Go package or a root file system", err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return errors.New("the program is linked dynamically and would not find its libraries; link it statically (Go: CGO_ENABLED=0), or give a directory that has them")
		}
	}
	machines := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64, "386": elf.EM_386, "arm": elf.EM_ARM, "riscv64": elf.EM_RISCV, "s390x": elf.EM_S390, "ppc64le": elf.EM_PPC64}
	if m, ok := machines[arch]; ok && m != f.Machine {
		return fmt.Errorf("the program is for %v, the image for %s", f.Machine, arch)
	}
	return nil
}

type layerFunc func(ctx context.Context, tw *tar.Writer) error

// pack writes the archive: the layer first, then what needs the layer's digests. The place of the layer's own header in
// the tar is left free until its size is known.
func pack(ctx context.Context, full string, o BuildOptions, layer layerFunc) (_ *Archive, err error) {
	f, err := os.CreateTemp("", "knarr-image-")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if err := os.Remove(f.Name()); err != nil {
		return nil, err
	}
	layerDesc, diffID, err := packLayer(ctx, f, layer)
	if err != nil {
		return nil, err
	}
	config, err := json.Marshal(imageConfig(o, diffID))
	if err != nil {
		return nil, err
	}
	configDesc := describe(ocispec.MediaTypeImageConfig, config)
	manifest, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest,
		Config:    configDesc,
		Layers:    []ocispec.Descriptor{layerDesc},
	})
	if err != nil {
		return nil, err
	}
	manifestDesc := describe(ocispec.MediaTypeImageManifest, manifest)
	manifestDesc.Annotations = map[string]string{images.AnnotationImageName: full, ocispec.AnnotationRefName: full[strings.LastIndex(full, ":")+1:]}
	if err := finish(f, layerDesc, config, manifest, manifestDesc); err != nil {
		return nil, err
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	return &Archive{File: f, Ref: full, ID: configDesc.Digest.String(), Manifest: manifestDesc.Digest, Size: size}, nil
}

func describe(mediaType string, raw []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
}

// packLayer writes the compressed layer behind the first block of f.
func packLayer(ctx context.Context, f *os.File, layer layerFunc) (desc ocispec.Descriptor, diffID digest.Digest, err error) {
	if _, err := f.Seek(tarBlock, io.SeekStart); err != nil {
		return desc, "", err
	}
	packed, plain := digest.Canonical.Digester(), digest.Canonical.Digester()
	counted := &countingWriter{w: io.MultiWriter(f, packed.Hash())}
	// One goroutine, so that the output depends on the input alone.
	zw, err := zstd.NewWriter(counted, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		return desc, "", err
	}
	defer zw.Close()
	tw := tar.NewWriter(io.MultiWriter(zw, plain.Hash()))
	if err := layer(ctx, tw); err != nil {
		return desc, "", err
	}
	if err := tw.Close(); err != nil {
		return desc, "", err
	}
	if err := zw.Close(); err != nil {
		return desc, "", err
	}
	desc = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerZstd, Digest: packed.Digest(), Size: counted.n}
	return desc, plain.Digest(), nil
}

type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

func blobName(d digest.Digest) string { return "blobs/" + d.Algorithm().String() + "/" + d.Encoded() }

// finish writes the header of the layer in front of it, and the other files of the layout behind it.
func finish(f *os.File, layer ocispec.Descriptor, config, manifest []byte, manifestDesc ocispec.Descriptor) error {
	var head bytes.Buffer
	if err := tar.NewWriter(&head).WriteHeader(fileHeader(blobName(layer.Digest), layer.Size)); err != nil {
		return err
	}
	if head.Len() != tarBlock {
		return fmt.Errorf("layer of %d bytes is too large for the archive", layer.Size)
	}
	if _, err := f.WriteAt(head.Bytes(), 0); err != nil {
		return err
	}
	end := tarBlock + (layer.Size+tarBlock-1)/tarBlock*tarBlock
	if err := f.Truncate(end); err != nil {
		return err
	}
	if _, err := f.Seek(end, io.SeekStart); err != nil {
		return err
	}
	index, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{manifestDesc}})
	if err != nil {
		return err
	}
	layout, err := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	if err != nil {
		return err
	}
	tw := tar.NewWriter(f)
	for _, file := range []struct {
		name string
		data []byte
	}{
		{blobName(digest.FromBytes(config)), config},
		{blobName(manifestDesc.Digest), manifest},
		{ocispec.ImageIndexFile, index},
		{ocispec.ImageLayoutFile, layout},
	} {
		if err := tw.WriteHeader(fileHeader(file.name, int64(len(file.data)))); err != nil {
			return err
		}
		if _, err := tw.Write(file.data); err != nil {
			return err
		}
	}
	return tw.Close()
}

func fileHeader(name string, size int64) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644, ModTime: time.Unix(0, 0)}
}

// imageConfig is the configuration of the image. Its time is zero, as that of every file.
func imageConfig(o BuildOptions, diffID digest.Digest) ocispec.Image {
	zero := time.Unix(0, 0).UTC()
	c := ocispec.Image{
		Created:  &zero,
		Platform: ocispec.Platform{OS: "linux", Architecture: o.Arch},
		Config: ocispec.ImageConfig{
			User:       o.User,
			Env:        withPath(o.Env),
			Entrypoint: o.Entrypoint,
			Cmd:        o.Cmd,
			WorkingDir: o.WorkingDir,
			Labels:     o.Labels,
		},
		RootFS:  ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{diffID}},
		History: []ocispec.History{{Created: &zero, CreatedBy: "knarr image build"}},
	}
	for _, p := range o.ExposedPorts {
		if !strings.Contains(p, "/") {
			p += "/tcp"
		}
		if c.Config.ExposedPorts == nil {
			c.Config.ExposedPorts = map[string]struct{}{}
		}
		c.Config.ExposedPorts[p] = struct{}{}
	}
	return c
}

func withPath(env []string) []string {
	for _, e := range env {
		if strings.HasPrefix(e, "PATH=") {
			return env
		}
	}
	return append([]string{defaultPath}, env...)
}
