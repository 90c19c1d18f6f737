package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// stallTimeout ends a pull that received nothing for so long.
	stallTimeout = 2 * time.Minute
	// progressEvery is the least time between two reports of the same pull, but for the last one.
	progressEvery = 100 * time.Millisecond
)

// Progress is how far a pull is. Total grows while manifests and layers become known; Done never exceeds it.
type Progress struct {
	// Ref is the full name of the image.
	Ref string
	// Done and Total are bytes of compressed content, without what was on the node before.
	Done, Total int64
}

// Pull gets the image ref from its registry, or a mirror of that (Options.RegistryConfigPath), and names it; a name that means another image moves.
// Where the registry's image is here already only its name is asked for. The pulled image is not pinned.
//
// Calls for the same image with the same credentials share the work. progress may be nil; it is called from one
// goroutine at a time and must return soon.
//
// Errors: errdefs.ErrInvalidArgument for a name that is none, errdefs.ErrNotFound where the registry has no such image,
// ErrUnauthorized, ErrRegistryUnavailable, ErrUnreachable, or what went wrong. An interrupted pull resumes where it stopped.
func (s *Store) Pull(ctx context.Context, ref string, auth Auth, progress func(Progress)) (Image, error) {
	full, err := Normalize(ref)
	if err != nil {
		return Image{}, err
	}
	d, err := s.pulls.do(ctx, full+"\x00"+auth.fingerprint(), progress, func(ctx context.Context, report func(Progress)) (*details, error) {
		ctx, end, err := s.begin(ctx)
		if err != nil {
			return nil, err
		}
		defer end()
		return s.pull(ctx, full, auth, report)
	})
	if errors.Is(err, ErrUnreachable) && s.opts.ImportedWhenUnreachable {
		if im, findErr := s.Resolve(ctx, full); findErr == nil && im.Pinned {
			return im, nil
		}
	}
	if err != nil {
		return Image{}, fmt.Errorf("failed to pull and unpack image %q: %w", full, err)
	}
	return s.index.image(d), nil
}

func (s *Store) pull(ctx context.Context, full string, auth Auth, report func(Progress)) (*details, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	hosts := newHosts(s.opts, auth)
	defer hosts.close()
	resolver := docker.NewResolver(docker.ResolverOptions{Hosts: hosts.of, Headers: hosts.headers()})
	p := &puller{store: s, base: ctx, progress: Progress{Ref: full}, report: report}
	p.stall = time.AfterFunc(stallTimeout, func() { cancel(errStalled) })
	defer p.stall.Stop()

	name, target, err := resolver.Resolve(ctx, full)
	if err != nil {
		return nil, fmt.Errorf("failed to resolve reference %q: %w", full, classify(cause(ctx, err)))
	}
	if p.fetcher, err = resolver.Fetcher(ctx, name); err != nil {
		return nil, err
	}
	leased, done, err := s.withLease(ctx)
	if err != nil {
		return nil, err
	}
	names := []string{full}
	if !isDigested(full) {
		names = append(names, repository(full)+"@"+target.Digest.String())
	}
	d, err := s.adopt(leased, target, images.HandlerFunc(p.fetch), names, false)
	done()
	if err != nil {
		return nil, classify(cause(ctx, err))
	}
	p.flush()
	return d, nil
}

var errStalled = fmt.Errorf("the registry sent nothing for %v", stallTimeout)

// cause returns why ctx ended when that is what err comes from.
func cause(ctx context.Context, err error) error {
	if c := context.Cause(ctx); c != nil && errors.Is(err, context.Canceled) {
		return c
	}
	return err
}

// puller fetches the blobs of one pull.
type puller struct {
	store   *Store
	base    context.Context // without lease, see fetch
	fetcher remotes.Fetcher
	report  func(Progress)
	stall   *time.Timer

	done, total atomic.Int64
	lastReport  atomic.Int64 // Unix nanoseconds
	progress    Progress     // Ref only
}

// fetch makes sure that blob desc is in the content store, under the lease of ctx. Partial content belongs to no lease,
// so that it stays (for 24 hours) when this pull fails, and the next one resumes it.
func (p *puller) fetch(ctx context.Context, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	if desc.MediaType == images.MediaTypeDockerSchema1Manifest {
		return nil, fmt.Errorf("image manifest of schema 1 is not supported, the image must be rebuilt: %w", errdefs.ErrNotImplemented)
	}
	if desc.Size <= 0 {
		return nil, fmt.Errorf("the registry reports %d bytes for %s: %w", desc.Size, desc.Digest, errdefs.ErrInvalidArgument)
	}
	ref := remotes.MakeRefKey(ctx, desc)
	cs := p.store.content
	w, err := content.OpenWriter(p.base, cs, content.WithRef(ref), content.WithDescriptor(desc))
	if errdefs.IsAlreadyExists(err) {
		// Once more under the lease, so that it is not collected. Should it be just now, this opens a writer.
		w, err = content.OpenWriter(ctx, cs, content.WithRef(ref), content.WithDescriptor(desc))
	}
	if errdefs.IsAlreadyExists(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer w.Close()
	if err := p.copy(ctx, w, desc); err != nil && !errdefs.IsAlreadyExists(err) {
		if errdefs.IsFailedPrecondition(err) {
			// The content is not what its digest says: nothing to resume.
			_ = cs.Abort(p.base, ref)
		}
		return nil, err
	}
	return nil, nil
}

func (p *puller) copy(ctx context.Context, w content.Writer, desc ocispec.Descriptor) error {
	st, err := w.Status()
	if err != nil {
		return err
	}
	if st.Offset == desc.Size {
		return w.Commit(ctx, desc.Size, desc.Digest)
	}
	p.total.Add(desc.Size - st.Offset)
	rc, err := p.fetcher.Fetch(ctx, desc)
	if err != nil {
		return err
	}
	defer rc.Close()
	var r io.Reader = &meter{r: rc, p: p, left: desc.Size - st.Offset}
	if seeker, ok := rc.(io.Seeker); ok {
		r = &seekMeter{meter: meter{r: rc, p: p, left: desc.Size - st.Offset}, s: seeker}
	}
	return content.Copy(ctx, w, r, desc.Size, desc.Digest)
}

// meter counts what a pull reads and keeps its stall timer from firing.
type meter struct {
	r    io.Reader
	p    *puller
	left int64 // bytes that still count, so that Done stays below Total when a blob is read again
}

func (m *meter) Read(b []byte) (int, error) {
	n, err := m.r.Read(b)
	if n > 0 {
		counted := min(int64(n), m.left)
		m.left -= counted
		m.p.advance(counted)
	}
	return n, err
}

// seekMeter lets content.Copy resume at an offset.
type seekMeter struct {
	meter
	s io.Seeker
}

func (m *seekMeter) Seek(offset int64, whence int) (int64, error) { return m.s.Seek(offset, whence) }

func (p *puller) advance(n int64) {
	p.stall.Reset(stallTimeout)
	p.done.Add(n)
	now, last := time.Now().UnixNano(), p.lastReport.Load()
	if now-last >= int64(progressEvery) && p.lastReport.CompareAndSwap(last, now) {
		p.flush()
	}
}

func (p *puller) flush() {
	p.report(Progress{Ref: p.progress.Ref, Done: p.done.Load(), Total: p.total.Load()})
}
