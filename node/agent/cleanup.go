package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"

	"knarr/node/sweep"
)

const (
	// orphanGrace is the time, in seconds, for containers whose pod the API no
	// longer knows.
	orphanGrace = 1
	// eventRetry is the pause before a broken stream of container events is
	// opened again.
	eventRetry = time.Second
	// eventBuffer bounds the container events waiting to be handed to workers.
	eventBuffer = 1024
)

// followRuntime hands container events to the pods they concern. It returns
// when ctx ends, or with the error of a runtime that has no events at all.
func (a *Agent) followRuntime(ctx context.Context) error {
	ch := make(chan *runtimeapi.ContainerEventResponse, eventBuffer)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case e := <-ch:
				if e != nil {
					a.containerEvent(e)
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	defer func() { <-done }()
	for ctx.Err() == nil {
		err := a.opts.Runtime.GetContainerEvents(ctx, ch, func(runtimeapi.RuntimeService_GetContainerEventsClient) {
			a.pokeAll() // nothing that happened while the stream was broken is lost
		})
		if ctx.Err() != nil {
			break
		}
		klog.FromContext(ctx).Error(err, "Stream of container events broke, opening it again")
		t := time.NewTimer(eventRetry)
		select {
		case <-t.C:
			a.pokeAll()
		case <-ctx.Done():
			t.Stop()
		}
	}
	return nil
}

func (a *Agent) containerEvent(e *runtimeapi.ContainerEventResponse) {
	if m := e.GetPodSandboxStatus().GetMetadata(); m != nil {
		a.poke(types.UID(m.Uid))
		return
	}
	a.pokeAll()
}

func (a *Agent) pokeAll() {
	for _, w := range a.allWorkers() {
		w.poke()
	}
}

// cleanUp ends what a former run of the agent left of pods that are gone from
// the API: containers, volumes, cgroups, logs.
func (a *Agent) cleanUp(ctx context.Context) {
	log := klog.FromContext(ctx)
	orphans := map[types.UID]*kubecontainer.Pod{}
	running, err := a.runtime.GetPods(ctx, true)
	if err != nil {
		log.Error(err, "Pods of the runtime not listed")
	}
	for _, p := range running {
		orphans[p.ID] = p
	}
	dirs, err := a.volumes.OnDisk()
	if err != nil {
		log.Error(err, "Pod directories not listed")
	}
	for _, uid := range dirs {
		if orphans[uid] == nil {
			orphans[uid] = nil
		}
	}
	groups, err := a.cgroups.GetAllPodsFromCgroups()
	if err != nil {
		log.Error(err, "Pod cgroups not listed")
	}
	for uid := range groups {
		if orphans[uid] == nil {
			orphans[uid] = nil
		}
	}
	for uid, p := range orphans {
		if a.worker(uid) == nil {
			a.wg.Go(func() { a.endOrphan(ctx, uid, p) })
		}
	}
}

// endOrphan removes all that is left of a pod, trying until it worked.
func (a *Agent) endOrphan(ctx context.Context, uid types.UID, p *kubecontainer.Pod) {
	grace := int64(orphanGrace)
	for ctx.Err() == nil {
		err := a.endOrphanOnce(ctx, uid, p, &grace)
		if err == nil {
			klog.FromContext(ctx).Info("Removed what was left of a pod that is gone", "podUID", uid)
			return
		}
		klog.FromContext(ctx).Error(err, "Leftover of a pod not removed, will try again", "podUID", uid)
		t := time.NewTimer(retrySync)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
	}
}

func (a *Agent) endOrphanOnce(ctx context.Context, uid types.UID, p *kubecontainer.Pod, grace *int64) error {
	if p != nil {
		if err := a.runtime.KillPod(ctx, p.ToAPIPod(), *p, grace); err != nil {
			return err
		}
	}
	if err := a.removeFromRuntime(ctx, uid); err != nil {
		return err
	}
	if err := a.volumes.TearDown(uid); err != nil {
		return err
	}
	a.releaseUser(uid)
	a.allocation.RemovePod(uid)
	return a.cgroups.DestroyPod(uid)
}

// makePodDirs makes the directories of a pod.
func (a *Agent) makePodDirs(uid types.UID) error {
	for _, d := range []string{"volumes", "plugins"} {
		if err := os.MkdirAll(filepath.Join(a.volumes.PodDir(uid), d), 0o750); err != nil {
			return err
		}
	}
	return nil
}

// removeLogs removes the logs of a pod: <namespace>_<name>_<uid>.
func (a *Agent) removeLogs(uid types.UID) error {
	entries, err := os.ReadDir(a.opts.PodLogsDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), "_"+string(uid)) {
			return sweep.RemoveAll(filepath.Join(a.opts.PodLogsDir, e.Name()))
		}
	}
	return nil
}

// activePods returns the pods that take resources of the node.
func (a *Agent) activePods() []*v1.Pod {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.activeLocked()
}
