// Package cgroup makes the cgroups of pods, one per pod below the node's root:
// <root>/pod<uid>, in every controller of cgroup v1 or in the one tree of v2.
// Containers get theirs below from the runtime.
package cgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/kubelet/cm"
)

// cpuPeriod is the length of a CPU quota period in microseconds.
const cpuPeriod = 100_000

const podPrefix = "pod"

// Manager keeps the pod cgroups of a node. Safe for concurrent use.
type Manager struct {
	root       cm.CgroupName
	rootPath   string
	cgroups    cm.CgroupManager
	subsystems *cm.CgroupSubsystems
}

var _ cm.PodContainerManager = (*Manager)(nil)

// New returns a Manager for pods below root, an absolute path below the cgroup
// mounts. The root itself is made with the first pod.
func New(root string) (*Manager, error) {
	subsystems, err := cm.GetCgroupSubsystems()
	if err != nil {
		return nil, fmt.Errorf("cgroup mounts: %w", err)
	}
	return &Manager{root: cm.ParseCgroupfsToCgroupName(root), rootPath: root, subsystems: subsystems,
		cgroups: cm.NewCgroupManager(klog.Background(), subsystems, "cgroupfs")}, nil
}

func (m *Manager) name(uid types.UID) cm.CgroupName {
	return cm.NewCgroupName(m.root, podPrefix+string(uid))
}

// GetPodContainerName returns the cgroup of a pod, as a name and as the path
// below the cgroup mounts that runtimes expect.
func (m *Manager) GetPodContainerName(pod *v1.Pod) (cm.CgroupName, string) {
	name := m.name(pod.UID)
	return name, m.cgroups.Name(name)
}

// EnsureExists makes the cgroup of a pod with the limits of its spec.
func (m *Manager) EnsureExists(logger klog.Logger, pod *v1.Pod) error {
	if m.Exists(pod) {
		return nil
	}
	return m.cgroups.Create(logger, &cm.CgroupConfig{
		Name:               m.name(pod.UID),
		ResourceParameters: cm.ResourceConfigForPod(pod, true, cpuPeriod, false, ""),
	})
}

// Exists reports whether the pod has its cgroup in every controller.
func (m *Manager) Exists(pod *v1.Pod) bool { return m.cgroups.Exists(m.name(pod.UID)) }

// Destroy removes a pod's cgroup and what is left below it. Processes must be gone.
func (m *Manager) Destroy(logger klog.Logger, name cm.CgroupName) error {
	var errs []error
	for _, mount := range m.mounts() {
		errs = append(errs, removeTree(filepath.Join(mount, name.ToCgroupfs())))
	}
	return errors.Join(errs...)
}

// DestroyPod removes the cgroup of a pod.
func (m *Manager) DestroyPod(uid types.UID) error { return m.Destroy(klog.Background(), m.name(uid)) }

// mounts returns the roots of all hierarchies.
func (m *Manager) mounts() []string {
	seen := map[string]bool{}
	var out []string
	for _, p := range m.subsystems.MountPoints {
		if !seen[p] {
			seen[p] = true
			out = append(out, p)
		}
	}
	return out
}

// removeTree removes a cgroup and its children, children first.
func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("cgroup not removed: %w", err)
	}
	return nil
}

// RemoveRoot removes the node's root cgroup with all that is below it.
func (m *Manager) RemoveRoot() error { return m.Destroy(klog.Background(), m.root) }

// ReduceCPULimits throttles a pod to the minimum.
func (m *Manager) ReduceCPULimits(logger klog.Logger, name cm.CgroupName) error {
	return m.cgroups.ReduceCPULimits(logger, name)
}

// GetAllPodsFromCgroups returns the pods that have a cgroup.
func (m *Manager) GetAllPodsFromCgroups() (map[types.UID]cm.CgroupName, error) {
	found := map[types.UID]cm.CgroupName{}
	for _, mount := range m.mounts() {
		entries, err := os.ReadDir(filepath.Join(mount, m.rootPath))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if uid, ok := strings.CutPrefix(e.Name(), podPrefix); ok && e.IsDir() {
				found[types.UID(uid)] = m.name(types.UID(uid))
			}
		}
	}
	return found, nil
}

// IsPodCgroup tells which pod a cgroup path belongs to.
func (m *Manager) IsPodCgroup(path string) (bool, types.UID) {
	uid, ok := strings.CutPrefix(filepath.Base(path), podPrefix)
	return ok && filepath.Dir(path) == m.rootPath, types.UID(uid)
}

// GetPodCgroupMemoryUsage returns the memory that a pod uses, in bytes.
func (m *Manager) GetPodCgroupMemoryUsage(pod *v1.Pod) (uint64, error) {
	n, err := m.cgroups.MemoryUsage(m.name(pod.UID))
	return uint64(max(n, 0)), err
}

// GetPodCgroupConfig reads back the limits of a pod.
func (m *Manager) GetPodCgroupConfig(pod *v1.Pod, resource v1.ResourceName) (*cm.ResourceConfig, error) {
	return m.cgroups.GetCgroupConfig(m.name(pod.UID), resource)
}

// SetPodCgroupConfig changes the limits of a pod.
func (m *Manager) SetPodCgroupConfig(logger klog.Logger, pod *v1.Pod, rc *cm.ResourceConfig) error {
	return m.cgroups.SetCgroupConfig(logger, m.name(pod.UID), rc)
}

// ContainerManager is what upstream's runtime manager asks about the node's
// resources: pod cgroups of ours, and nothing of device, CPU or memory managers.
type ContainerManager struct {
	cm.ContainerManager // answers "nothing of that kind"
	pods                *Manager
	nodeName            string
}

// NewContainerManager returns the ContainerManager of a node.
func NewContainerManager(pods *Manager, nodeName string) *ContainerManager {
	return &ContainerManager{ContainerManager: cm.NewStubContainerManager(), pods: pods, nodeName: nodeName}
}

// NewPodContainerManager returns the pod cgroups.
func (c *ContainerManager) NewPodContainerManager() cm.PodContainerManager { return c.pods }

// GetPodCgroupRoot returns the parent of all pod cgroups.
func (c *ContainerManager) GetPodCgroupRoot() string { return c.pods.rootPath }

// GetNodeConfig describes how cgroups are used.
func (c *ContainerManager) GetNodeConfig() cm.NodeConfig {
	return cm.NodeConfig{NodeName: types.NodeName(c.nodeName), CgroupsPerQOS: true, CgroupRoot: c.pods.rootPath,
		CgroupDriver: "cgroupfs", EnforceCPULimits: true}
}

// GetMountedSubsystems returns where the controllers are mounted.
func (c *ContainerManager) GetMountedSubsystems() *cm.CgroupSubsystems { return c.pods.subsystems }

// InternalContainerLifecycle has nothing to do around a container's start.
func (c *ContainerManager) InternalContainerLifecycle() cm.InternalContainerLifecycle {
	return noLifecycle{}
}

// PrepareDynamicResources refuses pods with resource claims.
func (c *ContainerManager) PrepareDynamicResources(_ context.Context, pod *v1.Pod) error {
	if len(pod.Spec.ResourceClaims) > 0 {
		return errors.New("this node does not support dynamic resources")
	}
	return nil
}

type noLifecycle struct{}

func (noLifecycle) PreCreateContainer(klog.Logger, *v1.Pod, *v1.Container, *runtimeapi.ContainerConfig) error {
	return nil
}
func (noLifecycle) PreStartContainer(klog.Logger, *v1.Pod, *v1.Container, string) error { return nil }
func (noLifecycle) PostStopContainer(klog.Logger, string) error                         { return nil }
