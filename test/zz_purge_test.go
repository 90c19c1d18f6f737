package test

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestZPurgeLeavesNothing comes last: it takes the shared cluster down, with pods in it, and looks at the machine.
func TestZPurgeLeavesNothing(t *testing.T) {
	c := theCluster(t)
	must(t, c, "create", "namespace", "last")
	must(t, c, "create", "deploy", "web", "-n", "last", "--image=whoami:1", "--replicas=3")
	must(t, c, "expose", "deploy/web", "-n", "last", "--port=80", "--type=LoadBalancer")
	must(t, c, "rollout", "status", "deploy/web", "-n", "last", "--timeout=60s")

	// Down and up again: the data stays, pods run again.
	ctx, cancel := context.WithTimeout(t.Context(), 2*downTimeout+upTimeout)
	defer cancel()
	require.NoError(t, c.Down(ctx, false))
	out, err := processes(c)
	require.NoError(t, err)
	require.Empty(t, out, "processes after down")
	_, err = c.Up(ctx, nodes)
	require.NoError(t, err)
	must(t, c, "rollout", "status", "deploy/web", "-n", "last", "--timeout=90s")

	require.NoError(t, c.Down(ctx, true))
	after, err := lookAtHost(c)
	require.NoError(t, err)
	requireSame(t, shared.before, after)
	require.Error(t, c.Down(ctx, true), "there is nothing to take down any more")
}
