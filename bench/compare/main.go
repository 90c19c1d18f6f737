// Command compare measures knarr beside upstream Kubernetes, on one machine in one run: it builds upstream's programs from
// their modules, runs a whole node of each side in turn, every time new and in namespaces of its own, puts the same loads on
// both, and prints one table: name, upstream, knarr, ratio (more than 1: knarr is better), and the spreads.
//
// It is a Go module of its own: upstream's programs need modules that the product must not depend on. `make bench-compare`
// calls it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// config says what to measure. Paths are absolute.
type config struct {
	// top is the project's directory, out where everything built and run goes, knarr the directory of the programs under test.
	top, out, knarr string
	// doc is the page that the table is written into; empty: none.
	doc string
	// phases are what to measure, rounds how often each side has its turn.
	phases []string
	rounds int
	// sides are who takes turns; one alone gives no ratios.
	sides []string
	// objects and connections are the load on the API; watchers are the sizes of its watch phases.
	objects, connections int
	watchers             string
	// loadBefore is the machine's load average at the beginning.
	loadBefore string
}

// fullObjects and fullRounds are the least whose table goes into the page by itself.
const (
	fullObjects = 5000
	fullRounds  = 3
)

func init() {
	// The first process of a machine is to end with this one, which the kernel takes to mean: with the thread that started it.
	runtime.LockOSThread()
}

func main() {
	if len(os.Args) == 3 && (os.Args[1] == insideWord || os.Args[1] == workWord) {
		err := first(os.Args[2])
		if os.Args[1] == workWord {
			err = work(os.Args[2], os.Stdin, os.Stdout)
		}
		exit(err)
	}
	c := config{}
	var names string
	flag.StringVar(&c.top, "top", "../..", "directory of the project")
	flag.StringVar(&c.out, "out", "", "directory of what is built and run (default: out/compare of the project)")
	flag.StringVar(&c.knarr, "knarr", "", "directory of knarr and knarr-shim (default: bin of the project)")
	flag.StringVar(&c.doc, "doc", "", "page to write the table into (default: docs/performance.md where all phases are measured with enough objects and rounds)")
	flag.StringVar(&names, "phases", "all", "what to measure, comma-separated: "+strings.Join(phases, ", "))
	only := flag.String("sides", "upstream,knarr", "who takes turns")
	flag.IntVar(&c.rounds, "rounds", fullRounds, "how often each side has its turn")
	flag.IntVar(&c.objects, "objects", fullObjects, "objects of each kind in the API load")
	flag.IntVar(&c.connections, "connections", 1, "connections of the API load")
	flag.StringVar(&c.watchers, "watchers", "100,1000", "watchers in the watch phases")
	flag.Parse()
	c.sides = strings.Split(*only, ",")
	exit(run(c, names))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "compare:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// progress tells on standard error what is being done.
func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, time.Now().Format("15:04:05 ")+format+"\n", args...)
}

func run(c config, names string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := c.complete(names); err != nil {
		return err
	}
	if err := c.buildPrograms(ctx); err != nil {
		return err
	}
	if err := roomFor(c.sides, c.top); err != nil {
		return err
	}
	begin := time.Now()
	out := &results{}
	err := c.rounded(ctx, out)
	fmt.Print(out.tsv())
	if err != nil || c.doc == "" {
		return err
	}
	progress("written into %s", c.doc)
	return out.write(c.doc, c.about(begin))
}

// evictBelow is the free share of a disk, in percent, below which upstream's kubelet evicts pods by default (imagefs.available), and a little.
const evictBelow = 16

// roomFor says so before the start where upstream's node would run no pods for want of disk space.
func roomFor(sides []string, dir string) error {
	var disk syscall.Statfs_t
	if err := syscall.Statfs(dir, &disk); err != nil {
		return fmt.Errorf("free space of %s: %w", dir, err)
	}
	if slices.Contains(sides, "upstream") && disk.Bavail*100 < disk.Blocks*evictBelow {
		return fmt.Errorf("%d %% of the disk of %s is free: upstream's kubelet evicts all pods below 15 %%; make room", disk.Bavail*100/disk.Blocks, dir)
	}
	return nil
}

// complete makes paths absolute and checks the rest.
func (c *config) complete(names string) (err error) {
	if os.Getuid() != 0 {
		return errors.New("it makes namespaces and control groups: run it as root")
	}
	if c.rounds < 1 || c.objects < 10 || c.connections < 1 {
		return errors.New("-rounds and -connections must be 1 or more, -objects 10 or more")
	}
	if c.phases = phases; names != "all" {
		c.phases = strings.Split(names, ",")
	}
	for _, p := range c.phases {
		if !slices.Contains(phases, p) {
			return fmt.Errorf("-phases: there is no phase %q, only %s", p, strings.Join(phases, ", "))
		}
	}
	for _, s := range c.sides {
		if s != "upstream" && s != "knarr" {
			return fmt.Errorf("-sides: there is no side %q, only upstream and knarr", s)
		}
	}
	if c.top, err = filepath.Abs(c.top); err != nil {
		return err
	}
	for _, p := range []struct {
		path *string
		to   string
	}{{&c.out, "out/compare"}, {&c.knarr, "bin"}} {
		if *p.path == "" {
			*p.path = filepath.Join(c.top, p.to)
		}
		if *p.path, err = filepath.Abs(*p.path); err != nil {
			return err
		}
	}
	if c.doc == "" && len(c.phases) == len(phases) && len(c.sides) == 2 && c.objects >= fullObjects && c.rounds >= fullRounds {
		c.doc = filepath.Join(c.top, "docs", "performance.md")
	}
	before, _ := os.ReadFile("/proc/loadavg")
	c.loadBefore = strings.Join(strings.Fields(string(before))[:min(3, len(strings.Fields(string(before))))], " ")
	return os.MkdirAll(filepath.Join(c.out, "bin"), 0o755)
}

// command is how this comparison is asked for.
func (c config) command() string {
	return fmt.Sprintf("make bench-compare PHASES=%s ROUNDS=%d OBJECTS=%d CONNECTIONS=%d", strings.Join(c.phases, ","), c.rounds, c.objects, c.connections)
}

// rounded has the sides take turns.
func (c config) rounded(ctx context.Context, out *results) error {
	for round := range c.rounds {
		for _, side := range c.sides {
			if err := c.visit(ctx, side, round, out); err != nil {
				return err
			}
		}
	}
	return nil
}
