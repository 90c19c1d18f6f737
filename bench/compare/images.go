package main

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"knarr/internal/rig"
)

// packImages writes an archive with the pause image and busybox:1, which is packed as knarr packs it.
func packImages(ctx context.Context, dir, pause, file string) error {
	pauseRoot, busyboxRoot := filepath.Join(dir, "pause-root"), filepath.Join(dir, "busybox-root")
	if err := os.MkdirAll(pauseRoot, 0o755); err != nil {
		return err
	}
	program, err := os.ReadFile(pause)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(pauseRoot, "pause"), program, 0o755); err != nil {
		return err
	}
	if err := rig.BusyboxRoot(ctx, busyboxRoot); err != nil {
		return err
	}
	images := map[name.Tag]v1.Image{}
	for _, i := range []struct {
		ref, root string
		config    v1.Config
	}{
		{pauseImage, pauseRoot, v1.Config{Entrypoint: []string{"/pause"}}},
		{"docker.io/library/busybox:1", busyboxRoot, v1.Config{Cmd: []string{"sh"}, Env: []string{"PATH=/bin"}}},
	} {
		tag, err := name.NewTag(i.ref)
		if err != nil {
			return err
		}
		if images[tag], err = pack(i.root, i.config); err != nil {
			return err
		}
	}
	return tarball.MultiWriteToFile(file, images)
}

// pack makes an image of one layer.
func pack(root string, config v1.Config) (v1.Image, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		return add(w, root, path, d)
	})
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	if err != nil {
		return nil, err
	}
	image, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return nil, err
	}
	file, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.OS, file.Architecture, file.Config = "linux", runtime.GOARCH, config
	return mutate.ConfigFile(image, file)
}

func add(w *tar.Writer, root, path string, d fs.DirEntry) error {
	info, err := d.Info()
	if err != nil {
		return err
	}
	target := ""
	if d.Type() == fs.ModeSymlink {
		if target, err = os.Readlink(path); err != nil {
			return err
		}
	}
	head, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return err
	}
	if head.Name, err = filepath.Rel(root, path); err != nil {
		return err
	}
	if err := w.WriteHeader(head); err != nil || !d.Type().IsRegular() {
		return err
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	_, err = w.Write(b)
	return err
}
