package storetest

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"knarr/store"
)

// OpenDir opens an engine on a directory of a real disk.
type OpenDir func(dir string) (store.Engine, error)

// Environment of the child process.
const (
	childRole = "KNARR_STORETEST_CHILD"
	childDir  = "KNARR_STORETEST_DIR"
)

const (
	killRounds  = 4
	killWriters = 6
	killKeys    = 20 // per writer
)

// Child does the work of a child process, if this is one, and exits; to be called by TestMain first of all.
func Child(open OpenDir) {
	role := os.Getenv(childRole)
	if role == "" {
		return
	}
	if err := child(role, os.Getenv(childDir), open); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// StartChild starts this test binary as a child: role "open" opens the directory and says "ok"; "write" writes until killed, and prints each
// acknowledged write.
func StartChild(role, dir string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), childRole+"="+role, childDir+"="+dir)
	return cmd
}

func child(role, dir string, open OpenDir) error {
	ctx := context.Background()
	engine, err := open(dir)
	if err != nil {
		return err
	}
	s, err := store.Open(ctx, store.Options{Engine: engine})
	if err != nil {
		return err
	}
	if role == "open" {
		fmt.Println("ok")
		return s.Close()
	}
	tables, err := killTables(ctx, s)
	if err != nil {
		return err
	}
	failed := make(chan error)
	for w := range killWriters {
		go func() { failed <- killWriter(ctx, s, tables[w%2], w) }()
	}
	return <-failed
}

func killTables(ctx context.Context, s *store.Store) (out [2]*store.Table, err error) {
	for i, o := range []store.TableOptions{{Prefix: Pods, Class: store.Durable}, {Prefix: Leases, Class: store.Lossy}} {
		o.Codec = Codec{}
		if out[i], err = s.OpenTable(ctx, o); err != nil {
			return out, err
		}
	}
	return out, nil
}

// killWriter changes its own keys for ever, and deletes every seventh time.
func killWriter(ctx context.Context, s *store.Store, tab *store.Table, w int) error {
	for i := 0; ; i++ {
		key := fmt.Sprintf("%sw%d/k%d", tab.Prefix(), w, i%killKeys)
		op := store.Op{Table: tab, Key: key}
		if r := tab.Get(key); r != nil {
			op.Expect = r.Revision
		}
		content := "-"
		if i%7 != 0 || op.Expect == 0 {
			content = fmt.Sprintf("c%d.%d", w, i)
			op.Object = Object("x", content)
		}
		out, err := s.Txn(ctx, op)
		if err != nil {
			return err
		}
		line := fmt.Sprintf("%s %d %s\n", key, out[0].Revision, content)
		if _, err := os.Stdout.WriteString(line); err != nil { // one write(2): lines of several writers do not mix
			return err
		}
	}
}

// RunKill kills a child process with signal 9 while it writes to a real disk, several times, and checks that everything it acknowledged is there.
func RunKill(t *testing.T, open OpenDir) {
	rng := Seed(t)
	dir := t.TempDir() + "/db"
	acked := map[string]version{}
	last := int64(0)
	for round := range killRounds {
		lines := killOnce(t, dir, 200+rng.IntN(1500))
		for _, line := range lines {
			f := strings.Fields(line)
			if len(f) != 3 {
				t.Fatalf("child said %q", line)
			}
			rev, err := strconv.ParseInt(f[1], 10, 64)
			must(t, err)
			if rev <= last && rev <= acked[f[0]].revision {
				t.Fatalf("revision %d of %s after %d", rev, f[0], acked[f[0]].revision)
			}
			acked[f[0]] = version{f[2], rev}
		}
		last = checkKilled(t, dir, open, acked, last)
		t.Logf("round %d: %d acknowledged writes, all there", round, len(lines))
	}
}

// killOnce lets a child acknowledge some writes, kills it, and returns all acknowledgements.
func killOnce(t *testing.T, dir string, writes int) (lines []string) {
	t.Helper()
	cmd := StartChild("write", dir)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	guard := time.AfterFunc(patience, func() { cmd.Process.Kill() })
	defer guard.Stop()
	in := bufio.NewReader(out)
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			if err != io.EOF {
				t.Error(err)
			}
			break
		}
		lines = append(lines, line)
		if len(lines) == writes {
			must(t, cmd.Process.Kill())
		}
	}
	_ = cmd.Wait() // killed
	if len(lines) < writes {
		t.Fatalf("the child ended after %d writes: %s", len(lines), stderr.String())
	}
	return lines
}

// checkKilled opens what the child left and returns its revision.
func checkKilled(t *testing.T, dir string, open OpenDir, acked map[string]version, last int64) int64 {
	t.Helper()
	ctx := context.Background()
	engine, err := open(dir)
	must(t, err)
	s, err := store.Open(ctx, store.Options{Engine: engine, Debug: true})
	must(t, err)
	defer func() { must(t, s.Close()) }()
	tables, err := killTables(ctx, s)
	must(t, err)
	for key, want := range acked {
		tab := tables[0]
		if strings.HasPrefix(key, Leases) {
			tab = tables[1]
		}
		r := tab.Get(key)
		// A write after the last acknowledged one may have happened: then its revision is above.
		switch {
		case r == nil && want.content != "-" && tab.Revision() <= want.revision:
			t.Errorf("%s is lost, acknowledged was %+v", key, want)
		case r != nil && r.Revision < want.revision:
			t.Errorf("%s is at revision %d, acknowledged was %+v", key, r.Revision, want)
		case r != nil && r.Revision == want.revision && Content(r) != want.content:
			t.Errorf("%s holds %q, acknowledged was %+v", key, Content(r), want)
		}
		last = max(last, want.revision)
		if r != nil {
			last = max(last, r.Revision)
			acked[key] = version{Content(r), r.Revision}
		} else {
			acked[key] = version{"-", want.revision}
		}
	}
	if s.Revision() < last {
		t.Errorf("the store starts at revision %d after %d", s.Revision(), last)
	}
	return s.Revision()
}
