package clients

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
)

// out is the directory of what is built.
const out = "../../out/clients"

// quick are the clients that take part in `make test`: quick to build, and their scripts take seconds. Helm's waits take a minute.
var quick = []string{
	"sigs.k8s.io/kustomize/kustomize/v5",
}

// further are the other clients. Operators are packed into images.
var further = []string{
	"helm.sh/helm/v3/cmd/helm",
	"k8s.io/client-go/examples/create-update-delete-deployment",
	"k8s.io/client-go/examples/dynamic-create-update-delete-deployment",
	"k8s.io/client-go/examples/in-cluster-client-configuration",
	"k8s.io/client-go/examples/leader-election",
	"k8s.io/client-go/examples/out-of-cluster-client-configuration",
	"k8s.io/client-go/examples/workqueue",
}

// operators are built by their own go.mod and go.sum, as `go install` does, and installed by what their modules hold besides.
var operators = []struct{ module, version, pkg string }{
	{"sigs.k8s.io/kueue", "v0.17.0", "cmd/kueue"},
}

// build compiles what the tests run, with the flags of the Makefile, so that compiled packages are shared with the product.
// It needs the network for modules that are not there yet, and is therefore called outside of the machine.
func build(ctx context.Context, short bool) error {
	packages := quick
	if !short {
		packages = append(packages, further...)
	}
	for _, p := range packages {
		if err := compile(ctx, "build", p, filepath.Join(out, "bin", program(p))); err != nil {
			return err
		}
	}
	if short {
		return nil
	}
	for _, s := range suites {
		if err := compile(ctx, "test", controllerRuntime+"/pkg/"+s.pkg, s.binary(), "-c"); err != nil {
			return err
		}
	}
	for _, o := range operators {
		if err := install(ctx, o.module, o.version, o.pkg); err != nil {
			return err
		}
	}
	return nil
}

// install builds an operator, and puts a link to its module into out/operators.
func install(ctx context.Context, module, version, pkg string) error {
	bin, err := filepath.Abs(filepath.Join(out, "bin"))
	if err != nil {
		return err
	}
	cmd := goCommand(ctx, "install", "-ldflags", "-s -w", module+"/"+pkg+"@"+version)
	cmd.Env = append(cmd.Env, "GOBIN="+bin)
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("installing %s: %w", module, err)
	}
	cmd = goCommand(ctx, "mod", "download", "-json", module+"@"+version)
	var said bytes.Buffer
	cmd.Stdout = &said
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("looking for the source of %s: %w", module, err)
	}
	var where struct{ Dir string }
	if err := json.Unmarshal(said.Bytes(), &where); err != nil {
		return err
	}
	link := filepath.Join(out, "operators", program(pkg))
	if err := errors.Join(os.MkdirAll(filepath.Dir(link), 0o755), os.RemoveAll(link)); err != nil {
		return err
	}
	return os.Symlink(where.Dir, link)
}

// program is the name that the go command gives to the program of a package.
func program(pkg string) string {
	name := path.Base(pkg)
	if name == "v5" { // a major version is no name
		name = path.Base(path.Dir(pkg))
	}
	return name
}

func compile(ctx context.Context, how, pkg, to string, more ...string) error {
	args := append([]string{how, "-ldflags", "-s -w", "-o", to}, more...)
	if err := goCommand(ctx, append(args, pkg)...).Run(); err != nil {
		return fmt.Errorf("building %s: %w", pkg, err)
	}
	return nil
}

func goCommand(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-trimpath")
	return cmd
}
