package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"knarr/internal/rig"
)

// Bounds of the load.
const (
	// requestTimeout is when a request counts as failed.
	requestTimeout = 5 * time.Second
	// maxAsk bounds the requests until enough different pods have answered.
	maxAsk = 300
	// loadPause is between two requests through one address.
	loadPause = 10 * time.Millisecond
	// recentAnswers is how many answers back "now" reaches.
	recentAnswers = 100
	awaitTimeout  = 30 * time.Second
)

// target is one way to the Service.
type target struct {
	name string
	// asker starts something that asks once a call until ctx ends.
	asker func(ctx context.Context) (asker, error)
}

// asker makes one request a call; it is used by one goroutine.
type asker interface {
	ask(ctx context.Context) (string, error)
	io.Closer
}

// findTargets returns the Service's addresses: as seen from this machine, and its names as seen from a pod.
func (d *demo) findTargets(ctx context.Context) ([]target, error) {
	get := func(args ...string) (string, error) {
		out, err := d.Kubectl(ctx, args...)
		return strings.TrimSpace(out), err
	}
	svc, err := get("get", "svc", "whoami", "-o", "jsonpath={.spec.clusterIP} {.spec.ports[0].nodePort} {.status.loadBalancer.ingress[*].ip}")
	if err != nil {
		return nil, err
	}
	f := strings.Fields(svc)
	if len(f) < 3 {
		return nil, fmt.Errorf("the Service has no ClusterIP, NodePort and LoadBalancer address: %q", svc)
	}
	nodes, err := get("get", "nodes", "-o", `jsonpath={.items[*].status.addresses[?(@.type=="InternalIP")].address}`)
	if err != nil {
		return nil, err
	}
	targets := []target{webTarget("ClusterIP", f[0])}
	for _, ip := range strings.Fields(nodes) {
		targets = append(targets, webTarget("NodePort", net.JoinHostPort(ip, f[1])))
	}
	for _, ip := range f[2:] {
		targets = append(targets, webTarget("LoadBalancer", ip))
	}
	for _, host := range []string{"whoami", "whoami.default.svc.cluster.local"} {
		targets = append(targets, podTarget(d.Cluster, "shell", "http://"+host+"/"))
	}
	return targets, nil
}

// webTarget asks from this machine, with a connection of its own for each request.
func webTarget(kind, host string) target {
	url := "http://" + host + "/"
	return target{kind + " " + url, func(context.Context) (asker, error) {
		return &webAsker{url, http.Client{Timeout: requestTimeout, Transport: &http.Transport{DisableKeepAlives: true}}}, nil
	}}
}

type webAsker struct {
	url  string
	http http.Client
}

func (a *webAsker) ask(ctx context.Context) (string, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, a.url, nil)
	if err != nil {
		return "", err
	}
	resp, err := a.http.Do(r)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s", resp.Status)
	}
	return strings.TrimSpace(string(b)), err
}

func (*webAsker) Close() error { return nil }

// podTarget asks from a pod with a shell: one shell there makes a request for each line that it reads.
func podTarget(c *rig.Cluster, pod, url string) target {
	return target{"DNS name " + url + " from a pod", func(ctx context.Context) (asker, error) {
		ctx, cancel := context.WithCancel(ctx)
		quiet := *c
		quiet.Log = nil
		cmd := quiet.KubectlCommand(ctx, "exec", "-i", pod, "--", "sh", "-c",
			fmt.Sprintf(`while read -r line; do timeout %d wget -q -O - %s 2>&1 || echo "failed: status $?"; done`, int(requestTimeout.Seconds()), url))
		in, err := cmd.StdinPipe()
		if err != nil {
			cancel()
			return nil, err
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			cancel()
			return nil, err
		}
		if err := cmd.Start(); err != nil {
			cancel()
			return nil, err
		}
		return &podAsker{in: in, out: bufio.NewReader(out), end: func() error { in.Close(); defer cancel(); return cmd.Wait() }}, nil
	}}
}

type podAsker struct {
	in  io.WriteCloser
	out *bufio.Reader
	end func() error
}

func (a *podAsker) ask(context.Context) (string, error) {
	if _, err := io.WriteString(a.in, "\n"); err != nil {
		return "", err
	}
	line, err := a.out.ReadString('\n')
	line = strings.TrimSpace(line)
	if err == nil && !strings.HasPrefix(line, "pod=") {
		err = errors.New(line)
		if more, merr := a.out.ReadString('\n'); merr == nil { // wget's word, then ours
			err = errors.New(line + " " + strings.TrimSpace(more))
		}
	}
	return line, err
}

func (a *podAsker) Close() error { return a.end() }

// answer is a line of whoami taken apart.
func answer(line string) (pod, version string) {
	for _, f := range strings.Fields(line) {
		if k, v, ok := strings.Cut(f, "="); ok {
			switch k {
			case "pod":
				pod = v
			case "version":
				version = v
			}
		}
	}
	return pod, version
}

// askUntil asks until want different pods have answered.
func askUntil(ctx context.Context, t target, want int) (seen map[string]bool, requests, failed int, err error) {
	seen = map[string]bool{}
	a, err := t.asker(ctx)
	if err != nil {
		return seen, 0, 0, err
	}
	defer a.Close()
	var last error
	for requests < maxAsk && len(seen) < want && ctx.Err() == nil {
		requests++
		line, err := a.ask(ctx)
		pod, _ := answer(line)
		if err != nil || pod == "" {
			failed++
			last = fmt.Errorf("%q: %w", line, errors.Join(err))
			continue
		}
		seen[pod] = true
	}
	if len(seen) < want {
		return seen, requests, failed, fmt.Errorf("%s: only %d of %d pods answered in %d requests, of which %d failed (%v)", t.name, len(seen), want, requests, failed, last)
	}
	return seen, requests, failed, nil
}

func names(set map[string]bool) []string { return slices.Sorted(maps.Keys(set)) }

// load asks through all targets at once until it is stopped.
type load struct {
	cancel context.CancelFunc
	wg     sync.WaitGroup
	lines  []*loadLine
	change chan struct{} // told after each answer

	mu     sync.Mutex
	recent []string // the last answers, "pod version"; guarded by mu
}

// loadLine is the load through one target; its goroutine alone writes it.
type loadLine struct {
	target   target
	seen     map[string]bool
	requests int
	failed   int
	slowest  time.Duration
	err      error // the first failure
}

func (l *loadLine) why() string {
	if l.err == nil {
		return ""
	}
	return ": " + l.err.Error()
}

func startLoad(ctx context.Context, targets []target) *load {
	ctx, cancel := context.WithCancel(ctx)
	l := &load{cancel: cancel, change: make(chan struct{}, 1)}
	for _, t := range targets {
		line := &loadLine{target: t, seen: map[string]bool{}}
		l.lines = append(l.lines, line)
		l.wg.Go(func() { l.run(ctx, line) })
	}
	return l
}

// stop ends the load; what is under way is finished first, so that stopping is no failure.
func (l *load) stop() {
	l.cancel()
	l.wg.Wait()
}

func (l *load) run(ctx context.Context, line *loadLine) {
	whole := context.WithoutCancel(ctx)
	a, err := line.target.asker(whole)
	if err != nil {
		line.requests, line.failed, line.err = 1, 1, err
		return
	}
	defer a.Close()
	for ctx.Err() == nil {
		begin := time.Now()
		text, err := a.ask(whole)
		line.requests++
		line.slowest = max(line.slowest, time.Since(begin))
		pod, version := answer(text)
		if err != nil || pod == "" {
			line.failed++
			if line.err == nil {
				line.err = fmt.Errorf("%q: %w", text, errors.Join(err))
			}
		} else {
			line.seen[pod] = true
			l.note(pod + " " + version)
		}
		select {
		case <-time.After(loadPause):
		case <-ctx.Done():
		}
	}
}

func (l *load) note(answer string) {
	l.mu.Lock()
	l.recent = append(l.recent, answer)
	if len(l.recent) > recentAnswers {
		l.recent = l.recent[1:]
	}
	l.mu.Unlock()
	select {
	case l.change <- struct{}{}:
	default:
	}
}

// state is what the last answers say.
type state struct {
	recent   map[string]bool // pods
	versions map[string]bool
	full     bool // recentAnswers answers are known
}

// only says whether all of the last answers came from one version.
func (s state) only(version string) bool {
	return s.full && len(s.versions) == 1 && s.versions[version]
}

func (l *load) state() state {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := state{map[string]bool{}, map[string]bool{}, len(l.recent) == recentAnswers}
	for _, r := range l.recent {
		pod, version, _ := strings.Cut(r, " ")
		s.recent[pod], s.versions[version] = true, true
	}
	return s
}

// await returns when the answers satisfy want.
func (l *load) await(ctx context.Context, what string, want func(state) bool) error {
	ctx, cancel := context.WithTimeout(ctx, awaitTimeout)
	defer cancel()
	for {
		if want(l.state()) {
			fmt.Println(what)
			return nil
		}
		select {
		case <-l.change:
		case <-ctx.Done():
			s := l.state()
			return fmt.Errorf("%s: not within %v; the last answers are of pods %v, versions %v", what, awaitTimeout, names(s.recent), names(s.versions))
		}
	}
}
