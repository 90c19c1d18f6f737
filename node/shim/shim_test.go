package shim_test

import (
	"strings"
	"testing"
	"time"

	"knarr/node/shim"
)

func TestRunAndExit(t *testing.T) {
	n := newNode(t)
	id, log, _ := n.run("echo out; echo err >&2; printf unfinished; exit 7")
	st := n.wait(id)
	if st.State != shim.StateExited || st.ExitCode != 7 || st.Signal != 0 || st.OOMKilled {
		t.Fatalf("status %+v", st)
	}
	if st.StartedAt.IsZero() || st.FinishedAt.Before(st.StartedAt) {
		t.Errorf("times %v %v", st.StartedAt, st.FinishedAt)
	}
	text := readLog(t, log)
	if got := content(text, "stdout"); got != "out\nunfinished" {
		t.Errorf("stdout %q of log %q", got, text)
	}
	if got := content(text, "stderr"); got != "err\n" {
		t.Errorf("stderr %q", got)
	}
	first := strings.SplitN(text, " ", 2)[0]
	if at, err := time.Parse(time.RFC3339Nano, first); err != nil || time.Since(at) > time.Minute {
		t.Errorf("time %q: %v", first, err)
	}
}
