package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netns"

	"knarr/bench/load"
)

// plan is what the first process of a machine is told. Paths are absolute.
type plan struct {
	// Side is "upstream" or "knarr"; Dir its directory, which is removed afterwards.
	Side, Dir string
	// Bin has upstream's programs, Knarr is the directory of knarr and its shim.
	Bin, Knarr  string
	Hierarchies []hierarchy
}

// machine is where one side runs, all of it: a network, mounts, processes and control groups of its own. What it started
// ends with its first process, whatever happens.
type machine struct {
	plan
	cgroups []hierarchy
	cmd     *exec.Cmd
	in      io.WriteCloser
	out     *bufio.Scanner
	sysctls map[string][]byte
	logs    string // where the logs go when it is closed
}

// kernelSettings are those outside of namespaces that a kubelet changes.
var kernelSettings = []string{"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
	"kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes"}

// newMachine makes a machine on which nothing runs yet.
func (c config) newMachine(side string) (m *machine, err error) {
	m = &machine{plan: plan{Side: side, Bin: filepath.Join(c.out, "bin"), Knarr: c.knarr}, sysctls: map[string][]byte{},
		logs: filepath.Join(c.out, "logs", side)}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.close())
		}
	}()
	for _, name := range kernelSettings {
		if b, err := os.ReadFile("/proc/sys/" + name); err == nil {
			m.sysctls[name] = b
		}
	}
	run := filepath.Join(c.out, "run")
	if err := os.MkdirAll(run, 0o755); err != nil {
		return m, err
	}
	if m.Dir, err = os.MkdirTemp(run, side+"-"); err != nil {
		return m, err
	}
	if m.cgroups, err = makeCgroups("knarr-" + filepath.Base(m.Dir)); err != nil {
		return m, err
	}
	m.Hierarchies = m.cgroups
	said, err := json.Marshal(m.plan)
	if err != nil {
		return m, err
	}
	log, err := os.Create(filepath.Join(m.Dir, "machine.log"))
	if err != nil {
		return m, err
	}
	defer log.Close()
	cmd := exec.Command("/proc/self/exe", insideWord, string(said))
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL,
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWPID | syscall.CLONE_NEWCGROUP | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC}
	if m.in, err = cmd.StdinPipe(); err != nil {
		return m, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return m, err
	}
	m.out = bufio.NewScanner(out)
	if err := inCgroups(m.cgroups, cmd.Start); err != nil {
		return m, err
	}
	m.cmd = cmd
	return m, m.answer()
}

// do has the machine follow an order. Where ctx ends first, the machine is killed: all that it has goes with it.
func (m *machine) do(ctx context.Context, order string) error {
	stop := context.AfterFunc(ctx, func() { _ = m.cmd.Process.Kill() })
	defer stop()
	if _, err := fmt.Fprintln(m.in, order); err != nil {
		return err
	}
	return m.answer()
}

// answer waits for what the machine says: nothing, or what went wrong.
func (m *machine) answer() error {
	if !m.out.Scan() {
		return fmt.Errorf("the machine of %s ended: see %s", m.Side, m.logs)
	}
	if s := m.out.Text(); s != done {
		return fmt.Errorf("%s: %s (see %s)", m.Side, s, m.logs)
	}
	return nil
}

// close stops the side, kills what is left of it, and removes all that it had.
func (m *machine) close() error {
	var errs []error
	if m.cmd != nil {
		m.in.Close() // the order to stop
		kill := time.AfterFunc(2*grace, func() { _ = m.cmd.Process.Kill() })
		for m.out.Scan() { // until its first process ended: then all have
		}
		if err := m.cmd.Wait(); err != nil {
			errs = append(errs, fmt.Errorf("the machine of %s did not end well: %w (see machine.log in %s)", m.Side, err, m.logs))
		}
		kill.Stop()
	}
	errs = append(errs, removeCgroups(m.cgroups))
	for name, b := range m.sysctls {
		if now, err := os.ReadFile("/proc/sys/" + name); err == nil && string(now) != string(b) {
			errs = append(errs, os.WriteFile("/proc/sys/"+name, b, 0))
		}
	}
	if m.Dir != "" {
		errs = append(errs, m.keepLogs(), os.RemoveAll(m.Dir))
	}
	return errors.Join(errs...)
}

// keepLogs copies what the side's processes said out of its directory.
func (m *machine) keepLogs() error {
	if err := os.RemoveAll(m.logs); err != nil {
		return err
	}
	return filepath.WalkDir(m.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || filepath.Ext(path) != ".log" {
			return nil // what is not there says nothing
		}
		to := filepath.Join(m.logs, strings.TrimPrefix(path, m.Dir))
		b, err := os.ReadFile(path)
		return errors.Join(err, os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, b, 0o644))
	})
}

// inNetwork does f on a thread that is in the machine's network. What f opens or starts stays there.
func (m *machine) inNetwork(f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		h, err := netns.GetFromPath(fmt.Sprintf("/proc/%d/ns/net", m.cmd.Process.Pid))
		if err == nil {
			defer h.Close()
			err = netns.Set(h)
		}
		if err == nil {
			err = f()
		}
		result <- err
	}()
	return <-result
}

// dial connects from inside the machine's network.
func (m *machine) dial(ctx context.Context, network, address string) (c net.Conn, err error) {
	err = m.inNetwork(func() error {
		c, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// run runs a program of ours in the machine's network, but outside of its control groups, and gives each line that it says.
func (m *machine) run(ctx context.Context, line func([]byte) error, program string, args ...string) error {
	cmd := exec.CommandContext(ctx, program, args...)
	politely(cmd)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := m.inNetwork(cmd.Start); err != nil {
		return err
	}
	var bad error
	for s := bufio.NewScanner(out); s.Scan(); {
		bad = errors.Join(bad, line(s.Bytes()))
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("%s against %s: %w", filepath.Base(program), m.Side, err)
	}
	return bad
}

// cpuCgroup is the directory that counts the processor time of the whole side.
func (m *machine) cpuCgroup() string {
	for _, h := range m.cgroups {
		if h.v2() || strings.Contains(","+h.Options+",", ",cpuacct,") {
			return h.dir
		}
	}
	return ""
}

// process is one of a side's own: neither one of a pod nor one of this program.
type process struct {
	pid  int
	args []string
}

// is says which program it runs.
func (p process) is(names ...string) bool {
	for _, n := range names {
		if len(p.args) > 0 && (filepath.Base(p.args[0]) == n) {
			return true
		}
	}
	return false
}

// processes are those of the side now.
func (m *machine) processes() []process {
	self, _ := os.Readlink("/proc/self/exe")
	var out []process
	for _, pid := range (load.Group{Cgroup: m.cpuCgroup()}).All() {
		dir := "/proc/" + strconv.Itoa(pid)
		if exe, err := os.Readlink(dir + "/exe"); err != nil || exe == self {
			continue
		}
		if b, _ := os.ReadFile(dir + "/cgroup"); strings.Contains(string(b), "/pod") {
			continue
		}
		line, _ := os.ReadFile(dir + "/cmdline")
		out = append(out, process{pid, strings.Split(strings.TrimRight(string(line), "\x00"), "\x00")})
	}
	return out
}

// groups are what loads watch: the servers (the API server and all controllers and the scheduler), the API server with its
// store alone where that is not the same, and everything.
func (m *machine) groups() load.Groups {
	server, api, all := load.Group{Name: "server"}, load.Group{Name: "api"}, load.Group{Name: "all"}
	for _, p := range m.processes() {
		all.PIDs = append(all.PIDs, p.pid)
		switch {
		case p.is("etcd", "kube-apiserver"):
			api.PIDs, server.PIDs = append(api.PIDs, p.pid), append(server.PIDs, p.pid)
		case p.is("kube-controller-manager", "kube-scheduler"):
			server.PIDs = append(server.PIDs, p.pid)
		case p.is("knarr") && len(p.args) > 1 && p.args[1] == "server":
			api.PIDs, server.PIDs = append(api.PIDs, p.pid), append(server.PIDs, p.pid)
		}
	}
	return load.Groups{server, api, all}
}

// pidsFlag writes groups as the loads take them.
func pidsFlag(groups load.Groups) string {
	var parts []string
	for _, g := range groups {
		var members []string
		for _, p := range g.PIDs {
			members = append(members, strconv.Itoa(p))
		}
		if g.Cgroup != "" {
			members = append(members, g.Cgroup)
		}
		parts = append(parts, g.Name+"="+strings.Join(members, ","))
	}
	return strings.Join(parts, ";")
}
