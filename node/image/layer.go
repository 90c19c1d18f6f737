package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// xattrRecord begins the PAX record of an extended attribute.
	xattrRecord = "SCHILY.xattr."
	// maxXattrBytes bounds one extended attribute and the list of their names (the kernel's own bound).
	maxXattrBytes = 64 << 10
)

// binaryLayer returns the layer of an image that is one program.
func binaryLayer(path, name string) layerFunc {
	return func(_ context.Context, tw *tar.Writer) error {
		w := layerWriter{tw: tw}
		w.dir("etc/", 0o755)
		w.file("etc/group", 0o644, strings.NewReader(groupContent), int64(len(groupContent)))
		w.file("etc/passwd", 0o644, strings.NewReader(passwdContent), int64(len(passwdContent)))
		w.certificates()
		w.dir("root/", 0o700)
		w.dir("tmp/", 0o1777)
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		fi, err := f.Stat()
		if err != nil {
			return err
		}
		w.file(name, 0o755, f, fi.Size())
		return w.err
	}
}

// layerWriter writes entries until the first error.
type layerWriter struct {
	tw  *tar.Writer
	err error
}

func (w *layerWriter) dir(name string, mode int64) {
	if w.err == nil {
		w.err = w.tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: mode, ModTime: time.Unix(0, 0)})
	}
}

func (w *layerWriter) file(name string, mode int64, r io.Reader, size int64) {
	if w.err != nil {
		return
	}
	hdr := fileHeader(name, size)
	hdr.Mode = mode
	if w.err = w.tw.WriteHeader(hdr); w.err == nil {
		_, w.err = io.Copy(w.tw, r)
	}
}

// certificates adds the CA certificates of this machine, if it has some.
func (w *layerWriter) certificates() {
	raw, err := os.ReadFile(caBundle)
	if err != nil {
		return
	}
	w.dir("etc/ssl/", 0o755)
	w.dir("etc/ssl/certs/", 0o755)
	w.file(strings.TrimPrefix(caBundle, "/"), 0o644, bytes.NewReader(raw), int64(len(raw)))
}

// treeLayer returns the layer that is the directory root, in lexical order. Sockets are left out: no image can hold them.
func treeLayer(root string) layerFunc {
	return func(ctx context.Context, tw *tar.Writer) error {
		p := treePacker{tw: tw, root: root, links: map[inode]string{}, names: make([]byte, maxXattrBytes), value: make([]byte, maxXattrBytes)}
		return filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
			if err == nil {
				err = ctx.Err()
			}
			if err != nil {
				return err
			}
			return p.entry(path, entry)
		})
	}
}

// treePacker writes the files of a directory into a layer.
type treePacker struct {
	tw           *tar.Writer
	root         string
	links        map[inode]string // first name of each file that has several
	names, value []byte           // buffers for extended attributes
}

// inode names a file that may have several names.
type inode struct{ dev, ino uint64 }

func (p *treePacker) entry(path string, entry fs.DirEntry) error {
	rel, err := filepath.Rel(p.root, path)
	if err != nil || rel == "." {
		return err
	}
	fi, err := entry.Info()
	if err != nil || fi.Mode()&fs.ModeSocket != 0 {
		return err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("%s: no inode", path)
	}
	hdr, err := p.header(path, rel, fi, st)
	if err != nil {
		return err
	}
	if hdr.Typeflag != tar.TypeReg {
		return p.tw.WriteHeader(hdr)
	}
	id := inode{uint64(st.Dev), st.Ino}
	if first, ok := p.links[id]; ok {
		hdr.Typeflag, hdr.Linkname, hdr.Size, hdr.PAXRecords = tar.TypeLink, first, 0, nil
		return p.tw.WriteHeader(hdr)
	}
	if st.Nlink > 1 {
		p.links[id] = hdr.Name
	}
	if err := p.tw.WriteHeader(hdr); err != nil {
		return err
	}
	return p.content(path, hdr.Size)
}

func (p *treePacker) content(path string, size int64) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if n, err := io.Copy(p.tw, io.LimitReader(f, size)); err != nil {
		return err
	} else if n != size {
		return fmt.Errorf("%s changed while it was read", path)
	}
	return nil
}

// header is the entry of a file without what differs between equal trees: times and the names of users and groups.
func (p *treePacker) header(path, rel string, fi fs.FileInfo, st *syscall.Stat_t) (hdr *tar.Header, err error) {
	target := ""
	if fi.Mode()&fs.ModeSymlink != 0 {
		if target, err = os.Readlink(path); err != nil {
			return nil, err
		}
	}
	if hdr, err = tar.FileInfoHeader(fi, target); err != nil {
		return nil, err
	}
	hdr.Name = filepath.ToSlash(rel)
	if fi.IsDir() {
		hdr.Name += "/"
	}
	hdr.Uid, hdr.Gid, hdr.Uname, hdr.Gname = int(st.Uid), int(st.Gid), "", ""
	hdr.ModTime, hdr.AccessTime, hdr.ChangeTime = time.Unix(0, 0), time.Time{}, time.Time{}
	hdr.Mode = int64(st.Mode & 0o7777)
	if hdr.Typeflag == tar.TypeChar || hdr.Typeflag == tar.TypeBlock {
		hdr.Devmajor, hdr.Devminor = int64(unix.Major(uint64(st.Rdev))), int64(unix.Minor(uint64(st.Rdev)))
	}
	if hdr.Typeflag != tar.TypeSymlink {
		hdr.PAXRecords, err = p.xattrs(path)
	}
	return hdr, err
}

// xattrs returns the extended attributes that belong to the file and not to the machine: capabilities and user ones.
func (p *treePacker) xattrs(path string) (map[string]string, error) {
	n, err := unix.Llistxattr(path, p.names)
	if errors.Is(err, unix.ENOTSUP) || err == nil && n == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s: extended attributes: %w", path, err)
	}
	var records map[string]string
	for _, name := range strings.Split(strings.TrimRight(string(p.names[:n]), "\x00"), "\x00") {
		if name != "security.capability" && !strings.HasPrefix(name, "user.") {
			continue
		}
		n, err := unix.Lgetxattr(path, name, p.value)
		if err != nil {
			return nil, fmt.Errorf("%s: extended attribute %s: %w", path, name, err)
		}
		if records == nil {
			records = map[string]string{}
		}
		records[xattrRecord+name] = string(p.value[:n])
	}
	return records, nil
}
