package main

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// where are the flags of knarr that choose the kit's cluster.
func (c config) where() []string {
	args := []string{"--name", c.name}
	if c.dataDir != "" {
		args = append(args, "--data-dir", c.dataDir)
	}
	return args
}

// up makes a cluster of its own, without data of an earlier one, and returns its kubeconfig.
func (c config) up(ctx context.Context) (string, error) {
	args := append([]string{"up"}, c.where()...)
	args = append(args, "--nodes", strconv.Itoa(c.nodes), "--registry-config-path", c.registries())
	if err := c.command(ctx, c.knarr, args...).Run(); err != nil {
		return "", fmt.Errorf("starting the cluster: %w", err)
	}
	out, err := exec.CommandContext(ctx, c.knarr, append([]string{"kubeconfig"}, c.where()...)...).Output()
	if err != nil {
		return "", errors.Join(fmt.Errorf("asking for the kubeconfig: %w", err), c.down(ctx))
	}
	return strings.TrimSpace(string(out)), nil
}

// down removes the cluster and its data.
func (c config) down(ctx context.Context) error {
	if err := c.command(ctx, c.knarr, append([]string{"down", "--purge"}, c.where()...)...).Run(); err != nil {
		return fmt.Errorf("stopping the cluster: %w", err)
	}
	return nil
}

func (c config) report() string { return filepath.Join(c.out, "junit.xml") }
func (c config) log() string    { return filepath.Join(c.out, "e2e.log") }

// suite runs the tests. Its output goes to e2e.log too, the results to junit.xml.
func (c config) suite(ctx context.Context) error {
	log, err := os.Create(c.log())
	if err != nil {
		return err
	}
	defer log.Close()
	args := []string{"--procs", strconv.Itoa(c.parallel), "--no-color", "--silence-skips", "--timeout", c.timeout.String(),
		"--focus", c.focus, "--junit-report", filepath.Base(c.report()), "--output-dir", c.out}
	if c.skip != "" {
		args = append(args, "--skip", c.skip)
	}
	args = append(args, c.bin("e2e.test"), "--", "--provider", "local", "--kubeconfig", c.kubeconfig, "--kubectl-path", c.kubectl)
	cmd := c.command(ctx, c.bin("ginkgo"), args...)
	cmd.Dir = c.out
	cmd.Stdout = io.MultiWriter(os.Stdout, log)
	cmd.Stderr = cmd.Stdout
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("the suite did not pass: %w (%s, %s)", err, c.log(), c.report())
	}
	return nil
}

// results is what we read of JUnit's report.
type results struct {
	Cases []testcase `xml:"testsuite>testcase"`
}

type testcase struct {
	Name    string    `xml:"name,attr"`
	Status  string    `xml:"status,attr"`
	Failure *struct{} `xml:"failure"`
	Error   *struct{} `xml:"error"`
	Skipped *struct{} `xml:"skipped"`
}

var (
	sigOf   = regexp.MustCompile(`^\[It\].*?\[(sig-[a-z-]+)\]`)
	verdict = regexp.MustCompile(`(?m)^(Ran \d+ of \d+ Specs|(SUCCESS|FAIL)!).*$`)
)

// tally counts results per special interest group, and names the tests that failed.
func tally(report []byte) (passed, failed map[string]int, names []string, err error) {
	var r results
	if err := xml.Unmarshal(report, &r); err != nil {
		return nil, nil, nil, err
	}
	passed, failed = map[string]int{}, map[string]int{}
	for _, t := range r.Cases {
		m := sigOf.FindStringSubmatch(t.Name)
		switch {
		case t.Failure != nil || t.Error != nil:
			names = append(names, t.Name)
			if m != nil {
				failed[m[1]]++
			}
		case m != nil && t.Skipped == nil:
			passed[m[1]]++
		}
	}
	slices.Sort(names)
	return passed, failed, names, nil
}

// summarize prints the counts, the tests that failed, and last ginkgo's own verdict. A run that never began has none.
func (c config) summarize(w io.Writer) {
	report, err := os.ReadFile(c.report())
	if err != nil {
		return
	}
	passed, failed, names, err := tally(report)
	if err != nil {
		fmt.Fprintf(w, "%s: %v\n", c.report(), err)
	}
	var sigs []string
	for s := range passed {
		sigs = append(sigs, s)
	}
	for s := range failed {
		if passed[s] == 0 {
			sigs = append(sigs, s)
		}
	}
	slices.Sort(sigs)
	for _, s := range sigs {
		fmt.Fprintf(w, "%-22s %4d passed %4d failed\n", s, passed[s], failed[s])
	}
	for _, n := range names {
		fmt.Fprintln(w, "failed:", n)
	}
	if log, err := os.ReadFile(c.log()); err == nil {
		fmt.Fprintf(w, "%s\n", bytes.Join(verdict.FindAll(log, -1), []byte("\n")))
	}
}
