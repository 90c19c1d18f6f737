package runtime

import (
	"context"
	"os"
	"path/filepath"
	"sort"
	"strings"

	"knarr/node/shim"
)

// loadAll reads all records and asks the shim what became of the containers.
func (r *Runtime) loadAll(ctx context.Context) error {
	if err := r.eachDir(r.podsDir(), r.loadSandbox); err != nil {
		return err
	}
	if err := r.eachDir(r.containersDir(), r.loadContainer); err != nil {
		return err
	}
	list, err := r.shim.List(ctx)
	if err != nil {
		return err
	}
	known := map[string]shim.Status{}
	for _, st := range list {
		known[st.ID] = st
	}
	for id, c := range r.containers {
		st, ok := known[id]
		delete(known, id)
		if !ok {
			c.lost()
			continue
		}
		r.apply(c, st)
	}
	for id := range known {
		r.dropStray(ctx, id)
	}
	r.settleSandboxes(list)
	return r.sweepRootfs(ctx)
}

// sweepRootfs removes root file systems that belong to no container.
func (r *Runtime) sweepRootfs(ctx context.Context) error {
	lister, ok := r.opts.Images.(rootfsLister)
	if !ok {
		return nil
	}
	ids, err := lister.Rootfs(ctx)
	if err != nil {
		return err
	}
	for _, id := range ids {
		owner, _, _ := strings.Cut(id, "-"+volumePrefix)
		if _, there := r.containers[owner]; there {
			continue
		}
		r.log.Warn("removing a root file system that has no container", "id", id)
		if err := r.opts.Images.RemoveRootfs(ctx, id); err != nil {
			r.log.Warn("remove root file system", "id", id, "error", err)
		}
	}
	return nil
}

// dropStray removes from the shim what has no record: its creation was cut off,
// or its removal.
func (r *Runtime) dropStray(ctx context.Context, id string) {
	if _, pause := r.sandboxes[sandboxOfPause(id)]; pause {
		return
	}
	r.log.Warn("removing a container that has no record", "container", id)
	if err := r.shim.Delete(ctx, id, true); err != nil {
		r.log.Warn("remove container without record", "container", id, "error", err)
	}
}

func (r *Runtime) eachDir(dir string, f func(id, dir string) error) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		if err := f(e.Name(), filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

func (r *Runtime) loadSandbox(id, dir string) error {
	s := &sandbox{id: id, dir: dir}
	if err := load(dir, sandboxFile, &s.rec); err != nil {
		r.log.Warn("sandbox without a readable record is removed", "sandbox", id, "error", err)
		return r.scrapSandbox(dir)
	}
	config, err := decodeSandboxConfig(s.rec.Config)
	if err != nil {
		return err
	}
	s.config = config
	r.sandboxes[id] = s
	return nil
}

func (r *Runtime) loadContainer(id, dir string) error {
	c := newContainer(id, dir)
	if err := load(dir, containerFile, &c.rec); err != nil {
		r.log.Warn("container without a readable record is removed", "container", id, "error", err)
		return r.scrapContainer(id, dir)
	}
	config, err := decodeContainerConfig(c.rec.Config)
	if err != nil {
		return err
	}
	c.config = config
	if len(c.rec.Resources) > 0 {
		if c.resources, err = decodeResources(c.rec.Resources); err != nil {
			return err
		}
	} else {
		c.resources = config.GetLinux().GetResources()
	}
	r.containers[id] = c
	return nil
}

// settleSandboxes marks those as not ready that were not finished, that a
// restart of the machine took the namespaces from, or whose pause process ended.
func (r *Runtime) settleSandboxes(list []shim.Status) {
	running := map[string]bool{}
	for _, st := range list {
		running[st.ID] = st.State == shim.StateRunning
	}
	for _, s := range r.sandboxes {
		if !s.rec.Ready {
			continue
		}
		gone := s.rec.BootID != r.boot
		if s.rec.PausePID != 0 && !running[pauseOfSandbox(s.id)] {
			gone = true
		}
		if gone {
			s.rec.Ready = false
			if err := save(s.dir, sandboxFile, &s.rec, false); err != nil {
				r.log.Warn("write sandbox record", "sandbox", s.id, "error", err)
			}
		}
	}
}

func sortByCreation(list []*container) {
	sort.Slice(list, func(i, j int) bool {
		a, b := list[i], list[j]
		if a.rec.CreatedAt != b.rec.CreatedAt {
			return a.rec.CreatedAt < b.rec.CreatedAt
		}
		return a.id < b.id
	})
}
