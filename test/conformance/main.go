// Command conformance runs the end-to-end suite of Kubernetes itself (e2e.test, built from its module) against a cluster
// of knarr on this machine: it builds the suite, kubectl and the images that the tests start, brings a cluster up, loads
// the images on every node, serves them as the mirror of the registries in their names, runs what the expressions name, and
// takes everything down again.
//
// It is a Go module of its own: the suite needs modules that the product must not depend on. `make conformance` calls it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

// downTimeout bounds taking the cluster down.
const downTimeout = 2 * time.Minute

// config says what to run. Paths are absolute.
type config struct {
	// top is the project's directory, out where everything built and reported goes.
	top, out string
	// knarr is the program under test; knarr-shim lies beside it. Empty: what `make build` made.
	knarr string
	// kubectl is what the tests call as kubectl. Empty: one that the kit builds.
	kubectl string
	// name is the cluster that the kit makes and purges; dataDir is the directory for its data, empty for the default.
	name, dataDir string
	// bare leaves out what is made of Debian's packages, and the programs that only few tests start.
	bare bool
	// pictures are the images that the nodes get.
	pictures []picture
	// focus and skip are ginkgo's regular expressions over the names of tests; an empty skip skips none.
	focus, skip string
	// parallel is how many tests run at once, nodes how many nodes the cluster gets.
	parallel, nodes int
	// kubeconfig is a running cluster that an earlier run with keep made, which is used and left alone. Empty: make one.
	kubeconfig string
	// prepare ends after the building; keep leaves the cluster running for further runs with kubeconfig.
	prepare, keep bool
	// timeout bounds the suite.
	timeout time.Duration
}

func main() {
	c := config{pictures: pictures}
	flag.StringVar(&c.top, "top", "../..", "directory of the project")
	flag.StringVar(&c.knarr, "knarr", "", "program to test (default: bin/knarr of the project)")
	flag.StringVar(&c.name, "name", "conformance", "name of the cluster to make")
	flag.StringVar(&c.dataDir, "data-dir", "", "directory for the cluster's data (default: that of knarr)")
	flag.StringVar(&c.out, "out", "", "directory of what is built and reported (default: out/conformance of the project)")
	flag.StringVar(&c.focus, "focus", `\[Conformance\]`, "regular expression of the tests to run")
	flag.StringVar(&c.skip, "skip", "", "regular expression of the tests to leave out")
	flag.IntVar(&c.parallel, "parallel", 1, "tests at once")
	flag.IntVar(&c.nodes, "nodes", 3, "nodes of the cluster")
	flag.StringVar(&c.kubeconfig, "kubeconfig", "", "use this running cluster of an earlier run with -keep instead of a new one")
	flag.BoolVar(&c.prepare, "prepare", false, "only build the suite and the images")
	flag.BoolVar(&c.keep, "keep", false, "leave the cluster running (knarr down --purge ends it)")
	flag.DurationVar(&c.timeout, "timeout", 6*time.Hour, "how long the suite may take")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, c); err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		stop()
		os.Exit(1)
	}
}

// run does the whole of it.
func run(ctx context.Context, c config) error {
	if err := c.complete(); err != nil {
		return err
	}
	if err := c.build(ctx); err != nil || c.prepare {
		return err
	}
	return c.test(ctx)
}

// complete fills in what nobody said.
func (c *config) complete() (err error) {
	if c.top, err = filepath.Abs(c.top); err != nil {
		return err
	}
	if c.out == "" {
		c.out = filepath.Join(c.top, "out", "conformance")
	}
	if c.kubectl == "" {
		c.kubectl = c.bin("kubectl")
	}
	if c.knarr == "" {
		c.knarr = filepath.Join(c.top, "bin", "knarr")
	}
	return nil
}

// build makes the programs and the images.
func (c config) build(ctx context.Context) error {
	if err := os.MkdirAll(c.out, 0o755); err != nil {
		return err
	}
	if err := c.buildPrograms(ctx); err != nil {
		return err
	}
	if err := c.buildRoots(ctx); err != nil {
		return err
	}
	return c.pack(ctx)
}

// test runs the suite against the cluster. The summary comes last, after the cluster is gone; it is never that of an earlier run.
func (c config) test(ctx context.Context) (err error) {
	if err := os.Remove(c.report()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	defer func() { c.summarize(os.Stdout) }()
	if c.kubeconfig == "" {
		if c.kubeconfig, err = c.up(ctx); err != nil {
			return err
		}
		if !c.keep {
			defer func() { err = errors.Join(err, c.downAfter(ctx)) }()
		}
		if err := c.load(ctx); err != nil {
			return err
		}
	}
	m, err := c.mirror(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.close()) }()
	return c.suite(ctx)
}

// downAfter takes the cluster down, also when ctx has ended.
func (c config) downAfter(ctx context.Context) error {
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), downTimeout)
	defer cancel()
	return c.down(bounded)
}
