package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// sharedStore is the local content store plus, where dir is set, a directory of hard links that several stores of one
// file system share. A blob is linked into dir after its digest was verified, and from dir when this store lacks it.
// Nothing but the link count (st_nlink) says who uses a shared blob, so there is no state that could disagree.
type sharedStore struct {
	content.Store
	root string // of the local store
	dir  string // shared; empty: nothing is shared
}

func newSharedStore(inner content.Store, root, dir string) (*sharedStore, error) {
	s := &sharedStore{Store: inner, root: root, dir: dir}
	if dir == "" {
		return s, nil
	}
	if err := os.MkdirAll(filepath.Join(dir, digest.SHA256.String()), 0o700); err != nil {
		return nil, fmt.Errorf("shared content: %w", err)
	}
	return s, nil
}

func (s *sharedStore) localPath(d digest.Digest) string {
	return filepath.Join(s.root, "blobs", d.Algorithm().String(), d.Encoded())
}

func (s *sharedStore) sharedPath(d digest.Digest) string {
	return filepath.Join(s.dir, d.Algorithm().String(), d.Encoded())
}

// shares reports whether blobs named d can be shared; only well-formed sha256 digests become file names.
func (s *sharedStore) shares(d digest.Digest) bool {
	return s.dir != "" && d.Validate() == nil && d.Algorithm() == digest.SHA256
}

// adopt links the shared blob d into this store and reports whether this store has it now.
func (s *sharedStore) adopt(d digest.Digest) bool {
	if !s.shares(d) {
		return false
	}
	to := s.localPath(d)
	err := os.Link(s.sharedPath(d), to)
	if errors.Is(err, os.ErrNotExist) {
		if os.MkdirAll(filepath.Dir(to), 0o755) == nil {
			err = os.Link(s.sharedPath(d), to)
		}
	}
	return err == nil || errors.Is(err, os.ErrExist)
}

// Info returns what is known of blob d, which a shared blob is made a part of this store by.
func (s *sharedStore) Info(ctx context.Context, d digest.Digest) (content.Info, error) {
	info, err := s.Store.Info(ctx, d)
	if errdefs.IsNotFound(err) && s.adopt(d) {
		return s.Store.Info(ctx, d)
	}
	return info, err
}

// Delete removes blob d, and its shared link when no other store has one.
func (s *sharedStore) Delete(ctx context.Context, d digest.Digest) error {
	err := s.Store.Delete(ctx, d)
	if !s.shares(d) {
		return err
	}
	fi, statErr := os.Stat(s.sharedPath(d))
	if statErr != nil {
		return err
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && st.Nlink == 1 {
		// A store that links the blob just now keeps it: only this name goes.
		os.Remove(s.sharedPath(d))
	}
	return err
}

// WalkStatusRefs calls fn with each write that has begun; the database's collector prefers it to reading all of them.
func (s *sharedStore) WalkStatusRefs(ctx context.Context, fn func(string) error) error {
	w, ok := s.Store.(interface {
		WalkStatusRefs(context.Context, func(string) error) error
	})
	if !ok {
		return fmt.Errorf("content store %T: %w", s.Store, errdefs.ErrNotImplemented)
	}
	return w.WalkStatusRefs(ctx, fn)
}

// dropTornIngests removes writes that a kill left without data or name, which nothing could resume and no collector
// would see. No writer may be open.
func (s *sharedStore) dropTornIngests() error {
	root := filepath.Join(s.root, "ingest")
	dirs, err := os.ReadDir(root)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for _, d := range dirs {
		dir := filepath.Join(root, d.Name())
		_, refErr := os.Stat(filepath.Join(dir, "ref"))
		_, dataErr := os.Stat(filepath.Join(dir, "data"))
		if refErr == nil && dataErr == nil {
			continue
		}
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	return nil
}

// Writer opens a writer whose Commit shares the blob.
func (s *sharedStore) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	w, err := s.Store.Writer(ctx, opts...)
	if err != nil || s.dir == "" {
		return w, err
	}
	return &sharedWriter{Writer: w, store: s}, nil
}

type sharedWriter struct {
	content.Writer
	store *sharedStore
}

// Sync writes the data to the disk, where the writer below can.
func (w *sharedWriter) Sync() error {
	if _, err := os.Stat(w.store.sharedPath(w.Writer.Digest())); err == nil {
		return nil // Commit will link the shared copy, which is on disk already.
	}
	if s, ok := w.Writer.(content.Syncer); ok {
		return s.Sync()
	}
	return nil
}

// Commit commits as the store below does. A blob that others have shared meanwhile is linked, and what was written
// is dropped: then the error is errdefs.ErrAlreadyExists, as for any blob that is there.
func (w *sharedWriter) Commit(ctx context.Context, size int64, expected digest.Digest, opts ...content.Opt) error {
	d := w.Writer.Digest()
	if expected == "" || expected == d {
		w.store.adopt(d)
	}
	err := w.Writer.Commit(ctx, size, expected, opts...)
	if (err == nil || errdefs.IsAlreadyExists(err)) && w.store.shares(d) {
		// Failing to share costs disk space, nothing else.
		_ = os.Link(w.store.localPath(d), w.store.sharedPath(d))
	}
	return err
}
