// Package rig drives a built knarr from outside, as a person at a shell does: the demo, the end-to-end tests and the
// benchmarks stand on it. It knows the command line's contract and nothing of knarr's insides.
package rig

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// waitDelay is how long a command that was told to end may keep its output open.
const waitDelay = 5 * time.Second

// Cluster is a cluster of this machine, running or not. Its methods may be called concurrently.
type Cluster struct {
	// Bin is the directory of the programs knarr and knarr-shim.
	Bin string
	// Name is the cluster's name; Root the directory for its data, empty for the default.
	Name, Root string
	// UpArgs are further flags of `knarr up`.
	UpArgs []string
	// Env is added to the environment of commands.
	Env []string
	// Log is told each command that runs, where it is not nil.
	Log func(line string)
}

// Status is what `knarr status -o json` says, as far as it is used here.
type Status struct {
	Ready     bool `json:"ready"`
	Nodes     int  `json:"nodes"`
	Dir       string
	Processes []Process `json:"processes"`
	Problems  []string  `json:"problems"`
}

// Process is a process of a cluster.
type Process struct {
	Name              string `json:"name"`
	Node              string `json:"node"`
	PID               int    `json:"pid"`
	ProportionalBytes int64  `json:"proportionalBytes"`
	AnonymousBytes    int64  `json:"anonymousBytes"`
}

// Bin is the directory of the programs under test: that of the environment (KNARR_BIN, which the Makefile sets), else the one at rel, from the directory
// of the test's package.
func Bin(rel string) string {
	if dir := os.Getenv("KNARR_BIN"); dir != "" {
		return dir
	}
	abs, err := filepath.Abs(rel)
	if err != nil {
		panic(err) // there is no working directory
	}
	return abs
}

// where are the flags that choose the cluster.
func (c *Cluster) where() []string {
	args := []string{"--name", c.Name}
	if c.Root != "" {
		args = append(args, "--data-dir", c.Root)
	}
	return args
}

// Command is `knarr <words> --name ... <args>`, not started yet. words is one command or two, such as "image ls".
func (c *Cluster) Command(ctx context.Context, words string, args ...string) *exec.Cmd {
	all := append(strings.Fields(words), append(c.where(), args...)...)
	if c.Log != nil {
		c.Log("knarr " + words + " " + strings.Join(args, " "))
	}
	cmd := exec.CommandContext(ctx, filepath.Join(c.Bin, "knarr"), all...)
	cmd.Env = append(os.Environ(), c.Env...)
	cmd.WaitDelay = waitDelay
	return cmd
}

// Run runs a command of knarr and returns its standard output. An error carries what it said on standard error.
func (c *Cluster) Run(ctx context.Context, words string, args ...string) (string, error) {
	return output(c.Command(ctx, words, args...), nil)
}

// KubectlCommand is the embedded kubectl on the cluster, not started yet.
func (c *Cluster) KubectlCommand(ctx context.Context, args ...string) *exec.Cmd {
	if c.Log != nil {
		c.Log("knarr kubectl " + strings.Join(args, " "))
	}
	cmd := exec.CommandContext(ctx, filepath.Join(c.Bin, "knarr"), append(append([]string{"kubectl"}, c.where()...), args...)...)
	cmd.Env = append(append(os.Environ(), "KUBECONFIG="), c.Env...)
	cmd.WaitDelay = waitDelay
	return cmd
}

// Kubectl runs kubectl and returns its standard output.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	return output(c.KubectlCommand(ctx, args...), nil)
}

// KubectlStdin is Kubectl with a standard input.
func (c *Cluster) KubectlStdin(ctx context.Context, in io.Reader, args ...string) (string, error) {
	return output(c.KubectlCommand(ctx, args...), in)
}

func output(cmd *exec.Cmd, in io.Reader) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, &stdout, &stderr
	err := cmd.Run()
	if err != nil {
		err = fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args[1:], " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), err
}

// Up starts the cluster.
func (c *Cluster) Up(ctx context.Context, nodes int) (string, error) {
	return c.Run(ctx, "up", append([]string{"--nodes", fmt.Sprint(nodes)}, c.UpArgs...)...)
}

// Down stops the cluster; purge removes its data too.
func (c *Cluster) Down(ctx context.Context, purge bool) error {
	args := []string{}
	if purge {
		args = append(args, "--purge")
	}
	_, err := c.Run(ctx, "down", args...)
	return err
}

// Status asks for the cluster's state.
func (c *Cluster) Status(ctx context.Context) (Status, error) {
	var s Status
	out, err := c.Run(ctx, "status", "-o", "json")
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal([]byte(out), &s)
}

// Kubeconfig is the path of the admin's kubeconfig.
func (c *Cluster) Kubeconfig(ctx context.Context) (string, error) {
	out, err := c.Run(ctx, "kubeconfig")
	return strings.TrimSpace(out), err
}

// BuildBusybox packs Debian's static busybox, with a link for each of its commands, into an image on all nodes.
func (c *Cluster) BuildBusybox(ctx context.Context, ref string) error {
	dir, err := os.MkdirTemp("", "knarr-busybox-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := BusyboxRoot(ctx, dir); err != nil {
		return err
	}
	_, err = c.Run(ctx, "image build", "-t", ref, "--cmd", "sh", dir)
	return err
}

// BusyboxRoot makes dir a root file system of Debian's static busybox.
func BusyboxRoot(ctx context.Context, dir string) error {
	const host = "/bin/busybox"
	program, err := os.ReadFile(host)
	if err != nil {
		return fmt.Errorf("%w: install busybox-static", err)
	}
	list, err := exec.CommandContext(ctx, host, "--list").Output()
	if err != nil {
		return err
	}
	var errs []error
	for _, d := range []string{"bin", "tmp", "etc", "root", "var", "home"} {
		errs = append(errs, os.MkdirAll(filepath.Join(dir, d), 0o755))
	}
	errs = append(errs, os.Chmod(filepath.Join(dir, "tmp"), 0o1777|os.ModeSticky),
		os.WriteFile(filepath.Join(dir, "bin", "busybox"), program, 0o755),
		os.WriteFile(filepath.Join(dir, "etc", "passwd"), []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"), 0o644),
		os.WriteFile(filepath.Join(dir, "etc", "group"), []byte("root:x:0:\nnobody:x:65534:\n"), 0o644))
	for _, name := range strings.Fields(string(list)) {
		if name != "busybox" {
			errs = append(errs, os.Symlink("busybox", filepath.Join(dir, "bin", name)))
		}
	}
	return errors.Join(errs...)
}
