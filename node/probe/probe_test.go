package probe

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/record"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
	"k8s.io/kubernetes/pkg/kubelet/prober/results"
	utilexec "k8s.io/utils/exec"
)

// commands answers exec probes: nil runs well, else the command fails.
type commands struct{ fails atomic.Bool }

func (c *commands) RunInContainer(context.Context, kubecontainer.ContainerID, []string, time.Duration) ([]byte, error) {
	if c.fails.Load() {
		return []byte("no"), utilexec.CodeExitError{Err: errors.New("exit 1"), Code: 1}
	}
	return []byte("ok"), nil
}

func probedPod(p *v1.Probe) *v1.Pod {
	return &v1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "u", Name: "p"}, Spec: v1.PodSpec{Containers: []v1.Container{{Name: "c", ReadinessProbe: p}}}}
}

func execProbe() *v1.Probe {
	return &v1.Probe{ProbeHandler: v1.ProbeHandler{Exec: &v1.ExecAction{Command: []string{"x"}}}, PeriodSeconds: 3600, TimeoutSeconds: 1, SuccessThreshold: 1, FailureThreshold: 1}
}

func runningStatus(id string, at time.Time) v1.PodStatus {
	return v1.PodStatus{ContainerStatuses: []v1.ContainerStatus{{Name: "c", ContainerID: "knarr://" + id,
		State: v1.ContainerState{Running: &v1.ContainerStateRunning{StartedAt: metav1.NewTime(at)}}}}}
}

func (c *commands) manager(t *testing.T) (*Manager, *record.FakeRecorder, chan types.UID, func()) {
	ctx, cancel := context.WithCancel(context.Background())
	events, changed := record.NewFakeRecorder(16), make(chan types.UID, 16)
	m := New(ctx, events, func(uid types.UID) { changed <- uid })
	m.SetRunner(c)
	return m, events, changed, func() { cancel(); m.Wait(); goleak.VerifyNone(t) }
}

// TestEarlyReadiness: with a period of an hour the pod is ready as soon as its
// probe succeeds, and the tries before that are no failures.
func TestEarlyReadiness(t *testing.T) {
	c := &commands{}
	c.fails.Store(true)
	m, events, changed, end := c.manager(t)
	defer end()
	pod, st := probedPod(execProbe()), runningStatus("1", time.Now())
	m.Apply(pod, &st, &v1.PodStatus{})
	require.True(t, *st.ContainerStatuses[0].Started)
	require.False(t, st.ContainerStatuses[0].Ready)
	m.Sync(pod, &st, false)
	time.AfterFunc(300*time.Millisecond, func() { c.fails.Store(false) })
	begin := time.Now()
	require.Equal(t, types.UID("u"), <-changed)
	require.Less(t, time.Since(begin), 900*time.Millisecond)
	m.Apply(pod, &st, &v1.PodStatus{})
	require.True(t, st.ContainerStatuses[0].Ready)
	require.Empty(t, events.Events)
}

func TestFailureIsCounted(t *testing.T) {
	c := &commands{}
	c.fails.Store(true)
	m, events, changed, end := c.manager(t)
	defer end()
	pod, st := probedPod(execProbe()), runningStatus("1", time.Now().Add(-2*time.Hour))
	m.Apply(pod, &st, &v1.PodStatus{})
	m.Sync(pod, &st, false)
	<-changed
	require.Equal(t, "Warning Unhealthy Readiness probe failed: no", <-events.Events)
	_, readiness, _ := m.Results()
	r, ok := readiness.Get(kubecontainer.ParseContainerID("knarr://1"))
	require.True(t, ok)
	require.Equal(t, results.Failure, r)
}

// TestRestartOfAgent: what was ready stays so until the first result.
func TestRestartOfAgent(t *testing.T) {
	c := &commands{}
	m, _, _, end := c.manager(t)
	defer end()
	pod, st := probedPod(execProbe()), runningStatus("1", time.Now().Add(-time.Hour))
	before := st.DeepCopy()
	before.ContainerStatuses[0].Ready = true
	m.Apply(pod, &st, before)
	require.True(t, st.ContainerStatuses[0].Ready)
	before.ContainerStatuses[0].ContainerID = "knarr://0"
	m.Apply(pod, &st, before)
	require.False(t, st.ContainerStatuses[0].Ready, "another container is not ready for that")
}

func TestLoopsFollowContainers(t *testing.T) {
	c := &commands{}
	m, _, changed, end := c.manager(t)
	defer end()
	pod, st := probedPod(execProbe()), runningStatus("1", time.Now())
	m.Apply(pod, &st, &v1.PodStatus{})
	m.Sync(pod, &st, false)
	<-changed
	st = v1.PodStatus{ContainerStatuses: []v1.ContainerStatus{{Name: "c", State: v1.ContainerState{Waiting: &v1.ContainerStateWaiting{}}}}}
	m.Sync(pod, &st, false)
	require.Empty(t, m.loops)
	st = runningStatus("2", time.Now())
	m.Apply(pod, &st, &v1.PodStatus{})
	m.Sync(pod, &st, false)
	<-changed
	m.Remove(pod)
	require.Empty(t, m.loops)
}

func TestStreak(t *testing.T) {
	s := streak{spec: &v1.Probe{SuccessThreshold: 2, FailureThreshold: 3}}
	var got []bool
	for _, r := range []results.Result{results.Success, results.Success, results.Failure, results.Failure, results.Success, results.Failure, results.Failure, results.Failure} {
		got = append(got, s.add(r))
	}
	require.Equal(t, []bool{false, true, false, false, false, false, false, true}, got)
}
