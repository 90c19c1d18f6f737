package test

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestDemo runs what `make demo` runs, on the shared cluster.
func TestDemo(t *testing.T) {
	c := theCluster(t)
	cmd := exec.CommandContext(t.Context(), "go", "run", "./examples/demo", "-bin", programs, "-name", c.Name, "-data-dir", c.Root)
	cmd.Dir = ".."
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	require.NoError(t, err)
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	require.Regexp(t, `^demo ok: \d+ pods answered through \d+ addresses; 0 of \d+ requests failed$`, lines[len(lines)-1])
	must(t, c, "delete", "deploy/whoami", "svc/whoami", "pod/shell", "--now")
}

// TestStatus: one screen, and JSON with the fields of the contract.
func TestStatus(t *testing.T) {
	c := theCluster(t)
	text, err := c.Run(t.Context(), "status")
	require.NoError(t, err)
	t.Logf("\n%s", text)
	require.LessOrEqual(t, strings.Count(text, "\n"), 24, "more than one screen")
	s, err := c.Status(t.Context())
	require.NoError(t, err)
	require.True(t, s.Ready)
	require.Equal(t, nodes, s.Nodes)
	names := map[string]int{}
	for _, p := range s.Processes {
		names[p.Name]++
		require.Positive(t, p.PID)
		require.Positive(t, p.ProportionalBytes, p.Name)
		require.Positive(t, p.AnonymousBytes, p.Name)
	}
	require.Equal(t, map[string]int{"server": 1, "agent": nodes - 1, "shim": nodes}, names)
	_, err = c.Up(t.Context(), nodes)
	require.ErrorContains(t, err, "is up already")
}
