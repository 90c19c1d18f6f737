// Command apibench loads an API server and prints one line a phase: operations a second, how long one takes, what the
// server's processes (-pids) spent on it and have in memory. It runs against any Kubernetes; its pods are never scheduled.
// So that the server is what is measured, it counts what lists and watches bring and does not decode it.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"knarr/bench/load"
)

type bench struct {
	*clients
	namespace string
	objects   int
	workers   int
	scheduler string
	// watchers are the sizes of the watch phases.
	watchers   []int
	perWatcher int // watches on one connection
	watched    load.Groups
	json       bool // how to print
	failed     bool
}

func main() {
	kubeconfig := flag.String("kubeconfig", os.Getenv("KUBECONFIG"), "kubeconfig of the server")
	pids := flag.String("pids", "", "processes of the server: 1,2 or several groups, server=1,2;all=/sys/fs/cgroup/cpuacct/x (a control group)")
	watchers := flag.String("w", "100", "watchers; several numbers, comma-separated, are several phases")
	encoding := flag.String("encoding", "protobuf", "protobuf or json")
	connections := flag.Int("connections", 1, "connections that the requests share")
	custom := flag.Bool("custom", false, "load custom resources, of a definition of its own, instead of ConfigMaps and Pods; JSON only")
	b := bench{namespace: "apibench"}
	flag.IntVar(&b.objects, "n", 5000, "objects of each kind")
	// A scheduler reports each pod that it cannot place, at a rate of its own: upstream's at 50 a second, long after the phase.
	flag.StringVar(&b.scheduler, "scheduler", "none", "scheduler that the pods name; default-scheduler looks at each and finds no node for it")
	flag.IntVar(&b.workers, "c", 32, "requests at the same time")
	flag.IntVar(&b.perWatcher, "watches-per-connection", 10, "watches that share a connection, as the informers of one client do")
	flag.BoolVar(&b.json, "json", false, "print one JSON object a phase")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := b.parse(*pids, *watchers)
	if err == nil {
		b.clients, err = newClients(*kubeconfig, *encoding, *connections)
	}
	if err == nil {
		err = b.run(ctx, *custom)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "apibench:", err)
		os.Exit(1)
	}
}

func (b *bench) parse(pids, watchers string) (err error) {
	if b.watched, err = load.ParseGroups(pids); err != nil {
		return err
	}
	for f := range strings.SplitSeq(watchers, ",") {
		n, err := strconv.Atoi(f)
		if err != nil || n < 1 {
			return fmt.Errorf("-w: %q is no number of watchers", f)
		}
		b.watchers = append(b.watchers, n)
	}
	if b.objects < 1 || b.workers < 1 || b.perWatcher < 1 {
		return fmt.Errorf("-n, -c and -watches-per-connection must be 1 or more")
	}
	return nil
}

func (b *bench) run(ctx context.Context, custom bool) error {
	if err := b.prepare(ctx, custom); err != nil {
		return err
	}
	var err error
	if custom {
		b.customResources(ctx)
	} else {
		err = b.builtin(ctx)
	}
	if err == nil && b.failed {
		err = fmt.Errorf("some requests failed")
	}
	if e := b.cleanUp(ctx, custom); err == nil {
		err = e
	}
	return err
}

func (b *bench) phase(ctx context.Context, name string, ops, workers int, f func(ctx context.Context, i int) error) {
	b.print(load.Run(ctx, name, b.watched, ops, workers, f))
}

// When the server counts as quiet after writes, and how long that is waited for.
const (
	quietWindow  = 250 * time.Millisecond
	quietShare   = 0.15 // of a core
	quietTimeout = 15 * time.Second
)

// writes is a phase whose operations make work for controllers and the scheduler: the processor time is counted until the
// server is quiet again, so that none of it falls into the next phase, and who is late does not look cheap.
func (b *bench) writes(ctx context.Context, name string, ops, workers int, f func(ctx context.Context, i int) error) {
	r := load.Run(ctx, name, b.watched, ops, workers, f)
	cpu := b.watched.CPU()
	for end := time.Now().Add(quietTimeout); len(b.watched) > 0 && time.Now().Before(end) && ctx.Err() == nil; {
		before := b.watched[0].CPU()
		time.Sleep(quietWindow)
		if b.watched[0].CPU()-before < time.Duration(quietShare*float64(quietWindow)) {
			break
		}
	}
	for group, spent := range b.watched.Since(cpu) {
		r.CPU[group] += spent
	}
	b.print(r)
}

func (b *bench) print(r load.Result) {
	b.failed = b.failed || r.Errors > 0
	_ = r.Print(os.Stdout, b.json)
}
