package image

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// chunkBytes is the size of the pieces in which decompressed data goes to the goroutine that writes files.
	chunkBytes = 256 << 10
	// maxChunksAhead bounds how far decompression runs ahead of that.
	maxChunksAhead = 4
	// readBufferBytes is the size of reads of compressed data.
	readBufferBytes = 64 << 10
	// maxZstdWindow bounds the memory that a zstd stream may ask for.
	maxZstdWindow = 128 << 20
)

var (
	gzipMagic = []byte{0x1f, 0x8b}
	zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd}
)

// applier unpacks layers into snapshots. It writes into the snapshot's directory itself, so nothing is mounted, and
// decompresses in this process, beside writing the files. It implements diff.Applier.
type applier struct{ store content.Provider }

// Apply unpacks layer desc into the snapshot that mounts describe, and returns the digest and size of the plain tar.
func (a applier) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, _ ...diff.ApplyOpt) (ocispec.Descriptor, error) {
	var none ocispec.Descriptor
	root, opts, err := applyTarget(mounts)
	if err != nil {
		return none, err
	}
	ra, err := a.store.ReaderAt(ctx, desc)
	if err != nil {
		return none, err
	}
	defer ra.Close()
	plain, closePlain, err := decompress(content.NewReader(ra))
	if err != nil {
		return none, fmt.Errorf("layer %s: %w", desc.Digest, err)
	}
	defer closePlain()
	ahead := newReadAhead(plain)
	defer ahead.Close()
	digester := digest.Canonical.Digester()
	counted := &countingReader{r: io.TeeReader(ahead, digester.Hash())}
	if _, err := archive.Apply(ctx, root, counted, opts...); err != nil {
		return none, err
	}
	// The digest is over all of the stream, also over padding behind the end of the archive.
	if _, err := io.Copy(io.Discard, counted); err != nil {
		return none, err
	}
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Size: counted.n, Digest: digester.Digest()}, nil
}

// applyTarget returns the directory that a snapshot's files go to and how whiteouts are represented there.
func applyTarget(mounts []mount.Mount) (dir string, opts []archive.ApplyOpt, err error) {
	if len(mounts) != 1 {
		return "", nil, fmt.Errorf("snapshot of %d mounts: %w", len(mounts), errdefs.ErrNotImplemented)
	}
	m := mounts[0]
	if m.Type == "bind" {
		return m.Source, nil, nil
	}
	for _, o := range m.Options {
		if upper, ok := strings.CutPrefix(o, "upperdir="); ok {
			dir = upper
		} else if lower, ok := strings.CutPrefix(o, "lowerdir="); ok {
			opts = append(opts, archive.WithParents(strings.Split(lower, ":")))
		}
	}
	if m.Type != "overlay" || dir == "" {
		return "", nil, fmt.Errorf("snapshot mounted as %s: %w", m.Type, errdefs.ErrNotImplemented)
	}
	return dir, append(opts, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout)), nil
}

// decompress returns the plain data of r, which is gzip, zstd or plain. Call closeFn when done with it.
func decompress(r io.Reader) (plain io.Reader, closeFn func(), err error) {
	br := bufio.NewReaderSize(r, readBufferBytes)
	head, err := br.Peek(len(zstdMagic))
	if err != nil && err != io.EOF {
		return nil, nil, err
	}
	switch {
	case bytes.HasPrefix(head, gzipMagic):
		zr, err := gzip.NewReader(br)
		if err != nil {
			return nil, nil, err
		}
		return zr, func() { zr.Close() }, nil
	case bytes.HasPrefix(head, zstdMagic):
		zr, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxZstdWindow))
		if err != nil {
			return nil, nil, err
		}
		return zr, zr.Close, nil
	}
	return br, func() {}, nil
}

type countingReader struct {
	r io.Reader
	n int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// readAhead reads a stream in a goroutine of its own, at most maxChunksAhead chunks ahead of its reader.
type readAhead struct {
	chunks chan chunk
	free   chan []byte
	stop   chan struct{}
	ended  chan struct{}
	cur    []byte // what is unread of buf
	buf    []byte
	err    error
}

type chunk struct {
	buf []byte // full capacity
	n   int
	err error
}

func newReadAhead(r io.Reader) *readAhead {
	a := &readAhead{
		chunks: make(chan chunk, maxChunksAhead),
		free:   make(chan []byte, maxChunksAhead),
		stop:   make(chan struct{}),
		ended:  make(chan struct{}),
	}
	for range maxChunksAhead {
		a.free <- nil // made when first used: most layers are small
	}
	go a.fill(r)
	return a
}

func (a *readAhead) fill(r io.Reader) {
	defer close(a.ended)
	for {
		var buf []byte
		select {
		case buf = <-a.free:
		case <-a.stop:
			return
		}
		if buf == nil {
			buf = make([]byte, chunkBytes)
		}
		var n int
		var err error
		for n < len(buf) && err == nil {
			var m int
			m, err = r.Read(buf[n:])
			n += m
		}
		a.chunks <- chunk{buf, n, err} // never blocks: there are as many places as buffers
		if err != nil {
			return
		}
	}
}

// Read implements io.Reader.
func (a *readAhead) Read(p []byte) (int, error) {
	for len(a.cur) == 0 {
		if a.err != nil {
			return 0, a.err
		}
		if a.buf != nil {
			a.free <- a.buf
		}
		c := <-a.chunks
		a.buf, a.cur, a.err = c.buf, c.buf[:c.n], c.err
	}
	n := copy(p, a.cur)
	a.cur = a.cur[n:]
	return n, nil
}

// Close stops reading and returns when the goroutine has ended. The stream below is not closed.
func (a *readAhead) Close() error {
	close(a.stop)
	<-a.ended
	return nil
}
