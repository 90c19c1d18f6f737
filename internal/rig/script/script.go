// Package script holds what the scripts of end-to-end tests (testscript, files in txtar form) have in common: a namespace of
// a running cluster each, and commands that wait for what a cluster does in its own time.
package script

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"knarr/internal/rig/machine"
)

// retryPause lies between two questions of the commands that wait.
const retryPause = 200 * time.Millisecond

// Commands are the commands that the scripts have besides testscript's own.
func Commands() map[string]func(*testscript.TestScript, bool, []string) {
	return map[string]func(*testscript.TestScript, bool, []string){
		"eventually": eventually, "get": get, "ordered": ordered, "expand": expand,
	}
}

// SetUp gives a script a namespace ($NS) and a kubeconfig that chooses it: a copy of the file config. The directory path,
// which holds kubectl, comes first in $PATH.
func SetUp(e *testscript.Env, path, config string) error {
	b, err := os.ReadFile(config)
	if err != nil {
		return err
	}
	own := filepath.Join(e.WorkDir, ".kubeconfig")
	if err := os.WriteFile(own, b, 0o600); err != nil {
		return err
	}
	ns := "c-" + machine.Random() + machine.Random()
	e.Setenv("PATH", path+":"+os.Getenv("PATH"))
	e.Setenv("KUBECONFIG", own)
	e.Setenv("NS", ns)
	e.Setenv("HOME", e.WorkDir)
	kubectl := func(args ...string) error {
		cmd := exec.Command(filepath.Join(path, "kubectl"), args...)
		cmd.Env = e.Vars
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("kubectl %v: %w: %s", args, err, out)
		}
		return nil
	}
	if err := kubectl("create", "namespace", ns); err != nil {
		return err
	}
	e.Defer(func() { kubectl("delete", "namespace", ns, "--wait=false") })
	return kubectl("config", "set-context", "--current", "--namespace="+ns)
}

// eventually is `eventually LIMIT REGEXP PROGRAM ARGS...`: the program is run again until it ends well and its
// output matches; with ! until it does not match, however it ends.
func eventually(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 3 {
		ts.Fatalf("usage: eventually LIMIT REGEXP PROGRAM ARGS...")
	}
	limit, err := time.ParseDuration(args[0])
	ts.Check(err)
	want := regexp.MustCompile("(?m)" + args[1])
	end := time.Now().Add(limit)
	for {
		err := ts.Exec(args[2], args[3:]...)
		said := ts.ReadFile("stdout") + ts.ReadFile("stderr")
		if matched := want.MatchString(said); matched && err == nil && !neg || !matched && neg {
			return
		}
		if time.Now().After(end) {
			ts.Fatalf("%v: not within %v: %v\n%s", args[2:], limit, err, said)
		}
		time.Sleep(retryPause)
	}
}

// get is `get LIMIT URL REGEXP`: an HTTP request from the machine, again until the answer matches.
func get(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 3 || neg {
		ts.Fatalf("usage: get LIMIT URL REGEXP")
	}
	limit, err := time.ParseDuration(args[0])
	ts.Check(err)
	want := regexp.MustCompile(args[2])
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	for end := time.Now().Add(limit); ; time.Sleep(retryPause) {
		said := ""
		resp, err := client.Get(args[1])
		if err == nil {
			b, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			said = string(b)
			if want.MatchString(said) {
				return
			}
		}
		if time.Now().After(end) {
			ts.Fatalf("GET %s: not within %v: %v %q", args[1], limit, err, said)
		}
	}
}

// ordered is `ordered FILE REGEXP...`: the matches come one after another in the file.
func ordered(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 || neg {
		ts.Fatalf("usage: ordered FILE REGEXP...")
	}
	text := ts.ReadFile(args[0])
	for _, a := range args[1:] {
		at := regexp.MustCompile("(?m)" + a).FindStringIndex(text)
		if at == nil {
			ts.Fatalf("%q does not come in order in\n%s", a, ts.ReadFile(args[0]))
		}
		text = text[at[1]:]
	}
}

// expand is `expand FILE...`: $NS in the files becomes the script's namespace.
func expand(ts *testscript.TestScript, _ bool, args []string) {
	for _, a := range args {
		text := strings.ReplaceAll(ts.ReadFile(a), "$NS", ts.Getenv("NS"))
		ts.Check(os.WriteFile(ts.MkAbs(a), []byte(text), 0o600))
	}
}
