package volume

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
	"k8s.io/mount-utils"
)

// Mounter mounts by system call; no program of the host is executed. It gives
// upstream's volume plugins their mount.Interface. Safe for concurrent use.
type Mounter struct {
	*mount.Mounter // only what reads the mount table
}

var _ mount.Interface = Mounter{}

// NewMounter returns a Mounter for the mount namespace of the process.
func NewMounter() Mounter { return Mounter{&mount.Mounter{}} }

// mountFlags are the options that are flags of mount(2); a leading "no"-less
// form that switches one off is listed with clear.
var mountFlags = map[string]struct {
	clear bool
	flag  uintptr
}{
	"defaults": {false, 0}, "rw": {true, unix.MS_RDONLY}, "ro": {false, unix.MS_RDONLY},
	"nosuid": {false, unix.MS_NOSUID}, "suid": {true, unix.MS_NOSUID},
	"nodev": {false, unix.MS_NODEV}, "dev": {true, unix.MS_NODEV},
	"noexec": {false, unix.MS_NOEXEC}, "exec": {true, unix.MS_NOEXEC},
	"sync": {false, unix.MS_SYNCHRONOUS}, "dirsync": {false, unix.MS_DIRSYNC},
	"noatime": {false, unix.MS_NOATIME}, "nodiratime": {false, unix.MS_NODIRATIME},
	"relatime": {false, unix.MS_RELATIME}, "strictatime": {false, unix.MS_STRICTATIME},
	"remount": {false, unix.MS_REMOUNT}, "bind": {false, unix.MS_BIND}, "rbind": {false, unix.MS_BIND | unix.MS_REC},
	"shared": {false, unix.MS_SHARED}, "rshared": {false, unix.MS_SHARED | unix.MS_REC},
	"private": {false, unix.MS_PRIVATE}, "rprivate": {false, unix.MS_PRIVATE | unix.MS_REC},
	"slave": {false, unix.MS_SLAVE}, "rslave": {false, unix.MS_SLAVE | unix.MS_REC},
}

const propagationFlags = unix.MS_SHARED | unix.MS_PRIVATE | unix.MS_SLAVE

// parseOptions splits mount options into flags of mount(2), propagation flags
// (which need a call of their own) and data for the file system.
func parseOptions(options []string) (flags, propagation uintptr, data string) {
	var rest []string
	for _, list := range options {
		for _, o := range strings.Split(list, ",") {
			f, known := mountFlags[o]
			switch {
			case o == "" || strings.HasPrefix(o, "_netdev"):
			case !known:
				rest = append(rest, o)
			case f.clear:
				flags &^= f.flag
			case f.flag&propagationFlags != 0:
				propagation |= f.flag
			default:
				flags |= f.flag
			}
		}
	}
	return flags, propagation, strings.Join(rest, ",")
}

// Mount mounts source on target.
func (m Mounter) Mount(source, target, fstype string, options []string) error {
	flags, propagation, data := parseOptions(options)
	bind := flags & (unix.MS_BIND | unix.MS_REC)
	first := flags
	if bind&unix.MS_BIND != 0 && flags&unix.MS_REMOUNT == 0 {
		first, data = bind, ""
	}
	if flags != 0 || propagation == 0 || fstype != "" {
		if err := unix.Mount(source, target, fstype, first, data); err != nil {
			return fmt.Errorf("mount %s on %s (%s): %w", source, target, strings.Join(options, ","), err)
		}
	}
	if first != flags {
		// Flags of a bind mount are only taken by a remount.
		if err := unix.Mount("", target, "", flags|unix.MS_REMOUNT, ""); err != nil {
			err = fmt.Errorf("remount %s (%s): %w", target, strings.Join(options, ","), err)
			return errors.Join(err, m.Unmount(target))
		}
	}
	if propagation != 0 {
		if err := unix.Mount("", target, "", propagation, ""); err != nil {
			return fmt.Errorf("set propagation of %s: %w", target, err)
		}
	}
	return nil
}

// MountSensitive is Mount; options are never logged.
func (m Mounter) MountSensitive(source, target, fstype string, options, sensitive []string) error {
	return m.Mount(source, target, fstype, append(append([]string{}, options...), sensitive...))
}

// MountSensitiveWithoutSystemd is MountSensitive.
func (m Mounter) MountSensitiveWithoutSystemd(source, target, fstype string, options, sensitive []string) error {
	return m.MountSensitive(source, target, fstype, options, sensitive)
}

// MountSensitiveWithoutSystemdWithMountFlags is MountSensitive: the flags of
// the mount program (such as --no-canonicalize) mean nothing to the system call.
func (m Mounter) MountSensitiveWithoutSystemdWithMountFlags(source, target, fstype string, options, sensitive, _ []string) error {
	return m.MountSensitive(source, target, fstype, options, sensitive)
}

// Unmount takes the topmost mount off target.
func (m Mounter) Unmount(target string) error {
	if err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW); err != nil {
		return fmt.Errorf("unmount %s: %w", target, err)
	}
	return nil
}

// MountedBelow is the first place below dir where something is mounted, empty where nothing is. It asks for each place that there is: the table of all mounts has some for each pod of the node, so
// that pods that end together would each read those of all.
func (m Mounter) MountedBelow(dir string) (at string, err error) {
	err = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || err == nil && path == dir {
			return nil
		}
		if err != nil {
			return err
		}
		mounted, err := isMountRoot(path)
		if mounted {
			at, err = path, filepath.SkipAll
		}
		return err
	})
	if errors.Is(err, errors.ErrUnsupported) {
		return m.mountedBelowByTable(dir)
	}
	return at, err
}

// isMountRoot reports whether something is mounted at path, without following a link there; errors.ErrUnsupported where the kernel (before 5.8) does not say.
func isMountRoot(path string) (bool, error) {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, 0, &st)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, &fs.PathError{Op: "statx", Path: path, Err: err}
	}
	if st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		return false, errors.ErrUnsupported
	}
	return st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
}

func (m Mounter) mountedBelowByTable(dir string) (string, error) {
	mounts, err := m.List()
	if err != nil {
		return "", fmt.Errorf("mount table: %w", err)
	}
	for _, mp := range mounts {
		if strings.HasPrefix(mp.Path, dir+"/") {
			return mp.Path, nil
		}
	}
	return "", nil
}
