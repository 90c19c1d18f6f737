package agent_test

import (
	"context"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// pid returns the process id of a running container.
func (n *node) pid(podName, container string) int {
	n.t.Helper()
	r, err := n.rt.ContainerStatus(context.Background(), n.containerID(podName, container), true)
	require.NoError(n.t, err)
	pid, err := strconv.Atoi(r.Info["pid"])
	require.NoError(n.t, err)
	require.Positive(n.t, pid)
	return pid
}

// TestAgentRestart stops the agent and its runtime client, changes the world
// and starts them again on the same state.
func TestAgentRestart(t *testing.T) {
	n := newNode(t, nil)
	n.create(pod("stays", "sleep 1000", withToken, func(p *v1.Pod) {
		p.Spec.Containers[0].ReadinessProbe = &v1.Probe{ProbeHandler: v1.ProbeHandler{Exec: &v1.ExecAction{Command: []string{"true"}}},
			TimeoutSeconds: 5, PeriodSeconds: 10, SuccessThreshold: 1, FailureThreshold: 3}
	}))
	n.create(pod("flaky", "sleep 1000"))
	n.create(pod("deleted", "sleep 1000"))
	n.create(pod("forgotten", "sleep 1000", withToken))
	for _, name := range []string{"stays", "flaky", "deleted", "forgotten"} {
		n.until(name, "running", running)
	}
	require.NoError(t, unix.Kill(n.pid("flaky", "main"), unix.SIGKILL))
	flaky := n.until("flaky", "restarted", func(p *v1.Pod) bool { return status(p, "main").RestartCount == 1 && running(p) })
	require.Equal(t, int32(137), status(flaky, "main").LastTerminationState.Terminated.ExitCode)
	stays, pid := n.get("stays"), n.pid("stays", "main")
	flakyPID := n.pid("flaky", "main")

	ctx := context.Background()
	n.stop()
	require.NoError(t, n.rt.Close(ctx))
	n.remove("deleted", 1)
	require.NoError(t, n.client.CoreV1().Pods(namespace).Delete(ctx, "forgotten", metav1.DeleteOptions{}))
	changes, err := n.client.CoreV1().Pods(namespace).Watch(ctx, metav1.ListOptions{})
	require.NoError(t, err)
	defer changes.Stop()
	n.openRuntime()
	n.start()

	n.until("deleted", "gone", gone)
	require.Eventually(t, func() bool { return len(n.containersOf("forgotten")) == 0 && len(n.containersOf("deleted")) == 0 }, wait, 50*time.Millisecond)
	require.Equal(t, pid, n.pid("stays", "main"), "the agent's restart touches no container")
	require.Equal(t, flakyPID, n.pid("flaky", "main"))
	require.Equal(t, stays.Status, n.get("stays").Status)
	require.Equal(t, int32(1), status(n.get("flaky"), "main").RestartCount)
	for done := false; !done; {
		select {
		case e := <-changes.ResultChan():
			if p := e.Object.(*v1.Pod); p.Name == "stays" {
				require.True(t, ready(p), "the pod never looks unready")
			}
		default:
			done = true
		}
	}
	require.NoError(t, unix.Kill(n.pid("flaky", "main"), unix.SIGKILL))
	n.until("flaky", "restarted again", func(p *v1.Pod) bool { return status(p, "main").RestartCount == 2 })
}
