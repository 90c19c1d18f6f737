package main

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// hierarchy is one tree of control groups: a controller or several of cgroup v1, or cgroup v2 as a whole.
type hierarchy struct {
	// Mount is where it is mounted; Options select it in a mount of cgroup v1 and are empty for v2.
	Mount, Options string
	// home is our own directory in it, dir the one that a side gets.
	home, dir string
}

func (h hierarchy) v2() bool { return h.Options == "" }

// hierarchies finds the trees that have controllers, and where in them this process is.
func hierarchies() ([]hierarchy, error) {
	mounts, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer mounts.Close()
	self, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	var out []hierarchy
	for s := bufio.NewScanner(mounts); s.Scan(); {
		before, after, _ := strings.Cut(s.Text(), " - ")
		place, what := strings.Fields(before), strings.Fields(after)
		if len(place) < 5 || len(what) < 3 {
			continue
		}
		h := hierarchy{Mount: place[4]}
		switch what[0] {
		case "cgroup":
			h.Options = v1Options(what[2])
		case "cgroup2":
			if b, _ := os.ReadFile(filepath.Join(h.Mount, "cgroup.controllers")); !slices.Contains(strings.Fields(string(b)), "memory") {
				continue // beside cgroup v1, which has what counts
			}
		default:
			continue
		}
		h.home = filepath.Join(h.Mount, cgroupOf(string(self), h.Options))
		if _, err := os.Stat(h.home); err != nil || h.v2() {
			h.home = h.Mount
		}
		if !slices.ContainsFunc(out, func(o hierarchy) bool { return o.Options == h.Options }) {
			out = append(out, h)
		}
	}
	if len(out) == 0 {
		return nil, errors.New("no control groups are mounted: mount cgroup2 on /sys/fs/cgroup")
	}
	return out, nil
}

// v1Options are the options of a mount that say which hierarchy it is.
func v1Options(super string) string {
	var out []string
	for o := range strings.SplitSeq(super, ",") {
		switch o {
		case "rw", "ro", "xattr", "clone_children", "noprefix":
		default:
			if !strings.HasPrefix(o, "release_agent=") {
				out = append(out, o)
			}
		}
	}
	return strings.Join(out, ",")
}

// cgroupOf reads /proc/<pid>/cgroup.
func cgroupOf(table, options string) string {
	for line := range strings.Lines(table) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) == 3 && f[1] == options {
			return f[2]
		}
	}
	return "/"
}

// makeCgroups makes a group of this name in each tree.
func makeCgroups(name string) ([]hierarchy, error) {
	all, err := hierarchies()
	if err != nil {
		return nil, err
	}
	for i := range all {
		h := &all[i]
		h.dir = filepath.Join(h.home, name)
		if h.v2() {
			if err := enableControllers(h.home); err != nil {
				return all, err
			}
		}
		if err := os.Mkdir(h.dir, 0o755); err != nil {
			return all, err
		}
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} { // of cgroup v1: without them no process may enter
			b, err := os.ReadFile(filepath.Join(h.home, f))
			if err != nil || h.v2() {
				continue
			}
			if err := os.WriteFile(filepath.Join(h.dir, f), b, 0); err != nil {
				return all, err
			}
		}
	}
	return all, nil
}

// enableControllers gives the groups below dir, of cgroup v2, all controllers that dir has.
func enableControllers(dir string) error {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	want := "+" + strings.Join(strings.Fields(string(b)), " +")
	if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte(want), 0); err != nil {
		return fmt.Errorf("control groups of %s: %w", dir, err)
	}
	return nil
}

// inCgroups does f, which starts a process, while this process is in the groups, so that the new one is too.
func inCgroups(all []hierarchy, f func() error) (err error) {
	self := []byte(strconv.Itoa(os.Getpid()))
	defer func() {
		for _, h := range all {
			err = errors.Join(err, os.WriteFile(filepath.Join(h.home, "cgroup.procs"), self, 0))
		}
	}()
	for _, h := range all {
		if err := os.WriteFile(filepath.Join(h.dir, "cgroup.procs"), self, 0); err != nil {
			return err
		}
	}
	return f()
}

// removeCgroups removes the groups and all below. Their processes have been killed; the last of them may still be leaving.
func removeCgroups(all []hierarchy) error {
	var errs []error
	for _, h := range all {
		if h.dir == "" {
			continue
		}
		err := removeGroup(h.dir)
		for end := time.Now().Add(grace); err != nil && time.Now().Before(end); err = removeGroup(h.dir) {
			time.Sleep(20 * time.Millisecond)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// removeGroup removes a group, those below first.
func removeGroup(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if e.IsDir() {
			_ = removeGroup(filepath.Join(dir, e.Name()))
		}
	}
	if err := os.Remove(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
