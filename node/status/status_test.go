package status

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
)

var always = v1.ContainerRestartPolicyAlways

func testPod(policy v1.RestartPolicy, inits []string, apps ...string) *v1.Pod {
	p := &v1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: "ns", UID: "u", Generation: 4}, Spec: v1.PodSpec{RestartPolicy: policy}}
	for _, n := range inits {
		c := v1.Container{Name: n}
		if n[0] == '+' { // a sidecar
			c.RestartPolicy = &always
		}
		p.Spec.InitContainers = append(p.Spec.InitContainers, c)
	}
	for _, n := range apps {
		p.Spec.Containers = append(p.Spec.Containers, v1.Container{Name: n, Image: "i"})
	}
	return p
}

func runs(name string) v1.ContainerStatus {
	yes := true
	return v1.ContainerStatus{Name: name, Started: &yes, State: v1.ContainerState{Running: &v1.ContainerStateRunning{}}}
}

func exited(name string, code int32) v1.ContainerStatus {
	return v1.ContainerStatus{Name: name, State: v1.ContainerState{Terminated: &v1.ContainerStateTerminated{ExitCode: code}}}
}

func waits(name string, last *v1.ContainerStateTerminated) v1.ContainerStatus {
	return v1.ContainerStatus{Name: name, State: v1.ContainerState{Waiting: &v1.ContainerStateWaiting{}}, LastTerminationState: v1.ContainerState{Terminated: last}}
}

func TestPhase(t *testing.T) {
	failed, ok := &v1.ContainerStateTerminated{ExitCode: 1}, &v1.ContainerStateTerminated{}
	const (
		A = v1.RestartPolicyAlways
		F = v1.RestartPolicyOnFailure
		N = v1.RestartPolicyNever
	)
	list := func(s ...v1.ContainerStatus) []v1.ContainerStatus { return s }
	for name, c := range map[string]struct {
		policy   v1.RestartPolicy
		inits    []string
		statuses []v1.ContainerStatus
		terminal bool
		want     v1.PodPhase
	}{
		"nothing known":                {A, nil, nil, false, v1.PodPending},
		"one waits":                    {A, nil, list(runs("a"), waits("b", nil)), false, v1.PodPending},
		"all run":                      {A, nil, list(runs("a"), runs("b")), false, v1.PodRunning},
		"one ended, one runs":          {N, nil, list(runs("a"), exited("b", 1)), false, v1.PodRunning},
		"all ended, always":            {A, nil, list(exited("a", 0), exited("b", 1)), false, v1.PodRunning},
		"all ended, always, terminal":  {A, nil, list(exited("a", 0), exited("b", 1)), true, v1.PodFailed},
		"all well, always, terminal":   {A, nil, list(exited("a", 0), exited("b", 0)), true, v1.PodSucceeded},
		"all well, on failure":         {F, nil, list(exited("a", 0), exited("b", 0)), false, v1.PodSucceeded},
		"one failed, on failure":       {F, nil, list(exited("a", 0), exited("b", 1)), false, v1.PodRunning},
		"one failed, never":            {N, nil, list(exited("a", 0), exited("b", 1)), false, v1.PodFailed},
		"backing off":                  {A, nil, list(waits("a", failed), waits("b", failed)), false, v1.PodRunning},
		"unknown and running":          {A, nil, list(runs("a")), false, v1.PodPending},
		"init runs":                    {A, []string{"i"}, list(runs("i"), waits("a", nil), waits("b", nil)), false, v1.PodPending},
		"init failed, never":           {N, []string{"i"}, list(exited("i", 1), waits("a", nil), waits("b", nil)), false, v1.PodFailed},
		"init failed, always":          {A, []string{"i"}, list(exited("i", 1), waits("a", nil), waits("b", nil)), false, v1.PodPending},
		"init backing off, never":      {N, []string{"i"}, list(waits("i", failed), waits("a", nil), waits("b", nil)), false, v1.PodFailed},
		"init done":                    {N, []string{"i"}, list(exited("i", 0), runs("a"), runs("b")), false, v1.PodRunning},
		"sidecar not started":          {A, []string{"+s"}, list(waits("+s", nil), waits("a", nil), waits("b", nil)), false, v1.PodPending},
		"sidecar runs, apps ended":     {N, []string{"+s"}, list(runs("+s"), exited("a", 0), exited("b", 0)), false, v1.PodRunning},
		"sidecar ended, apps ended":    {N, []string{"+s"}, list(exited("+s", 137), exited("a", 0), exited("b", 0)), true, v1.PodSucceeded},
		"sidecar backing off, running": {A, []string{"+s"}, list(waits("+s", ok), runs("a"), runs("b")), false, v1.PodRunning},
	} {
		t.Run(name, func(t *testing.T) {
			p := testPod(c.policy, c.inits, "a", "b")
			require.Equal(t, c.want, phaseOf(p, c.statuses, c.terminal, false))
		})
	}
}

// input makes the input of Compute for containers as the runtime lists them.
func input(p *v1.Pod, previous v1.PodStatus, cs ...*kubecontainer.Status) Input {
	return Input{Pod: p, Previous: previous, HostIPs: []net.IP{net.IPv4(192, 0, 2, 1)},
		Runtime: &kubecontainer.PodStatus{ID: p.UID, IPs: []string{"fd00::1", "10.0.0.1"}, ContainerStatuses: cs, ActiveContainerStatuses: cs,
			SandboxStatuses: []*runtimeapi.PodSandboxStatus{{Metadata: &runtimeapi.PodSandboxMetadata{}, Linux: &runtimeapi.LinuxPodSandboxStatus{Namespaces: &runtimeapi.Namespace{Options: &runtimeapi.NamespaceOption{}}}, State: runtimeapi.PodSandboxState_SANDBOX_READY, Network: &runtimeapi.PodSandboxNetworkStatus{Ip: "10.0.0.1"}}}},
		StartFailure: func(string) (string, string, bool) { return "", "", false }}
}

func rtStatus(name, id string, state kubecontainer.State, code, restarts int, created time.Time) *kubecontainer.Status {
	return &kubecontainer.Status{ID: kubecontainer.BuildContainerID("knarr", id), Name: name, State: state, ExitCode: code, RestartCount: restarts, CreatedAt: created, StartedAt: created}
}

func TestComputeRestarted(t *testing.T) {
	now := time.Now()
	p := testPod(v1.RestartPolicyAlways, nil, "a")
	s := Compute(input(p, v1.PodStatus{}, rtStatus("a", "new", kubecontainer.ContainerStateRunning, 0, 1, now),
		rtStatus("a", "old", kubecontainer.ContainerStateExited, 7, 0, now.Add(-time.Minute))))
	c := s.ContainerStatuses[0]
	require.Equal(t, v1.PodRunning, s.Phase)
	require.Equal(t, "knarr://new", c.ContainerID)
	require.Equal(t, int32(1), c.RestartCount)
	require.Equal(t, int32(7), c.LastTerminationState.Terminated.ExitCode)
	require.Equal(t, "10.0.0.1", s.PodIP, "the family of the node comes first")
	require.Len(t, s.PodIPs, 2)
	require.Equal(t, "192.0.2.1", s.HostIP)
	require.Equal(t, int64(4), s.ObservedGeneration)
}

func TestComputeStartFailure(t *testing.T) {
	p := testPod(v1.RestartPolicyAlways, nil, "a")
	in := input(p, v1.PodStatus{}, rtStatus("a", "x", kubecontainer.ContainerStateExited, 2, 3, time.Now()))
	in.StartFailure = func(string) (string, string, bool) { return "CrashLoopBackOff", "back-off", true }
	c := Compute(in).ContainerStatuses[0]
	require.Equal(t, &v1.ContainerStateWaiting{Reason: "CrashLoopBackOff", Message: "back-off"}, c.State.Waiting)
	require.Equal(t, int32(2), c.LastTerminationState.Terminated.ExitCode)
	require.Equal(t, int32(3), c.RestartCount)
}

func TestComputeLostContainer(t *testing.T) {
	p := testPod(v1.RestartPolicyAlways, nil, "a")
	was := runs("a")
	was.RestartCount = 2
	s := Compute(input(p, v1.PodStatus{Phase: v1.PodRunning, ContainerStatuses: []v1.ContainerStatus{was}}))
	c := s.ContainerStatuses[0]
	require.Equal(t, "ContainerCreating", c.State.Waiting.Reason)
	require.Equal(t, "ContainerStatusUnknown", c.LastTerminationState.Terminated.Reason)
	require.Equal(t, int32(3), c.RestartCount)
	require.Equal(t, v1.PodRunning, s.Phase, "a lost container does not make the pod pending again")
}

func TestComputeKeepsTerminalPhase(t *testing.T) {
	p := testPod(v1.RestartPolicyNever, nil, "a")
	p.Status.Phase, p.Status.Reason = v1.PodFailed, "Evicted"
	s := Compute(input(p, p.Status, rtStatus("a", "x", kubecontainer.ContainerStateRunning, 0, 0, time.Now())))
	require.Equal(t, v1.PodFailed, s.Phase)
	require.Equal(t, "Evicted", s.Reason)
	in := input(testPod(v1.RestartPolicyNever, nil, "a"), v1.PodStatus{}, rtStatus("a", "x", kubecontainer.ContainerStateRunning, 0, 0, time.Now()))
	in.Override = &Override{"DeadlineExceeded", "late"}
	s = Compute(in)
	require.Equal(t, []any{v1.PodFailed, "DeadlineExceeded", "late"}, []any{s.Phase, s.Reason, s.Message})
}

func TestFinish(t *testing.T) {
	p := testPod(v1.RestartPolicyAlways, []string{"i"}, "a")
	s := Finish(p, v1.PodStatus{Phase: v1.PodPending, InitContainerStatuses: []v1.ContainerStatus{runs("i")}, ContainerStatuses: []v1.ContainerStatus{waits("a", nil)}})
	require.Equal(t, v1.PodFailed, s.Phase)
	require.Equal(t, int32(137), s.InitContainerStatuses[0].State.Terminated.ExitCode)
	require.NotNil(t, s.ContainerStatuses[0].State.Waiting, "an app that never started did not fail")
	s = Finish(testPod(v1.RestartPolicyNever, nil, "a"), v1.PodStatus{Phase: v1.PodSucceeded, ContainerStatuses: []v1.ContainerStatus{exited("a", 0)}})
	require.Equal(t, v1.PodSucceeded, s.Phase)
}

func TestSettleKeepsTimes(t *testing.T) {
	p := testPod(v1.RestartPolicyAlways, nil, "a")
	long := metav1.NewTime(time.Now().Add(-time.Hour).Truncate(time.Second))
	old := v1.PodStatus{StartTime: &long, Conditions: []v1.PodCondition{{Type: v1.PodReady, Status: v1.ConditionTrue, LastTransitionTime: long}, {Type: v1.PodInitialized, Status: v1.ConditionFalse, LastTransitionTime: long}}}
	next := v1.PodStatus{Conditions: []v1.PodCondition{{Type: v1.PodReady, Status: v1.ConditionTrue}, {Type: v1.PodInitialized, Status: v1.ConditionTrue}}}
	settle(p, &old, &next, time.Now())
	require.True(t, next.StartTime.Equal(&long))
	require.True(t, next.Conditions[0].LastTransitionTime.Equal(&long))
	require.False(t, next.Conditions[1].LastTransitionTime.Equal(&long))
}

func TestTransitionRefused(t *testing.T) {
	p := testPod(v1.RestartPolicyNever, nil, "a")
	old, next := &v1.PodStatus{ContainerStatuses: []v1.ContainerStatus{exited("a", 0)}}, &v1.PodStatus{ContainerStatuses: []v1.ContainerStatus{runs("a")}}
	require.Error(t, checkTransition(p, old, next))
	p.Spec.RestartPolicy = v1.RestartPolicyAlways
	require.NoError(t, checkTransition(p, old, next))
}

// TestWriter: a terminal phase waits for the containers, foreign conditions
// stay, a deleted pod is removed when it has finished.
func TestWriter(t *testing.T) {
	defer goleak.VerifyNone(t)
	ctx, cancel := context.WithCancel(context.Background())
	p := testPod(v1.RestartPolicyNever, nil, "a")
	p.Status = v1.PodStatus{Phase: v1.PodRunning, Conditions: []v1.PodCondition{{Type: "example.com/gate", Status: v1.ConditionTrue}}}
	client := fake.NewSimpleClientset(p)
	var alive atomic.Bool
	alive.Store(true)
	w := NewWriter(client, func(types.UID) bool { return alive.Load() })
	w.Set(p, v1.PodStatus{Phase: v1.PodSucceeded, ContainerStatuses: []v1.ContainerStatus{exited("a", 0)}}, false)
	w.Start(ctx)
	get := func() *v1.Pod {
		p, err := client.CoreV1().Pods("ns").Get(ctx, "p", metav1.GetOptions{})
		if err != nil {
			return nil
		}
		return p
	}
	require.Eventually(t, func() bool { return len(get().Status.ContainerStatuses) == 1 }, 5*time.Second, time.Millisecond)
	require.Equal(t, v1.PodRunning, get().Status.Phase, "held back while containers may run")
	require.Len(t, get().Status.Conditions, 1)
	alive.Store(false)
	w.Kick(p.UID)
	require.Eventually(t, func() bool { return get().Status.Phase == v1.PodSucceeded }, 5*time.Second, time.Millisecond)
	st, _ := w.Get(p.UID)
	w.Set(get(), st, true)
	deleted := get().DeepCopy()
	now := metav1.Now()
	deleted.DeletionTimestamp = &now
	w.Observe(deleted)
	require.Eventually(t, func() bool { return get() == nil }, 5*time.Second, time.Millisecond)
	cancel()
	w.Wait()
}
