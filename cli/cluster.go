package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"

	"knarr/internal/pidlock"
	"knarr/node/shim"
)

// runDir holds what only matters while the machine is up: which clusters run, and where their directories are.
const runDir = "/run/knarr/clusters"

// cluster is one cluster of this machine, seen from outside.
type cluster struct {
	name string
	// dir is the cluster's directory.
	dir string
	// run is runDir; tests have their own.
	run string
}

// record is what `up` remembers of a cluster in its directory.
type record struct {
	Name        string   `json:"name"`
	Nodes       int      `json:"nodes"`
	Port        int      `json:"port"`
	KubeletPort int      `json:"kubeletPort"`
	Bind        string   `json:"bindAddress"`
	PodCIDR     string   `json:"podCIDR"`
	ServiceCIDR string   `json:"serviceCIDR"`
	NodeCIDR    string   `json:"nodeCIDR"`
	ClusterDNS  string   `json:"clusterDNS"`
	ServerNames []string `json:"serverNames,omitempty"`
	// RegistryConfigPath is empty in records of before it was there: then it is the default.
	RegistryConfigPath string `json:"registryConfigPath,omitempty"`
	// APIFlags are flags of the API server that `up` was given, as arguments of `server`.
	APIFlags []string `json:"apiFlags,omitempty"`
}

// findCluster returns the cluster called name: in root where that is given, else where the running one says, else in the
// default place. It need not exist.
func findCluster(name, root string) (*cluster, error) {
	if err := validateName("--name", name); err != nil {
		return nil, err
	}
	c := &cluster{name: name, run: runDir}
	if root != "" {
		abs, err := filepath.Abs(root)
		if err != nil {
			return nil, err
		}
		c.dir = filepath.Join(abs, name)
		return c, nil
	}
	c.dir = filepath.Join(DefaultRoot, name)
	if dir, err := os.Readlink(filepath.Join(c.run, name)); err == nil {
		c.dir = dir
	}
	return c, nil
}

// errNoCluster is for commands that need a cluster.
func (c *cluster) errNone() error {
	return fmt.Errorf("there is no cluster %q in %s: `knarr up` makes one (or give its --name and --data-dir)", c.name, c.dir)
}

func (c *cluster) recordPath() string { return filepath.Join(c.dir, "cluster.json") }

// load reads the record; a cluster that does not exist is fs.ErrNotExist.
func (c *cluster) load() (record, error) {
	var r record
	b, err := os.ReadFile(c.recordPath())
	if errors.Is(err, fs.ErrPermission) {
		return r, fmt.Errorf("%w: knarr's clusters belong to root (try sudo)", err)
	}
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("%s is damaged: %w", c.recordPath(), err)
	}
	return r, nil
}

func (c *cluster) save(r record) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	tmp := c.recordPath() + ".tmp"
	if err := os.WriteFile(tmp, append(b, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, c.recordPath())
}

// remember records a cluster that a service manager started, so that status and down know it; what `up` recorded stays. A
// failure is logged: the cluster itself is well.
func (c *cluster) remember(r record) {
	if r.Port != 0 {
		r.Nodes = 1
	}
	err := c.mark()
	if err == nil && !exists(c.recordPath()) {
		err = c.save(r)
	}
	if err != nil {
		slog.Warn("knarr status and knarr down will not find this cluster by its name", "err", err)
	}
}

// mark lets later commands find the cluster by its name alone.
func (c *cluster) mark() error {
	if err := os.MkdirAll(c.run, 0o755); err != nil {
		return err
	}
	link := filepath.Join(c.run, c.name)
	if err := os.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.Symlink(c.dir, link)
}

// unmark undoes mark and removes the directories of /run that are empty then.
func (c *cluster) unmark() {
	os.Remove(filepath.Join(c.run, c.name))
	os.Remove(c.run)
	os.Remove(filepath.Dir(c.run))
}

// hold makes this the only `up` or `down` of the cluster.
func (c *cluster) hold() (*pidlock.Lock, error) {
	if err := os.MkdirAll(c.run, 0o755); err != nil {
		return nil, err
	}
	path := filepath.Join(c.run, c.name+".lock")
	l, err := pidlock.Take(path)
	if errors.Is(err, pidlock.ErrLocked) {
		pid, _ := pidlock.Owner(path)
		return nil, fmt.Errorf("another `knarr up` or `knarr down` of cluster %q is at work (process %d): wait for it", c.name, pid)
	}
	return l, err
}

// neighbour names another cluster whose server runs in our network namespace, or nothing.
func (c *cluster) neighbour() (string, error) {
	entries, err := os.ReadDir(c.run)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	ours, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return "", err
	}
	for _, e := range entries {
		dir, err := os.Readlink(filepath.Join(c.run, e.Name()))
		if err != nil || e.Name() == c.name {
			continue // a lock, or ourselves
		}
		pid, err := pidlock.Owner((&cluster{dir: dir}).serverLock())
		if err != nil {
			return "", err
		}
		if theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid)); pid > 0 && err == nil && theirs == ours {
			return e.Name(), nil
		}
	}
	return "", nil
}

func (c *cluster) serverLock() string { return filepath.Join(ServerDir(c.dir), "server.lock") }
func (c *cluster) serverLog() string  { return filepath.Join(ServerDir(c.dir), "server.log") }
func (c *cluster) agentLock(node string) string {
	return filepath.Join(NodeDir(c.dir, node), "agent.lock")
}
func (c *cluster) agentLog(node string) string {
	return filepath.Join(NodeDir(c.dir, node), "agent.log")
}

// process is a living process of a cluster.
type process struct {
	Name string `json:"name"` // server, agent or shim
	Node string `json:"node"`
	PID  int    `json:"pid"`
	// ProportionalBytes is the process's share of memory (PSS), AnonymousBytes what is its own and of no file.
	ProportionalBytes int64 `json:"proportionalBytes"`
	AnonymousBytes    int64 `json:"anonymousBytes"`
}

// nodeNames lists the nodes that have a directory here, in the order of their numbers.
func (c *cluster) nodeNames() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(c.dir, "nodes"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && validateName("node", e.Name()) == nil {
			names = append(names, e.Name())
		}
	}
	sort.Slice(names, func(a, b int) bool { return nodeOrder(names[a]) < nodeOrder(names[b]) })
	return names, nil
}

// nodeOrder is the number at the end of a node's name, or a large one.
func nodeOrder(name string) int {
	if n, err := strconv.Atoi(name[strings.LastIndexByte(name, '-')+1:]); err == nil {
		return n
	}
	return MaxNodes
}

// processes lists the living processes of the cluster: those that hold their lock.
func (c *cluster) processes() ([]process, error) {
	var out []process
	add := func(name, node, lock string) error {
		pid, err := pidlock.Owner(lock)
		if pid > 0 {
			out = append(out, process{Name: name, Node: node, PID: pid})
		}
		return err
	}
	if err := add("server", NodeName(c.name, 0), c.serverLock()); err != nil {
		return nil, err
	}
	nodes, err := c.nodeNames()
	if err != nil {
		return nil, err
	}
	for _, n := range nodes {
		if err := add("agent", n, c.agentLock(n)); err != nil {
			return nil, err
		}
		for _, dir := range c.shimDirs(n) {
			if err := add("shim", n, filepath.Join(dir, shim.LockName)); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}

// shimDirs lists the state directories of a node that a shim ever ran in.
func (c *cluster) shimDirs(node string) []string {
	var dirs []string
	for _, pattern := range []string{"*", "*/*", "*/*/*"} {
		locks, _ := filepath.Glob(filepath.Join(NodeDir(c.dir, node), pattern, shim.LockName))
		for _, l := range locks {
			dirs = append(dirs, filepath.Dir(l))
		}
	}
	return dirs
}
