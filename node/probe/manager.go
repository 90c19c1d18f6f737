// Package probe runs the startup, readiness and liveness probes of containers.
//
// A probe loop exists only while its container runs: Sync, called with every
// new pod status, starts loops for containers that run and stops the others.
// The first probe comes with the container's start plus its initial delay, not
// with the next tick of a clock (a liveness probe without a delay: after one
// period). While a container is young, its startup and
// readiness probes are also tried between periods, ever less often; such early
// tries can succeed but never count as failures, so that a pod is ready as soon
// as it is and thresholds mean what they say.
package probe

import (
	"context"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/record"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	_ "k8s.io/kubernetes/pkg/apis/core/install" // references of events need the kinds
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
	"k8s.io/kubernetes/pkg/kubelet/prober/results"
)

const (
	reasonUnhealthy = "Unhealthy"
	reasonWarning   = "ProbeWarning"

	// firstEarly is the pause before the first early try; each further one
	// waits twice as long.
	firstEarly = 50 * time.Millisecond
	// firstCounted is how long after the start of a young container the first
	// try counts.
	firstCounted = time.Second
)

// Manager runs the probes of all pods of the node. Safe for concurrent use.
type Manager struct {
	ctx      context.Context
	prober   *prober
	recorder record.EventRecorder
	changed  func(uid types.UID)
	start    time.Time

	liveness, readiness, startup *resultSet

	mu    sync.Mutex
	loops map[loopKey]*loop
	wg    sync.WaitGroup
}

type loopKey struct {
	uid       types.UID
	container string
	kind      Kind
}

type loop struct {
	id     kubecontainer.ContainerID
	cancel context.CancelFunc
}

// New returns a Manager whose loops end with ctx. changed is called when a
// probe of the pod changed its result; it must not block. SetRunner must be
// called before the first Sync.
func New(ctx context.Context, recorder record.EventRecorder, changed func(uid types.UID)) *Manager {
	return &Manager{ctx: ctx, recorder: recorder, changed: changed, start: time.Now(),
		liveness: newResultSet(), readiness: newResultSet(), startup: newResultSet(), loops: map[loopKey]*loop{}}
}

// SetRunner says what runs the commands of exec probes.
func (m *Manager) SetRunner(r kubecontainer.CommandRunner) { m.prober = newProber(r) }

// Results returns the results by container, for the runtime manager.
func (m *Manager) Results() (liveness, readiness, startup results.Manager) {
	return m.liveness, m.readiness, m.startup
}

// Wait returns when all loops have ended; call it after the context of New ended.
func (m *Manager) Wait() { m.wg.Wait() }

// probed calls f for each container of the pod that can have probes.
func probed(pod *v1.Pod, f func(c *v1.Container, sidecar bool)) {
	for i := range pod.Spec.InitContainers {
		if c := &pod.Spec.InitContainers[i]; podutil.IsRestartableInitContainer(c) {
			f(c, true)
		}
	}
	for i := range pod.Spec.Containers {
		f(&pod.Spec.Containers[i], false)
	}
}

func find(s *v1.PodStatus, name string, sidecar bool) *v1.ContainerStatus {
	list := s.ContainerStatuses
	if sidecar {
		list = s.InitContainerStatuses
	}
	for i := range list {
		if list[i].Name == name {
			return &list[i]
		}
	}
	return nil
}

// Apply sets started and ready of the containers in a status from what is
// known. previous is the status that was reported last: it tells what was true
// before the agent was restarted.
func (m *Manager) Apply(pod *v1.Pod, s *v1.PodStatus, previous *v1.PodStatus) {
	probed(pod, func(c *v1.Container, sidecar bool) {
		cs := find(s, c.Name, sidecar)
		if cs == nil {
			return
		}
		started := m.isStarted(c, cs)
		cs.Started = &started
		cs.Ready = started && m.isReady(c, cs, find(previous, c.Name, sidecar))
	})
	for i := range pod.Spec.InitContainers {
		c := &pod.Spec.InitContainers[i]
		cs := find(s, c.Name, true)
		if cs == nil || podutil.IsRestartableInitContainer(c) {
			continue
		}
		t := cs.State.Terminated
		cs.Ready = t != nil && t.ExitCode == 0
		started := cs.State.Running != nil
		cs.Started = &started
	}
}

// isStarted says whether the container is past its startup probe. The status
// carries Started over from before a restart of the agent.
func (m *Manager) isStarted(c *v1.Container, cs *v1.ContainerStatus) bool {
	if cs.State.Running == nil {
		return false
	}
	if r, ok := m.startup.Get(kubecontainer.ParseContainerID(cs.ContainerID)); ok {
		return r == results.Success
	}
	if c.StartupProbe == nil {
		return true
	}
	return cs.Started != nil && *cs.Started && cs.State.Running.StartedAt.Time.Before(m.start)
}

func (m *Manager) isReady(c *v1.Container, cs, before *v1.ContainerStatus) bool {
	if cs.State.Running == nil {
		return false
	}
	if c.ReadinessProbe == nil {
		return true
	}
	if r, ok := m.readiness.Get(kubecontainer.ParseContainerID(cs.ContainerID)); ok {
		return r == results.Success
	}
	return before != nil && before.Ready && before.ContainerID == cs.ContainerID
}

// Sync starts and stops probe loops so that they fit the status of the pod.
// ending says that the pod is being stopped: only readiness is still probed.
func (m *Manager) Sync(pod *v1.Pod, s *v1.PodStatus, ending bool) {
	probed(pod, func(c *v1.Container, sidecar bool) {
		cs := find(s, c.Name, sidecar)
		for _, kind := range []Kind{Startup, Readiness, Liveness} {
			spec := kind.of(c)
			if spec == nil {
				continue
			}
			k := loopKey{pod.UID, c.Name, kind}
			if cs == nil || cs.State.Running == nil || (ending && kind != Readiness) {
				m.stop(k)
				continue
			}
			started := cs.Started != nil && *cs.Started
			t := target{pod: pod, container: c, id: kubecontainer.ParseContainerID(cs.ContainerID), podIP: s.PodIP}
			switch {
			case kind == Startup && started:
				// Needed by the runtime manager also after a restart of the agent.
				m.startup.put(t.id, results.Success)
				m.stop(k)
			case kind == Startup, started:
				m.run(k, t, cs.State.Running.StartedAt.Time)
			default:
				m.stop(k)
			}
		}
	})
}

// Remove stops all probes of a pod and drops their results.
func (m *Manager) Remove(pod *v1.Pod) {
	probed(pod, func(c *v1.Container, _ bool) {
		for _, kind := range []Kind{Startup, Readiness, Liveness} {
			m.stop(loopKey{pod.UID, c.Name, kind})
		}
	})
}

func (m *Manager) resultsOf(kind Kind) *resultSet {
	switch kind {
	case Startup:
		return m.startup
	case Readiness:
		return m.readiness
	default:
		return m.liveness
	}
}

func (m *Manager) stop(k loopKey) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if l := m.loops[k]; l != nil {
		l.cancel()
		delete(m.loops, k)
	}
}

// Forget drops the results of a container that is gone.
func (m *Manager) Forget(id kubecontainer.ContainerID) {
	m.liveness.Remove(id)
	m.readiness.Remove(id)
	m.startup.Remove(id)
}

// run starts the loop for a container unless it runs already.
func (m *Manager) run(k loopKey, t target, startedAt time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if l := m.loops[k]; l != nil {
		if l.id == t.id {
			return
		}
		l.cancel()
		m.Forget(l.id)
	}
	ctx, cancel := context.WithCancel(m.ctx)
	m.loops[k] = &loop{id: t.id, cancel: cancel}
	if k.kind == Startup {
		m.startup.put(t.id, results.Unknown)
	}
	m.wg.Go(func() { m.follow(ctx, k.kind, t, startedAt) })
}

// follow probes one container until ctx ends or nothing can change any more.
func (m *Manager) follow(ctx context.Context, kind Kind, t target, startedAt time.Time) {
	spec := kind.of(t.container)
	period := time.Duration(max(spec.PeriodSeconds, 1)) * time.Second
	delay := time.Duration(spec.InitialDelaySeconds) * time.Second
	if kind == Liveness && delay == 0 {
		delay = period // a container that listens late is not dead
	}
	first := startedAt.Add(delay)
	timer := time.NewTimer(max(time.Until(first), 0))
	defer timer.Stop()
	young := kind != Liveness && time.Since(startedAt) < period
	st := streak{spec: spec}
	due, early := first, firstEarly // due: when the next try counts
	if young {
		due = first.Add(min(period, firstCounted))
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		now := time.Now()
		counts := !young || !now.Before(due)
		res, ok := m.try(ctx, kind, t, counts)
		if ctx.Err() != nil {
			return
		}
		if counts {
			due = now.Add(period)
		}
		if ok && (counts || res == results.Success) {
			if st.add(res) && m.settled(kind, t, res) {
				return
			}
		}
		young = young && res != results.Success
		wait := max(time.Until(due), 0)
		if young && early < wait {
			wait = early
			early *= 2
		}
		timer.Reset(wait)
	}
}

// try probes once and records the event if the try counts.
func (m *Manager) try(ctx context.Context, kind Kind, t target, counts bool) (results.Result, bool) {
	res, reason, event, err := m.prober.run(ctx, kind, t)
	if event != "" && counts && ctx.Err() == nil {
		if ref, refErr := kubecontainer.GenerateContainerRef(t.pod, t.container); refErr == nil {
			m.recorder.Event(ref, v1.EventTypeWarning, reason, event)
		}
	}
	return res, err == nil
}

// settled keeps a result that reached its threshold and reports whether the
// loop has nothing more to find out about this container.
func (m *Manager) settled(kind Kind, t target, res results.Result) bool {
	if m.resultsOf(kind).put(t.id, res) {
		m.changed(t.pod.UID)
	}
	return kind == Startup || (kind == Liveness && res == results.Failure)
}

// streak counts equal results in a row.
type streak struct {
	spec *v1.Probe
	last results.Result
	run  int32
}

// add takes in a result and reports whether it reached its threshold.
func (s *streak) add(r results.Result) bool {
	if s.run == 0 || s.last != r {
		s.last, s.run = r, 0
	}
	s.run++
	if r == results.Success {
		return s.run >= max(s.spec.SuccessThreshold, 1)
	}
	return s.run >= max(s.spec.FailureThreshold, 1)
}
