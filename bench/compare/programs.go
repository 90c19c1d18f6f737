package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// What is compared with; go.mod holds the modules to it.
const version, etcdVersion = "v1.36.3", "3.7.3"

// grace is how long a program that is asked to stop may take before it is killed.
const grace = 20 * time.Second

// programs are what is built here: those of upstream, and the loads. Each comes from a package, seen from a directory below the
// project's top.
var programs = []struct {
	name, dir, pkg string
	// always says that it is compiled at each run; the others only where they are missing.
	always bool
}{
	{name: "apibench", pkg: "./bench/apibench", always: true},
	{name: "podbench", pkg: "./bench/podbench", always: true},
	{name: "pause", dir: "test/conformance", pkg: "./pause"},
	{name: "etcd", dir: "bench/compare", pkg: "go.etcd.io/etcd/server/v3"},
	{name: "kube-apiserver", dir: "bench/compare", pkg: "k8s.io/kubernetes/cmd/kube-apiserver"},
	{name: "kube-controller-manager", dir: "bench/compare", pkg: "k8s.io/kubernetes/cmd/kube-controller-manager"},
	{name: "kube-scheduler", dir: "bench/compare", pkg: "k8s.io/kubernetes/cmd/kube-scheduler"},
	{name: "kubelet", dir: "bench/compare", pkg: "k8s.io/kubernetes/cmd/kubelet"},
}

func (c config) bin(name string) string { return filepath.Join(c.out, "bin", name) }

// buildPrograms compiles what is missing, statically and with the flags of the Makefile, so that both sides get the same
// compiler, flags and modules.
func (c config) buildPrograms(ctx context.Context) error {
	stamp := "-s -w"
	for _, p := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
		stamp += fmt.Sprintf(" -X %s.gitVersion=%s -X %[1]s.gitMajor=1 -X %[1]s.gitMinor=36", p, version)
	}
	for _, p := range programs {
		if _, err := os.Stat(c.bin(p.name)); err == nil && !p.always {
			continue
		}
		progress("building %s", p.name)
		cmd := exec.CommandContext(ctx, "go", "build", "-ldflags", stamp, "-o", c.bin(p.name), p.pkg)
		cmd.Dir = filepath.Join(c.top, p.dir)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-trimpath")
		cmd.Stderr = os.Stderr
		politely(cmd)
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("building %s: %w", p.name, err)
		}
	}
	return nil
}

// politely makes the end of a command's context a request first; it is killed when it does not follow.
func politely(cmd *exec.Cmd) {
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = grace
}
