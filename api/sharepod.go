package api

import (
	"bytes"
	"maps"
	"slices"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// maxPodSpecs bounds the specs that are known for sharing.
const maxPodSpecs = 256

// podSpecs are specs of pods, one for each image, whose parts later pods share: the pods of a workload differ in a few names and nothing else.
// It is safe for concurrent use.
type podSpecs struct {
	mu    sync.Mutex
	known map[string]*corev1.PodSpec // by the image of the first container; guarded by mu
}

var sharedSpecs = podSpecs{known: map[string]*corev1.PodSpec{}}

// like gives an earlier spec with the same first image, or makes this one the earlier one of those to come.
func (s *podSpecs) like(spec *corev1.PodSpec) *corev1.PodSpec {
	if len(spec.Containers) == 0 {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	image := spec.Containers[0].Image
	if have := s.known[image]; have != nil {
		return have
	}
	if len(s.known) >= maxPodSpecs {
		clear(s.known)
	}
	s.known[image] = spec
	return nil
}

// sharePod lets a pod that is settled and about to become immutable share parts of its spec with an earlier one, and others with it.
func sharePod(obj runtime.Object) {
	p, ok := obj.(*corev1.Pod)
	if !ok {
		return
	}
	if like := sharedSpecs.like(&p.Spec); like != nil {
		shareAlike(&p.Spec, like)
	}
}

func shareAlike(s, like *corev1.PodSpec) {
	same(&s.RestartPolicy, like.RestartPolicy)
	same(&s.DNSPolicy, like.DNSPolicy)
	same(&s.ServiceAccountName, like.ServiceAccountName)
	same(&s.DeprecatedServiceAccount, like.DeprecatedServiceAccount)
	same(&s.NodeName, like.NodeName)
	same(&s.SchedulerName, like.SchedulerName)
	same(&s.PriorityClassName, like.PriorityClassName)
	sameValue(&s.TerminationGracePeriodSeconds, like.TerminationGracePeriodSeconds)
	sameValue(&s.EnableServiceLinks, like.EnableServiceLinks)
	sameValue(&s.PreemptionPolicy, like.PreemptionPolicy)
	sameValue(&s.Priority, like.Priority)
	samePart(&s.SecurityContext, like.SecurityContext)
	samePart(&s.Affinity, like.Affinity)
	sameList(&s.Tolerations, like.Tolerations, equalToleration)
	sameList(&s.TopologySpreadConstraints, like.TopologySpreadConstraints, func(a, b *corev1.TopologySpreadConstraint) bool { return equal(a, b) })
	sameList(&s.ImagePullSecrets, like.ImagePullSecrets, func(a, b *corev1.LocalObjectReference) bool { return *a == *b })
	if len(s.NodeSelector) > 0 && maps.Equal(s.NodeSelector, like.NodeSelector) {
		s.NodeSelector = like.NodeSelector
	}
	for i := range min(len(s.Volumes), len(like.Volumes)) {
		shareVolume(&s.Volumes[i], &like.Volumes[i])
	}
	for i := range min(len(s.InitContainers), len(like.InitContainers)) {
		shareContainer(&s.InitContainers[i], &like.InitContainers[i], s.Volumes)
	}
	for i := range min(len(s.Containers), len(like.Containers)) {
		shareContainer(&s.Containers[i], &like.Containers[i], s.Volumes)
	}
}

func shareVolume(v, like *corev1.Volume) {
	same(&v.Name, like.Name)
	samePart(&v.Projected, like.Projected)
	samePart(&v.ConfigMap, like.ConfigMap)
	samePart(&v.Secret, like.Secret)
	samePart(&v.EmptyDir, like.EmptyDir)
	samePart(&v.HostPath, like.HostPath)
	samePart(&v.PersistentVolumeClaim, like.PersistentVolumeClaim)
}

func shareContainer(c, like *corev1.Container, volumes []corev1.Volume) {
	same(&c.Name, like.Name)
	same(&c.Image, like.Image)
	same(&c.WorkingDir, like.WorkingDir)
	same(&c.TerminationMessagePath, like.TerminationMessagePath)
	same(&c.TerminationMessagePolicy, like.TerminationMessagePolicy)
	same(&c.ImagePullPolicy, like.ImagePullPolicy)
	if len(c.Command) > 0 && slices.Equal(c.Command, like.Command) {
		c.Command = like.Command
	}
	if len(c.Args) > 0 && slices.Equal(c.Args, like.Args) {
		c.Args = like.Args
	}
	sameList(&c.Ports, like.Ports, func(a, b *corev1.ContainerPort) bool { return *a == *b })
	sameList(&c.Env, like.Env, equalEnv)
	sameList(&c.EnvFrom, like.EnvFrom, func(a, b *corev1.EnvFromSource) bool { return equal(a, b) })
	samePart(&c.LivenessProbe, like.LivenessProbe)
	samePart(&c.ReadinessProbe, like.ReadinessProbe)
	samePart(&c.StartupProbe, like.StartupProbe)
	samePart(&c.Lifecycle, like.Lifecycle)
	samePart(&c.SecurityContext, like.SecurityContext)
	if equal(&c.Resources, &like.Resources) {
		c.Resources = like.Resources
	}
	if sameList(&c.VolumeMounts, like.VolumeMounts, equalMount) {
		return
	}
	for i := range c.VolumeMounts {
		m := &c.VolumeMounts[i]
		for k := range volumes {
			same(&m.Name, volumes[k].Name)
		}
		if i < len(like.VolumeMounts) {
			same(&m.MountPath, like.VolumeMounts[i].MountPath)
		}
	}
}

// same replaces a string by an equal one.
func same[S ~string](s *S, like S) {
	if *s == like {
		*s = like
	}
}

// sameValue replaces a pointer by one to an equal value.
func sameValue[T comparable](p **T, like *T) {
	if *p != nil && equalValue(*p, like) {
		*p = like
	}
}

// message is a part of an object in protobuf.
type message interface {
	Size() int
	MarshalToSizedBuffer(to []byte) (int, error)
}

// messageOf is a pointer to a part.
type messageOf[T any] interface {
	*T
	message
}

// samePart replaces a pointer by one to an equal part.
func samePart[T any, P messageOf[T]](p **T, like *T) {
	if *p != nil && like != nil && equal(P(*p), P(like)) {
		*p = like
	}
}

// sameList replaces a list by an equal one, and says whether it did.
func sameList[T any](list *[]T, like []T, equal func(a, b *T) bool) bool {
	if len(*list) == 0 || len(*list) != len(like) {
		return false
	}
	for i := range *list {
		if !equal(&(*list)[i], &like[i]) {
			return false
		}
	}
	*list = like
	return true
}

func equalToleration(a, b *corev1.Toleration) bool {
	return a.Key == b.Key && a.Operator == b.Operator && a.Value == b.Value && a.Effect == b.Effect && equalValue(a.TolerationSeconds, b.TolerationSeconds)
}

func equalEnv(a, b *corev1.EnvVar) bool {
	if a.ValueFrom != nil || b.ValueFrom != nil {
		return equal(a, b)
	}
	return a.Name == b.Name && a.Value == b.Value
}

func equalMount(a, b *corev1.VolumeMount) bool {
	return a.Name == b.Name && a.ReadOnly == b.ReadOnly && equalValue(a.RecursiveReadOnly, b.RecursiveReadOnly) && a.MountPath == b.MountPath &&
		a.SubPath == b.SubPath && equalValue(a.MountPropagation, b.MountPropagation) && a.SubPathExpr == b.SubPathExpr
}

func equalValue[T comparable](a, b *T) bool {
	return a == b || a != nil && b != nil && *a == *b
}

// equal says whether two parts that were decoded have the same encoding.
func equal(a, b message) bool {
	n := a.Size()
	if n == 0 || b.Size() != n {
		return b.Size() == n
	}
	held := specBuffers.Get().(*[]byte)
	defer specBuffers.Put(held)
	*held = slices.Grow((*held)[:0], 2*n)[:2*n]
	one, two := (*held)[:n], (*held)[n:]
	if _, err := a.MarshalToSizedBuffer(one); err != nil {
		return false
	}
	_, err := b.MarshalToSizedBuffer(two)
	return err == nil && bytes.Equal(one, two)
}
