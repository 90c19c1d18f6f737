package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"knarr/bench/load"
)

const (
	// readyTimeout bounds the start of a side, readyEvery how often the API is asked meanwhile.
	readyTimeout = 3 * time.Minute
	readyEvery   = 10 * time.Millisecond
	// settle is how long a new node is left alone before it counts as idle; it is then watched for idleWindows.
	settle      = 20 * time.Second
	idleWindows = 3
	idleWindow  = 20 * time.Second
)

// phases are what can be asked for, in the order in which a side goes through them.
var phases = []string{"start", "idle", "pods", "api"}

// visit runs one side through the phases, on a machine that is made and removed.
func (c config) visit(ctx context.Context, side string, round int, out *results) (err error) {
	progress("round %d of %d: %s", round+1, c.rounds, side)
	m, err := c.newMachine(side)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.close()) }()
	if err := c.start(ctx, m, out); err != nil {
		return err
	}
	if c.wants("idle") && round == 0 {
		if err := idle(ctx, m, out); err != nil {
			return err
		}
	}
	if c.wants("pods") {
		if err := c.pods(ctx, m, out); err != nil {
			return err
		}
	}
	if c.wants("api") {
		return c.api(ctx, m, out)
	}
	return nil
}

func (c config) wants(phase string) bool { return slices.Contains(c.phases, phase) }

func (m *machine) kubeconfig() string {
	if m.Side == "knarr" {
		return m.knarrKubeconfig()
	}
	return filepath.Join(m.Dir, "pki", "admin.kubeconfig")
}

// start measures from the first process to an API that is ready, and to a node that is.
func (c config) start(ctx context.Context, m *machine, out *results) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	begin := time.Now()
	if err := m.do(ctx, startWord); err != nil {
		return err
	}
	config, err := m.apiReady(ctx)
	if err != nil {
		return err
	}
	api := time.Since(begin)
	if err := m.do(ctx, joinWord); err != nil {
		return err
	}
	if err := nodeReady(ctx, config); err != nil {
		return fmt.Errorf("%s: the node is not Ready: %w (see %s)", m.Side, err, m.logs)
	}
	node := time.Since(begin)
	progress("  %s: API after %.2f s, node after %.2f s", m.Side, api.Seconds(), node.Seconds())
	if c.wants("start") {
		out.cost("start to API ready (s)", m.Side, api.Seconds())
		out.cost("start to node Ready (s)", m.Side, node.Seconds())
	}
	return nil
}

// apiReady asks until the API says that it is ready, and gives what clients need.
func (m *machine) apiReady(ctx context.Context) (*rest.Config, error) {
	var last error
	tick := time.NewTicker(readyEvery)
	defer tick.Stop()
	for {
		config, err := clientcmd.BuildConfigFromFlags("", m.kubeconfig())
		if err == nil {
			config.Dial = m.dial
			if err = askReady(ctx, config); err == nil {
				return config, nil
			}
		}
		last = err
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%s: the API is not ready: %w (see %s)", m.Side, last, m.logs)
		case <-tick.C:
		}
	}
}

func askReady(ctx context.Context, config *rest.Config) error {
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return err
	}
	defer client.CloseIdleConnections()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, config.Host+"/readyz", nil)
	if err != nil {
		return err
	}
	answer, err := client.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return errors.New(answer.Status)
	}
	return nil
}

func nodeReady(ctx context.Context, config *rest.Config) error {
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	w, err := client.CoreV1().Nodes().Watch(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	defer w.Stop()
	for e := range w.ResultChan() {
		if n, ok := e.Object.(*corev1.Node); ok && slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
			return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
		}) {
			return nil
		}
	}
	return errors.Join(ctx.Err(), errors.New("the watch ended"))
}

// idle measures a node that nobody uses.
func idle(ctx context.Context, m *machine, out *results) error {
	if err := wait(ctx, settle); err != nil {
		return err
	}
	whole := load.Group{Cgroup: m.cpuCgroup()}
	for range idleWindows {
		pids := m.all()
		cpu, wakeups, begin := whole.CPU(), pids.Wakeups(), time.Now()
		if err := wait(ctx, idleWindow); err != nil {
			return err
		}
		d := time.Since(begin).Seconds()
		out.cost("idle: CPU of the whole node (% of a core)", m.Side, 100*(whole.CPU()-cpu).Seconds()/d)
		out.cost("idle: wake-ups of all processes (1/s)", m.Side, float64(pids.Wakeups()-wakeups)/d)
	}
	memory := m.all().Memory()
	out.memory("idle", m.Side, memory)
	for _, p := range m.processes() {
		progress("  %s: %-28s %6.1f MB", m.Side, filepath.Base(p.args[0]), float64(load.PIDs{p.pid}.Memory().Proportional)/1e6)
	}
	return nil
}

func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// all are the processes of the side now.
func (m *machine) all() load.PIDs {
	var out load.PIDs
	for _, p := range m.processes() {
		out = append(out, p.pid)
	}
	return out
}

// pods measures podbench. Its processor time is that of the whole side, with what starts containers and ends.
func (c config) pods(ctx context.Context, m *machine, out *results) error {
	if err := m.do(ctx, imagesWord); err != nil {
		return err
	}
	progress("  %s: pods", m.Side)
	list, err := c.load(ctx, m, "podbench", load.Groups{{Name: "whole", Cgroup: m.cpuCgroup()}})
	if err != nil {
		return err
	}
	for _, r := range list {
		if r.Name == "pod start, one by one" {
			out.cost(r.Name+": create to Running, p50 (ms)", m.Side, ms(r.P50))
			out.cost(r.Name+": create to Running, max (ms)", m.Side, ms(r.Max))
		} else {
			out.throughput(r.Name+" (pods/s)", m.Side, float64(r.Ops)/r.Elapsed.Seconds())
			out.cost(r.Name+": p50 (ms)", m.Side, ms(r.P50))
			out.cost(r.Name+": p99 (ms)", m.Side, ms(r.P99))
		}
		out.cost(r.Name+": CPU of all processes (ms/pod)", m.Side, ms(r.CPU["whole"])/float64(r.Ops))
	}
	return nil
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// api measures apibench in each encoding.
func (c config) api(ctx context.Context, m *machine, out *results) error {
	for _, l := range []struct {
		label string
		args  []string
	}{
		{", protobuf", []string{"-encoding", "protobuf"}}, {", JSON", []string{"-encoding", "json"}}, {"", []string{"-encoding", "json", "-custom"}},
	} {
		progress("  %s: API%s", m.Side, l.label)
		args := append(l.args, "-n", fmt.Sprint(c.objects), "-connections", fmt.Sprint(c.connections), "-w", c.watchers)
		list, err := c.load(ctx, m, "apibench", m.groups(), args...)
		if err != nil {
			return err
		}
		for _, r := range list {
			if r.Ops == 0 { // the memory with all objects
				if l.label == ", protobuf" {
					out.memory(fmt.Sprintf("with %d Pods and %[1]d ConfigMaps", c.objects), m.Side, r.Memory["all"])
				}
				continue
			}
			out.operation(r, l.label, m.Side)
		}
	}
	return nil
}

// operation makes rows of a phase of apibench.
func (out *results) operation(r load.Result, label, side string) {
	name, unit := r.Name+label, "op"
	if strings.HasPrefix(name, "watch") {
		unit = "event"
	}
	per := func(group string) float64 { return float64(r.CPU[group]) / float64(time.Microsecond) / float64(r.Ops) }
	out.cost(name+": server CPU (us/"+unit+")", side, per("server"))
	out.cost(name+": CPU of kube-apiserver and etcd alone, knarr's whole server (us/"+unit+")", side, per("api"))
	out.throughput(name+" ("+unit+"s/s)", side, float64(r.Ops)/r.Elapsed.Seconds())
	out.cost(name+": p50 (ms)", side, ms(r.P50))
	out.cost(name+": p99 (ms)", side, ms(r.P99))
}

// load runs a load and reads its results as they come.
func (c config) load(ctx context.Context, m *machine, program string, watched load.Groups, args ...string) ([]load.Result, error) {
	before := m.groups()
	var out []load.Result
	line := func(said []byte) error {
		var r load.Result
		if err := json.Unmarshal(said, &r); err != nil {
			return err
		}
		out = append(out, r)
		fmt.Fprintf(os.Stderr, "    %s\n", r)
		return nil
	}
	if err := m.run(ctx, line, c.bin(program), append(args, "-json", "-kubeconfig", m.kubeconfig(), "-pids", pidsFlag(watched))...); err != nil {
		return nil, err
	}
	if err := sameProcesses(before, m.groups()); err != nil {
		return nil, fmt.Errorf("%s: %w (see %s)", m.Side, err, m.logs)
	}
	return out, nil
}

// sameProcesses makes an error of a server that ended during a load: what it had spent would be missing.
func sameProcesses(before, after load.Groups) error {
	for i, g := range before {
		for _, pid := range g.PIDs {
			if g.Name == "server" && !slices.Contains(after[i].PIDs, pid) {
				return fmt.Errorf("a server (process %d) ended during the load", pid)
			}
		}
	}
	return nil
}
