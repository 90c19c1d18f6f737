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

// version is the Kubernetes whose suite runs; go.mod holds the module to it.
const version = "v1.36.3"

// grace is how long a program that is asked to stop may take before it is killed; the suite deletes its namespaces then.
const grace = time.Minute

// programs maps what the kit builds to where it comes from. Those of the suite run here, the others in images.
var programs = []struct {
	name, pkg string
	bare      bool // needed by a bare run, too
}{
	{"ginkgo", "github.com/onsi/ginkgo/v2/ginkgo", true},
	{"kubectl", "k8s.io/kubernetes/cmd/kubectl", false},
	{"agnhost", "k8s.io/kubernetes/test/images/agnhost", true},
	{"nnp", "k8s.io/kubernetes/test/images/nonewprivs", false},
	{"sample-apiserver", "k8s.io/sample-apiserver", false},
	{"etcd", "go.etcd.io/etcd/server/v3", false},
	{"pause", "./pause", true},
	{"sh", "./sh", false},
}

func (c config) bin(name string) string { return filepath.Join(c.out, "bin", name) }

// buildPrograms compiles the suite and all programs, statically and with the flags of the Makefile, so that both share
// the compiled packages. What is up to date costs a second.
func (c config) buildPrograms(ctx context.Context) error {
	stamp := "-s -w"
	for _, p := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
		stamp += fmt.Sprintf(" -X %s.gitVersion=%s -X %[1]s.gitMajor=1 -X %[1]s.gitMinor=36", p, version)
	}
	for _, p := range programs {
		if c.bare && !p.bare {
			continue
		}
		if err := c.compile(ctx, "build", stamp, p.name, p.pkg); err != nil {
			return err
		}
	}
	return c.compile(ctx, "test -c", stamp, "e2e.test", "k8s.io/kubernetes/test/e2e")
}

func (c config) compile(ctx context.Context, how, ldflags, name, pkg string) error {
	args := []string{"build"}
	if how == "test -c" {
		args = []string{"test", "-c"}
	}
	cmd := c.command(ctx, "go", append(args, "-ldflags", ldflags, "-o", c.bin(name), pkg)...)
	cmd.Dir = filepath.Join(c.top, "test", "conformance")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-trimpath")
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("building %s: %w", name, err)
	}
	return nil
}

// command is a program that writes where we write, and is asked to stop, then killed, when ctx ends.
func (c config) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
	cmd.WaitDelay = grace
	return cmd
}
