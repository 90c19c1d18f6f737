// Package podspec works out what the containers of a pod get from their
// surroundings: environment, mounts, /etc/hosts, host name.
package podspec

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	utilvalidation "k8s.io/apimachinery/pkg/util/validation"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
	"k8s.io/kubernetes/pkg/volume/util/hostutil"
	"k8s.io/kubernetes/pkg/volume/util/subpath"
	volumevalidation "k8s.io/kubernetes/pkg/volume/validation"

	"knarr/node/volume"
)

const (
	etcHosts       = "/etc/hosts"
	hostnameMaxLen = 63 // bytes, without the final NUL (HOST_NAME_MAX)
)

// Generator makes the options of containers. All fields are required. Safe for
// concurrent use.
type Generator struct {
	ClusterDomain string
	// HostIPs are the node's addresses, the primary one first.
	HostIPs []net.IP
	// PodDir is the directory of a pod's files on the host.
	PodDir func(uid types.UID) string
	// Volumes returns the volumes of a pod that are set up, by name.
	Volumes   func(uid types.UID) map[string]volume.Mount
	Subpather subpath.Interface
	HostUtil  hostutil.HostUtils
	// Sources of environment variables.
	ConfigMap func(namespace, name string) (*v1.ConfigMap, error)
	Secret    func(namespace, name string) (*v1.Secret, error)
	// Services lists all services, or fails until they are known.
	Services func() ([]*v1.Service, error)
	// Allocatable stands in for resource limits that a container does not set.
	Allocatable func() v1.ResourceList
	// RecursiveReadOnly says whether the runtime can mount so for the pod.
	RecursiveReadOnly func(pod *v1.Pod) bool
}

// Container returns the options for one container. The cleanup function, if
// not nil, is to be called when the container runs or failed to start, also
// when an error is returned.
func (g *Generator) Container(_ context.Context, pod *v1.Pod, c *v1.Container, podIPs []string, images kubecontainer.ImageVolumes) (*kubecontainer.RunContainerOptions, func(), error) {
	volumes := g.Volumes(pod.UID)
	env, err := g.Env(pod, c, podIPs, volumes)
	if err != nil {
		return nil, nil, err
	}
	opts := &kubecontainer.RunContainerOptions{Envs: env}
	mounts, cleanup, err := g.mounts(pod, c, volumes, env, images)
	if err != nil {
		return nil, cleanup, err
	}
	opts.Mounts = mounts
	if wantsHosts(pod, c, podIPs) {
		m, err := g.hostsMount(pod, podIPs)
		if err != nil {
			return nil, cleanup, err
		}
		opts.Mounts = append(opts.Mounts, m)
	}
	if c.TerminationMessagePath != "" {
		dir := filepath.Join(g.PodDir(pod.UID), "containers", c.Name)
		if err := os.MkdirAll(dir, 0o750); err != nil {
			return nil, cleanup, fmt.Errorf("container directory: %w", err)
		}
		opts.PodContainerDir = dir
	}
	return opts, cleanup, nil
}

func wantsHosts(pod *v1.Pod, c *v1.Container, podIPs []string) bool {
	own := slices.ContainsFunc(c.VolumeMounts, func(m v1.VolumeMount) bool { return m.MountPath == etcHosts })
	return !own && (len(podIPs) > 0 || pod.Spec.HostNetwork)
}

// Hostname returns the host name of a pod and the domain it is known under.
func (g *Generator) Hostname(pod *v1.Pod) (name, domain string, err error) {
	if o := pod.Spec.HostnameOverride; o != nil {
		if msgs := utilvalidation.IsDNS1123Subdomain(*o); len(msgs) != 0 {
			return "", "", fmt.Errorf("pod HostnameOverride %q is not a valid DNS subdomain: %s", *o, strings.Join(msgs, ";"))
		}
		name, err = cutHostname(pod.Name, *o)
		return name, "", err
	}
	name = pod.Name
	if h := pod.Spec.Hostname; h != "" {
		if msgs := utilvalidation.IsDNS1123Label(h); len(msgs) != 0 {
			return "", "", fmt.Errorf("pod Hostname %q is not a valid DNS label: %s", h, strings.Join(msgs, ";"))
		}
		name = h
	}
	if name, err = cutHostname(pod.Name, name); err != nil {
		return "", "", err
	}
	if s := pod.Spec.Subdomain; s != "" {
		if msgs := utilvalidation.IsDNS1123Label(s); len(msgs) != 0 {
			return "", "", fmt.Errorf("pod Subdomain %q is not a valid DNS label: %s", s, strings.Join(msgs, ";"))
		}
		domain = s + "." + pod.Namespace + ".svc." + g.ClusterDomain
	}
	return name, domain, nil
}

func cutHostname(pod, name string) (string, error) {
	if len(name) <= hostnameMaxLen {
		return name, nil
	}
	if name = strings.TrimRight(name[:hostnameMaxLen], "-."); name == "" {
		return "", fmt.Errorf("hostname for pod %q was invalid", pod)
	}
	return name, nil
}

// mounter collects the mounts of one container.
type mounter struct {
	*Generator
	pod     *v1.Pod
	c       *v1.Container
	env     []kubecontainer.EnvVar
	images  kubecontainer.ImageVolumes
	rro     bool
	cleanup func()
}

func (g *Generator) mounts(pod *v1.Pod, c *v1.Container, volumes map[string]volume.Mount, env []kubecontainer.EnvVar, images kubecontainer.ImageVolumes) ([]kubecontainer.Mount, func(), error) {
	b := &mounter{Generator: g, pod: pod, c: c, env: env, images: images, rro: g.RecursiveReadOnly(pod)}
	var out []kubecontainer.Mount
	for i := range c.VolumeMounts {
		vm := &c.VolumeMounts[i]
		v, ok := volumes[vm.Name]
		if !ok {
			return nil, b.cleanup, fmt.Errorf("cannot find volume %q to mount into container %q", vm.Name, c.Name)
		}
		m, err := b.mount(i, vm, v)
		if err != nil {
			return nil, b.cleanup, err
		}
		out = append(out, m)
	}
	return out, b.cleanup, nil
}

func (b *mounter) mount(i int, vm *v1.VolumeMount, v volume.Mount) (kubecontainer.Mount, error) {
	m := kubecontainer.Mount{
		Name: vm.Name, ContainerPath: vm.MountPath, HostPath: v.Path,
		ReadOnly: vm.ReadOnly || v.ReadOnly, SELinuxRelabel: v.SELinuxRelabel,
	}
	if !filepath.IsAbs(m.ContainerPath) {
		m.ContainerPath = filepath.Join("/", m.ContainerPath)
	}
	sub, err := b.subPath(vm)
	if err != nil {
		return m, err
	}
	switch image := b.images[vm.Name]; {
	case image != nil:
		m.Image, m.ImageSubPath, m.HostPath = image, sub, ""
	case sub != "":
		if m.HostPath, err = b.safeSubPath(i, vm, v, sub); err != nil {
			return m, err
		}
	}
	if m.Propagation, err = propagation(vm.MountPropagation); err != nil {
		return m, err
	}
	if m.RecursiveReadOnly, err = recursive(vm, b.rro); err != nil {
		return m, fmt.Errorf("failed to resolve recursive read-only mode: %w", err)
	}
	return m, nil
}

func (b *mounter) subPath(vm *v1.VolumeMount) (string, error) {
	sub := vm.SubPath
	if vm.SubPathExpr != "" {
		var err error
		if sub, err = kubecontainer.ExpandContainerVolumeMounts(*vm, b.env); err != nil {
			return "", err
		}
	}
	if sub == "" {
		return "", nil
	}
	if filepath.IsAbs(sub) {
		return "", fmt.Errorf("error SubPath `%s` must not be an absolute path", sub)
	}
	if err := volumevalidation.ValidatePathNoBacksteps(sub); err != nil {
		return "", fmt.Errorf("unable to provision SubPath `%s`: %w", sub, err)
	}
	return sub, nil
}

// safeSubPath returns a path on the host that shows the sub path of a volume
// and that nobody inside the volume can redirect. Details of errors stay on
// the node: they would tell users about its files.
func (b *mounter) safeSubPath(i int, vm *v1.VolumeMount, v volume.Mount, sub string) (string, error) {
	full := filepath.Join(v.Path, sub)
	if exists, err := b.HostUtil.PathExists(full); err == nil && !exists {
		perm, err := b.HostUtil.GetMode(v.Path)
		if err != nil {
			return "", err
		}
		if err := b.Subpather.SafeMakeDir(sub, v.Path, perm); err != nil {
			return "", fmt.Errorf("failed to create subPath directory for volumeMount %q of container %q", vm.Name, b.c.Name)
		}
	}
	path, cleanup, err := b.Subpather.PrepareSafeSubpath(subpath.Subpath{
		VolumeMountIndex: i, Path: full, VolumeName: v.InnerName, VolumePath: v.Path,
		PodDir: b.PodDir(b.pod.UID), ContainerName: b.c.Name,
	})
	if cleanup != nil {
		if before := b.cleanup; before != nil {
			b.cleanup = func() { before(); cleanup() }
		} else {
			b.cleanup = cleanup
		}
	}
	if err != nil {
		return "", fmt.Errorf("failed to prepare subPath for volumeMount %q of container %q", vm.Name, b.c.Name)
	}
	return path, nil
}

func propagation(mode *v1.MountPropagationMode) (runtimeapi.MountPropagation, error) {
	if mode == nil {
		return runtimeapi.MountPropagation_PROPAGATION_PRIVATE, nil
	}
	switch *mode {
	case v1.MountPropagationHostToContainer:
		return runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER, nil
	case v1.MountPropagationBidirectional:
		return runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL, nil
	case v1.MountPropagationNone:
		return runtimeapi.MountPropagation_PROPAGATION_PRIVATE, nil
	}
	return 0, fmt.Errorf("invalid MountPropagation mode: %q", *mode)
}

func recursive(vm *v1.VolumeMount, supported bool) (bool, error) {
	mode := vm.RecursiveReadOnly
	if mode == nil || *mode == v1.RecursiveReadOnlyDisabled {
		return false, nil
	}
	if !vm.ReadOnly {
		return false, fmt.Errorf("volume %q requested recursive read-only mode, but it is not read-only", vm.Name)
	}
	if p := vm.MountPropagation; p != nil && *p != v1.MountPropagationNone {
		return false, fmt.Errorf("volume %q requested recursive read-only mode, but it is not compatible with propagation %q", vm.Name, *p)
	}
	switch *mode {
	case v1.RecursiveReadOnlyIfPossible:
		return supported, nil
	case v1.RecursiveReadOnlyEnabled:
		if !supported {
			return false, fmt.Errorf("volume %q requested recursive read-only mode, but it is not supported by the runtime", vm.Name)
		}
		return true, nil
	}
	return false, fmt.Errorf("unknown recursive read-only mode %q", *mode)
}
