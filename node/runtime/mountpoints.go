package runtime

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
)

// Nearly every container has the same things mounted in it, at places that few images have. Made in each container's own layer they were nine directories and three files on the disk
// for each start, and as many to remove. They are in layers of our own instead, below those of every image: what an image has at these places, or on the way there, hides them.
const (
	mountPoints = "base"        // where something is mounted in all containers
	accountVar  = "account"     // where the token of a service account is mounted
	accountRun  = "account-run" // the same, where /var/run leads to /run

	accountPath = "/var/run/secrets/kubernetes.io/serviceaccount"
)

func (r *Runtime) mountPointsDir(layer string) string {
	return filepath.Join(r.opts.StateDir, "mountpoints", layer)
}

// makeMountPoints makes what is missing of these layers.
func (r *Runtime) makeMountPoints() error {
	for layer, dirs := range map[string][]string{
		mountPoints: {"proc", "sys", "dev", "etc"},
		accountVar:  {accountPath},
		accountRun:  {strings.TrimPrefix(accountPath, "/var")},
	} {
		for _, dir := range dirs {
			if err := os.MkdirAll(filepath.Join(r.mountPointsDir(layer), dir), 0o755); err != nil {
				return err
			}
		}
	}
	for _, file := range []string{"hostname", "hosts", "resolv.conf"} {
		f, err := os.OpenFile(filepath.Join(r.mountPointsDir(mountPoints), "etc", file), os.O_CREATE|os.O_RDONLY, 0o644)
		if err != nil {
			return err
		}
		_ = f.Close()
	}
	return nil
}

// aboveMountPoints puts those layers below the ones of a root file system. Where that has none (it is no overlay), they are made in the container, as whatever else is mounted.
func (r *Runtime) aboveMountPoints(mounts []mount.Mount, c *container) []mount.Mount {
	out := slices.Clone(mounts)
	for i, m := range out {
		n := slices.IndexFunc(m.Options, isLower)
		if m.Type != "overlay" || n < 0 {
			continue
		}
		layers := []string{m.Options[n], r.mountPointsDir(mountPoints)}
		if c.mounts(accountPath) {
			account := accountVar
			if leadsToRun(strings.Split(strings.TrimPrefix(m.Options[n], lowerOption), ":")) {
				account = accountRun
			}
			layers = append(layers, r.mountPointsDir(account))
		}
		out[i].Options = slices.Clone(m.Options)
		out[i].Options[n] = strings.Join(layers, ":")
	}
	return out
}

const lowerOption = "lowerdir="

func isLower(option string) bool { return strings.HasPrefix(option, lowerOption) }

// leadsToRun reports whether the first of an image's layers that has /var/run has a link to /run there.
func leadsToRun(layers []string) bool {
	for _, layer := range layers {
		to, err := os.Readlink(filepath.Join(layer, "var", "run"))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		return to == "/run" || to == "../run" // empty: no link
	}
	return false
}

// mounts reports whether the container has something mounted at path.
func (c *container) mounts(path string) bool {
	for _, m := range c.config.GetMounts() {
		if filepath.Clean(m.GetContainerPath()) == path {
			return true
		}
	}
	return false
}
