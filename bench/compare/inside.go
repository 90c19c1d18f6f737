package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The words between the two sides of a pipe: how a process learns that it is inside of a machine, what it is told, and what
// it answers.
const (
	insideWord = "inside"
	workWord   = "inside-work"
	startWord  = "start"
	joinWord   = "join"
	imagesWord = "images"
	done       = "ok"
)

// The machine's network.
const (
	uplink    = "uplink"
	machineIP = "198.51.100.2"
	gatewayIP = "198.51.100.1"
	nodeName  = "machine"
)

// side is what runs on a machine.
type side interface {
	// start starts what makes the API answer, join the rest; neither waits. images loads busybox:1.
	start() error
	join() error
	images(ctx context.Context) error
	stop() error
}

// first is the first process of a machine: it makes the machine, starts the process that does the work, and takes in what
// loses its parent until that process ends.
func first(said string) error {
	var p plan
	if err := json.Unmarshal([]byte(said), &p); err != nil {
		return err
	}
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM) // the end of the orders is what ends it
	if err := errors.Join(p.mounts(), links(), unix.Sethostname([]byte(nodeName))); err != nil {
		return err
	}
	worker, err := os.StartProcess("/proc/self/exe", []string{os.Args[0], workWord, said}, &os.ProcAttr{Files: []*os.File{os.Stdin, os.Stdout, os.Stderr}})
	if err != nil {
		return err
	}
	os.Stdout.Close()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		if pid == worker.Pid && (status.Exited() || status.Signaled()) {
			if status.ExitStatus() != 0 {
				return fmt.Errorf("the worker ended with %d", status.ExitStatus())
			}
			return nil
		}
		if err != nil && err != syscall.EINTR {
			return err
		}
	}
}

// mount is one of the machine's own.
type mount struct{ source, target, kind, options string }

// mounts gives the machine its own /proc, /sys, control groups and state directories.
func (p plan) mounts() error {
	for _, flags := range []uintptr{unix.MS_REC | unix.MS_PRIVATE, unix.MS_REC | unix.MS_SHARED} {
		if err := unix.Mount("", "/", "", flags, ""); err != nil {
			return fmt.Errorf("mounts of our own: %w", err)
		}
	}
	var binds []mount
	for _, d := range []string{"log", "kubelet"} {
		if err := os.MkdirAll(filepath.Join(p.Dir, d), 0o755); err != nil {
			return err
		}
	}
	all := []mount{{"proc", "/proc", "proc", ""}, {"sysfs", "/sys", "sysfs", ""}, {"tmpfs", "/run", "tmpfs", "mode=0755"},
		{"tmpfs", "/var/lib", "tmpfs", "mode=0755"}}
	if len(p.Hierarchies) == 1 && p.Hierarchies[0].v2() {
		all = append(all, mount{"cgroup2", p.Hierarchies[0].Mount, "cgroup2", ""})
	} else {
		all = append(all, mount{"tmpfs", "/sys/fs/cgroup", "tmpfs", "mode=0755"})
		for _, h := range p.Hierarchies {
			all = append(all, mount{"cgroup", h.Mount, "cgroup", h.Options})
		}
	}
	binds = append(binds, mount{filepath.Join(p.Dir, "log"), "/var/log", "", ""}, mount{filepath.Join(p.Dir, "kubelet"), "/var/lib/kubelet", "", ""})
	for _, m := range append(all, binds...) {
		flags := uintptr(0)
		if m.kind == "" {
			flags = unix.MS_BIND
		}
		if err := os.MkdirAll(m.target, 0o755); err != nil && m.kind != "cgroup2" {
			return err
		}
		if err := unix.Mount(m.source, m.target, m.kind, flags, m.options); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	if h := p.Hierarchies[0]; h.v2() {
		return leaveRootGroup(h.Mount)
	}
	return nil
}

// leaveRootGroup moves this process below the machine's root group, of cgroup v2, which then may have controllers.
func leaveRootGroup(root string) error {
	dir := filepath.Join(root, "init")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
		return err
	}
	return enableControllers(root)
}

// links gives the machine a network with a default route that leads nowhere.
func links() error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = uplink
	pair := netlink.NewVeth(attrs)
	pair.PeerName = "nowhere"
	if err := netlink.LinkAdd(pair); err != nil {
		return fmt.Errorf("link %s: %w", uplink, err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	address := &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(machineIP).To4(), Mask: net.CIDRMask(24, 32)}}
	other, err := netlink.LinkByName(pair.PeerName)
	if err != nil {
		return err
	}
	return errors.Join(netlink.LinkSetUp(lo), netlink.AddrAdd(pair, address), netlink.LinkSetUp(pair), netlink.LinkSetUp(other),
		netlink.RouteAdd(&netlink.Route{LinkIndex: pair.Index, Gw: net.ParseIP(gatewayIP)}))
}

// work follows orders until there are no more, then stops what it started.
func work(said string, orders io.Reader, answers io.Writer) error {
	var p plan
	if err := json.Unmarshal([]byte(said), &p); err != nil {
		return err
	}
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM)
	var s side
	var err error
	if p.Side == "knarr" {
		s = newKnarr(p)
	} else {
		s, err = newUpstream(p)
	}
	tell := func(err error) {
		if err == nil {
			fmt.Fprintln(answers, done)
			return
		}
		fmt.Fprintln(answers, strings.ReplaceAll(err.Error(), "\n", " | "))
	}
	tell(err)
	if err != nil {
		return err
	}
	for in := bufio.NewScanner(orders); in.Scan(); {
		switch in.Text() {
		case startWord:
			tell(s.start())
		case joinWord:
			tell(s.join())
		case imagesWord:
			tell(s.images(context.Background()))
		default:
			tell(fmt.Errorf("unknown order %q", in.Text()))
		}
	}
	return s.stop()
}

// daemon is a process that runs until it is stopped.
type daemon struct {
	cmd      *exec.Cmd
	stopping atomic.Bool
	ended    chan struct{}
}

// daemons are stopped in the opposite order of their start.
type daemons []*daemon

// add starts a program; what it says goes to a file of its own. When it ends by itself (upstream's controllers and scheduler
// do so where they are too slow to keep their lease) then so does the whole machine, and with it the load: a measurement of
// what is left would be wrong.
func (d *daemons) add(log, program string, args ...string) error {
	f, err := os.Create(log)
	if err != nil {
		return err
	}
	defer f.Close()
	one := &daemon{cmd: exec.Command(program, args...), ended: make(chan struct{})}
	one.cmd.Stdout, one.cmd.Stderr = f, f
	if err := one.cmd.Start(); err != nil {
		return err
	}
	*d = append(*d, one)
	go func() {
		err := one.cmd.Wait()
		if !one.stopping.Load() {
			fmt.Fprintf(os.Stderr, "%s ended by itself: %v\n", program, err)
			os.Exit(1)
		}
		close(one.ended)
	}()
	return nil
}

// stop ends all of them; who does not end when asked is killed. How one ends does not matter: nothing of it is kept.
func (d *daemons) stop() error {
	for _, one := range *d {
		one.stopping.Store(true)
	}
	for _, one := range slices.Backward(*d) {
		_ = one.cmd.Process.Signal(syscall.SIGTERM)
		kill := time.AfterFunc(grace/4, func() { _ = one.cmd.Process.Kill() })
		<-one.ended
		kill.Stop()
	}
	*d = nil
	return nil
}
