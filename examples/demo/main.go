// Command demo runs knarr's main job for real and says what it does: a cluster of two nodes, a web server of three pods
// behind a Service, asked through every address that the Service has, scaled, rolled out and undone under load. Its last
// line tells how it went; its status is 0 where all of it went well.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"knarr/internal/rig"
)

// timeout bounds the demo as a whole.
const timeout = 10 * time.Minute

func main() {
	name := flag.String("name", "default", "name of the cluster")
	root := flag.String("data-dir", "", "directory for the cluster's data")
	bin := flag.String("bin", "bin", "directory of knarr and knarr-shim")
	nodes := flag.Int("nodes", 2, "nodes of the cluster")
	upArgs := flag.String("up-args", "", "further flags of `knarr up`")
	flag.Parse()
	abs, err := filepath.Abs(*bin)
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	d := &demo{Cluster: &rig.Cluster{Bin: abs, Name: *name, Root: *root, UpArgs: strings.Fields(*upArgs),
		Log: func(line string) { fmt.Println("\n$ " + line) }}, nodes: *nodes, pods: map[string]bool{}}
	if err := d.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "\ndemo failed:", err)
		os.Exit(1)
	}
}

// demo is one run.
type demo struct {
	*rig.Cluster
	nodes     int
	targets   []target
	pods      map[string]bool // that answered, over the whole run
	requests  int
	failed    int
	addresses int
}

func (d *demo) run(ctx context.Context) error {
	for _, step := range []struct {
		title string
		do    func(context.Context) error
	}{
		{"a cluster of two nodes", d.up},
		{"images: the web server in two versions, and a shell", d.images},
		{"a Deployment of three pods and a Service", d.deploy},
		{"who answers, through every address of the Service", d.askAll},
		{"scale to five, roll out version 2, undo it, all under load", d.change},
	} {
		fmt.Printf("\n== %s\n", step.title)
		if err := step.do(ctx); err != nil {
			return fmt.Errorf("%s: %w", step.title, err)
		}
	}
	d.next()
	fmt.Printf("demo ok: %d pods answered through %d addresses; %d of %d requests failed\n", len(d.pods), d.addresses, d.failed, d.requests)
	if d.failed > 0 {
		return fmt.Errorf("%d requests failed", d.failed)
	}
	return nil
}

// show runs kubectl and prints what it says.
func (d *demo) show(ctx context.Context, args ...string) error {
	out, err := d.Kubectl(ctx, args...)
	fmt.Print(out)
	return err
}

// up starts the cluster, or takes the one that is up.
func (d *demo) up(ctx context.Context) error {
	s, err := d.Status(ctx)
	if err == nil && s.Ready && s.Nodes >= d.nodes {
		fmt.Println("it is up already")
		return nil
	}
	out, err := d.Up(ctx, d.nodes)
	fmt.Print(out)
	if err != nil {
		return err
	}
	return d.show(ctx, "get", "nodes", "-o", "wide")
}

func (d *demo) images(ctx context.Context) error {
	for _, v := range []string{"1", "2"} {
		if _, err := d.Run(ctx, "image build", "-t", "whoami:"+v, "-e", "VERSION="+v, "./examples/whoami"); err != nil {
			return err
		}
	}
	if err := d.BuildBusybox(ctx, "busybox:1"); err != nil {
		return err
	}
	out, err := d.Run(ctx, "image ls")
	fmt.Print(out)
	return err
}

func (d *demo) deploy(ctx context.Context) error {
	// What an earlier run left would hide what this one does.
	if _, err := d.Kubectl(ctx, "delete", "deploy/whoami", "svc/whoami", "pod/shell", "--ignore-not-found", "--now"); err != nil {
		return err
	}
	if err := d.show(ctx, "apply", "-f", "examples/whoami/whoami.yaml"); err != nil {
		return err
	}
	if err := d.show(ctx, "run", "shell", "--image=busybox:1", "--restart=Never", "--", "sleep", "3600"); err != nil {
		return err
	}
	if err := d.show(ctx, "rollout", "status", "deploy/whoami", "--timeout=60s"); err != nil {
		return err
	}
	if err := d.show(ctx, "wait", "pod/shell", "--for=condition=Ready", "--timeout=60s"); err != nil {
		return err
	}
	if err := d.show(ctx, "wait", "svc/whoami", "--for=jsonpath={.status.loadBalancer.ingress}", "--timeout=60s"); err != nil {
		return err
	}
	return d.show(ctx, "get", "pods,svc", "-o", "wide")
}

// askAll asks through each address until three pods have answered.
func (d *demo) askAll(ctx context.Context) error {
	var err error
	if d.targets, err = d.findTargets(ctx); err != nil {
		return err
	}
	var errs []error
	for _, t := range d.targets {
		seen, requests, failed, err := askUntil(ctx, t, 3)
		d.count(seen, requests, failed)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		d.addresses++
		fmt.Printf("%-58s %d pods in %d requests: %s\n", t.name, len(seen), requests, strings.Join(names(seen), " "))
	}
	return errors.Join(errs...)
}

func (d *demo) count(seen map[string]bool, requests, failed int) {
	for p := range seen {
		d.pods[p] = true
	}
	d.requests += requests
	d.failed += failed
}

// change scales and rolls while every address is asked without a pause.
func (d *demo) change(ctx context.Context) error {
	load := startLoad(ctx, d.targets)
	err := d.changeUnderLoad(ctx, load)
	load.stop()
	for _, l := range load.lines {
		fmt.Printf("%-58s %5d requests, %d failed, slowest %v%s\n", l.target.name, l.requests, l.failed, l.slowest.Round(time.Millisecond), l.why())
		d.count(l.seen, l.requests, l.failed)
	}
	return err
}

func (d *demo) changeUnderLoad(ctx context.Context, load *load) error {
	if err := d.show(ctx, "scale", "deploy/whoami", "--replicas=5"); err != nil {
		return err
	}
	if err := d.show(ctx, "rollout", "status", "deploy/whoami", "--timeout=60s"); err != nil {
		return err
	}
	if err := load.await(ctx, "five pods answer", func(s state) bool { return len(s.recent) >= 5 }); err != nil {
		return err
	}
	if err := d.show(ctx, "set", "image", "deploy/whoami", "whoami=whoami:2"); err != nil {
		return err
	}
	if err := d.show(ctx, "rollout", "status", "deploy/whoami", "--timeout=120s"); err != nil {
		return err
	}
	if err := load.await(ctx, "version 2 alone answers", func(s state) bool { return s.only("2") }); err != nil {
		return err
	}
	if err := d.show(ctx, "rollout", "undo", "deploy/whoami"); err != nil {
		return err
	}
	if err := d.show(ctx, "rollout", "status", "deploy/whoami", "--timeout=120s"); err != nil {
		return err
	}
	if err := load.await(ctx, "version 1 alone answers again", func(s state) bool { return s.only("1") }); err != nil {
		return err
	}
	return d.show(ctx, "rollout", "history", "deploy/whoami")
}

// next says what to type now.
func (d *demo) next() {
	knarr, name := "bin/knarr", ""
	if d.Name != "default" {
		name = " --name " + d.Name
	}
	kubectl := knarr + " kubectl" + name
	fmt.Printf(`
== the cluster is yours. Try
   %[1]s get pods -o wide
   %[1]s exec -ti shell -- sh                # then: wget -qO- whoami
   %[1]s run -ti --rm sh --image=busybox:1 -- sh
   %[1]s logs -f deploy/whoami
   %[2]s
   %[3]s                    # all of it is gone

`, kubectl, knarr+" status"+name, knarr+" down --purge"+name)
}
