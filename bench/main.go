// Command bench measures a built knarr on this machine: how long a start takes until the node is Ready, the memory of each
// process, what an idle cluster costs, and the loads of bench/apibench and bench/podbench.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"knarr/bench/load"
	"knarr/internal/rig"
)

func main() {
	name := flag.String("name", "bench", "name of the cluster that is made and removed")
	root := flag.String("data-dir", "", "directory for its data")
	bin := flag.String("bin", "bin", "directory of knarr and knarr-shim")
	upArgs := flag.String("up-args", "", "further flags of `knarr up`")
	starts := flag.Int("starts", 5, "starts that are measured")
	idle := flag.Duration("idle", time.Minute, "how long the idle cluster is watched")
	objects := flag.Int("objects", 5000, "objects of each kind in the API load")
	flag.Parse()
	abs, err := filepath.Abs(*bin)
	if err == nil {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		c := &rig.Cluster{Bin: abs, Name: *name, Root: *root, UpArgs: strings.Fields(*upArgs)}
		err = run(ctx, c, *starts, *idle, *objects)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, c *rig.Cluster, starts int, idle time.Duration, objects int) (err error) {
	defer func() {
		if e := c.Down(context.WithoutCancel(ctx), true); e != nil && err == nil {
			err = e
		}
	}()
	if err := measureStarts(ctx, c, starts); err != nil {
		return err
	}
	if err := c.BuildBusybox(ctx, "busybox:1"); err != nil {
		return err
	}
	if err := measureIdle(ctx, c, idle); err != nil {
		return err
	}
	s, err := c.Status(ctx)
	if err != nil {
		return err
	}
	config, err := c.Kubeconfig(ctx)
	if err != nil {
		return err
	}
	var server, all []string
	for _, p := range s.Processes {
		all = append(all, strconv.Itoa(p.PID))
		if p.Name == "server" {
			server = append(server, strconv.Itoa(p.PID))
		}
	}
	fmt.Println("\npods")
	if err := tool(ctx, "./bench/podbench", "-kubeconfig", config, "-pids", strings.Join(all, ",")); err != nil {
		return err
	}
	fmt.Println("\nAPI")
	return tool(ctx, "./bench/apibench", "-kubeconfig", config, "-pids", strings.Join(server, ","), "-n", strconv.Itoa(objects))
}

// measureStarts starts a new cluster several times and leaves the last one up.
func measureStarts(ctx context.Context, c *rig.Cluster, n int) error {
	var took []time.Duration
	for i := range n {
		begin := time.Now()
		if _, err := c.Up(ctx, 1); err != nil {
			return err
		}
		took = append(took, time.Since(begin))
		if i < n-1 {
			if err := c.Down(ctx, true); err != nil {
				return err
			}
		}
	}
	fmt.Printf("%-24s %7d starts   p50 %v   max %v (a new cluster, until its node is Ready)\n", "start to Ready", n,
		load.Percentile(took, 50).Round(10*time.Millisecond), load.Percentile(took, 100).Round(10*time.Millisecond))
	return nil
}

// measureIdle prints memory and processor time of a cluster that nobody uses.
func measureIdle(ctx context.Context, c *rig.Cluster, d time.Duration) error {
	s, err := c.Status(ctx)
	if err != nil {
		return err
	}
	before := make([]time.Duration, len(s.Processes))
	for i, p := range s.Processes {
		before[i] = load.PIDs{p.PID}.CPU()
	}
	select {
	case <-time.After(d):
	case <-ctx.Done():
		return ctx.Err()
	}
	after, err := c.Status(ctx)
	if err != nil {
		return err
	}
	var pss, anonymous int64
	var cpu time.Duration
	fmt.Printf("\nidle, over %v\n", d)
	for i, p := range s.Processes {
		spent := load.PIDs{p.PID}.CPU() - before[i]
		for _, q := range after.Processes {
			if q.PID == p.PID {
				p = q
			}
		}
		fmt.Printf("  %-8s %-12s PSS %6.1f MB   anonymous %6.1f MB   CPU %.2f %% of a core\n", p.Name, p.Node,
			float64(p.ProportionalBytes)/1e6, float64(p.AnonymousBytes)/1e6, 100*spent.Seconds()/d.Seconds())
		pss, anonymous, cpu = pss+p.ProportionalBytes, anonymous+p.AnonymousBytes, cpu+spent
	}
	fmt.Printf("  %-21s PSS %6.1f MB   anonymous %6.1f MB   CPU %.2f %% of a core\n", "all", float64(pss)/1e6, float64(anonymous)/1e6, 100*cpu.Seconds()/d.Seconds())
	return nil
}

// tool runs one of the load programs.
func tool(ctx context.Context, pkg string, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", append([]string{"run", pkg}, args...)...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd.Run()
}
