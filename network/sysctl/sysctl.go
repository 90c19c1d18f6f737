// Package sysctl changes kernel settings and puts them back.
//
// More than one owner (two clusters on one machine) may need the same setting: the value from before the first change is kept in a file per
// setting and owner under Dir, and it is written back when the last owner leaves. Dir belongs on a file system that a reboot clears (/run),
// because a reboot resets the settings as well.
package sysctl

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"knarr/network/netns"
)

// DefaultDir is where the values of before are kept on a real machine.
const DefaultDir = "/run/knarr/sysctl"

// Recorder sets values inside one network namespace and remembers what was there. The zero value sets and remembers nothing: right for a
// namespace that is deleted as a whole. Safe for concurrent use by different owners of one Dir only where they do not start or stop at the same moment.
type Recorder struct {
	Dir   string // where values of before are kept; "" remembers nothing
	Owner string // who changes: the cluster and the part, such as "default.pod"; no slashes
	NetNS string // path of the namespace; "" is that of the process
}

// Set writes value to the setting key, given as a path below /proc/sys with slashes, such as "net/ipv4/ip_forward". A setting that already has
// the value is left alone but remembered all the same, so that another owner leaving does not take it away.
// An error that wraps os.ErrNotExist means that this kernel lacks the setting.
func (r Recorder) Set(key, value string) error {
	old, err := r.Get(key)
	if err != nil {
		return err
	}
	if err := r.remember(key, old); err != nil {
		return err
	}
	if old == value {
		return nil
	}
	return r.write(key, value)
}

// Get reads the setting key, without the newline.
func (r Recorder) Get(key string) (value string, err error) {
	err = netns.Do(r.NetNS, func() error {
		b, err := os.ReadFile(filepath.Join("/proc/sys", key))
		value = strings.TrimSpace(string(b))
		return err
	})
	if err != nil {
		return "", fmt.Errorf("sysctl: read %s: %w", key, err)
	}
	return value, nil
}

func (r Recorder) write(key, value string) error {
	err := netns.Do(r.NetNS, func() error {
		return os.WriteFile(filepath.Join("/proc/sys", key), []byte(value), 0)
	})
	if err != nil {
		return fmt.Errorf("sysctl: set %s to %s: %w", key, value, err)
	}
	return nil
}

func (r Recorder) keyDir(key string) string {
	return filepath.Join(r.Dir, strings.ReplaceAll(key, "/", "."))
}

// remember notes the value of before for this owner: that of an owner who was there earlier, else old.
func (r Recorder) remember(key, old string) error {
	if r.Dir == "" {
		return nil
	}
	dir := r.keyDir(key)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("sysctl: %w", err)
	}
	owners, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("sysctl: %w", err)
	}
	for _, o := range owners {
		b, err := os.ReadFile(filepath.Join(dir, o.Name()))
		if err == nil {
			old = strings.TrimSpace(string(b))
		}
		if o.Name() == r.Owner {
			return nil
		}
	}
	if err := os.WriteFile(filepath.Join(dir, r.Owner), []byte(old+"\n"), 0o644); err != nil {
		return fmt.Errorf("sysctl: remember %s: %w", key, err)
	}
	return nil
}

// Restore gives up every setting that this owner changed, also in an earlier process, and writes the values of before back where it was the last owner.
// A setting that is gone (its interface was deleted) is forgotten.
func (r Recorder) Restore() error {
	if r.Dir == "" {
		return nil
	}
	keys, err := os.ReadDir(r.Dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	var errs []error
	for _, k := range keys {
		errs = append(errs, r.restoreKey(filepath.Join(r.Dir, k.Name()), k.Name()))
	}
	_ = os.Remove(r.Dir) // succeeds when no owner is left
	return errors.Join(append(errs, err)...)
}

func (r Recorder) restoreKey(dir, name string) error {
	file := filepath.Join(dir, r.Owner)
	b, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("sysctl: %w", err)
	}
	if err := os.Remove(file); err != nil {
		return fmt.Errorf("sysctl: %w", err)
	}
	if os.Remove(dir) != nil { // not empty: somebody else still needs the setting
		return nil
	}
	err = r.write(strings.ReplaceAll(name, ".", "/"), strings.TrimSpace(string(b)))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}
