package podspec

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	securejoin "github.com/cyphar/filepath-securejoin"
	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kubernetes/pkg/api/v1/resource"
	podshelper "k8s.io/kubernetes/pkg/apis/core/pods"
	v1helper "k8s.io/kubernetes/pkg/apis/core/v1/helper"
	"k8s.io/kubernetes/pkg/fieldpath"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
	"k8s.io/kubernetes/pkg/kubelet/envvars"
	envutil "k8s.io/kubernetes/pkg/kubelet/util/env"
	"k8s.io/kubernetes/third_party/forked/golang/expansion"

	"knarr/node/status"
	"knarr/node/volume"
)

// envBuilder computes the environment of one container.
type envBuilder struct {
	*Generator
	pod     *v1.Pod
	c       *v1.Container
	podIPs  []string
	volumes map[string]volume.Mount
	own     map[string]string
}

// Env returns the environment of a container: the variables it asks for, over
// those that describe services. $(VAR) is expanded in declared values.
// Source: https://kubernetes.io/docs/tasks/inject-data-application/define-interdependent-environment-variables/
func (g *Generator) Env(pod *v1.Pod, c *v1.Container, podIPs []string, volumes map[string]volume.Mount) ([]kubecontainer.EnvVar, error) {
	services, err := g.serviceEnv(pod)
	if err != nil {
		return nil, err
	}
	b := &envBuilder{Generator: g, pod: pod, c: c, volumes: volumes, own: map[string]string{},
		podIPs: status.SortPodIPs(g.HostIPs, podIPs)}
	if err := b.fromSources(); err != nil {
		return nil, err
	}
	expand := expansion.MappingFuncFor(b.own, services)
	for i := range c.Env {
		e := &c.Env[i]
		value := expansion.Expand(e.Value, expand)
		if e.Value == "" && e.ValueFrom != nil {
			var set bool
			if value, set, err = b.valueFrom(e.ValueFrom); err != nil {
				return nil, err
			}
			if !set {
				continue
			}
		}
		b.own[e.Name] = value
	}
	for k, v := range services {
		if _, set := b.own[k]; !set {
			b.own[k] = v
		}
	}
	out := make([]kubecontainer.EnvVar, 0, len(b.own))
	for _, k := range slices.Sorted(maps.Keys(b.own)) {
		out = append(out, kubecontainer.EnvVar{Name: k, Value: b.own[k]})
	}
	return out, nil
}

// fromSources takes in whole ConfigMaps and Secrets (envFrom).
func (b *envBuilder) fromSources() error {
	for _, from := range b.c.EnvFrom {
		switch {
		case from.ConfigMapRef != nil:
			cm, err := b.ConfigMap(b.pod.Namespace, from.ConfigMapRef.Name)
			if err != nil {
				if missing(err, from.ConfigMapRef.Optional) {
					continue
				}
				return err
			}
			for k, v := range cm.Data {
				b.own[from.Prefix+k] = v
			}
		case from.SecretRef != nil:
			s, err := b.Secret(b.pod.Namespace, from.SecretRef.Name)
			if err != nil {
				if missing(err, from.SecretRef.Optional) {
					continue
				}
				return err
			}
			for k, v := range s.Data {
				b.own[from.Prefix+k] = string(v)
			}
		}
	}
	return nil
}

// missing reports whether err may be passed over: the object does not exist
// and need not.
func missing(err error, optional *bool) bool {
	return apierrors.IsNotFound(err) && isTrue(optional)
}

func isTrue(p *bool) bool { return p != nil && *p }

// valueFrom resolves one variable; set is false when an optional source lacks it.
func (b *envBuilder) valueFrom(from *v1.EnvVarSource) (value string, set bool, err error) {
	switch {
	case from.FieldRef != nil:
		value, err = b.field(from.FieldRef)
		return value, true, err
	case from.ResourceFieldRef != nil:
		value, err = b.resourceField(from.ResourceFieldRef)
		return value, true, err
	case from.ConfigMapKeyRef != nil:
		return b.configMapKey(from.ConfigMapKeyRef)
	case from.SecretKeyRef != nil:
		return b.secretKey(from.SecretKeyRef)
	case from.FileKeyRef != nil:
		return b.fileKey(from.FileKeyRef)
	}
	return "", true, nil
}

func (b *envBuilder) configMapKey(ref *v1.ConfigMapKeySelector) (string, bool, error) {
	cm, err := b.ConfigMap(b.pod.Namespace, ref.Name)
	if err != nil {
		if missing(err, ref.Optional) {
			return "", false, nil
		}
		return "", false, err
	}
	v, ok := cm.Data[ref.Key]
	if !ok && !isTrue(ref.Optional) {
		return "", false, fmt.Errorf("couldn't find key %v in ConfigMap %v/%v", ref.Key, b.pod.Namespace, ref.Name)
	}
	return v, ok, nil
}

func (b *envBuilder) secretKey(ref *v1.SecretKeySelector) (string, bool, error) {
	s, err := b.Secret(b.pod.Namespace, ref.Name)
	if err != nil {
		if missing(err, ref.Optional) {
			return "", false, nil
		}
		return "", false, err
	}
	v, ok := s.Data[ref.Key]
	if !ok && !isTrue(ref.Optional) {
		return "", false, fmt.Errorf("couldn't find key %v in Secret %v/%v", ref.Key, b.pod.Namespace, ref.Name)
	}
	return string(v), ok, nil
}

func (b *envBuilder) fileKey(ref *v1.FileKeySelector) (string, bool, error) {
	v, ok := b.volumes[ref.VolumeName]
	if !ok || v.Path == "" {
		return "", false, fmt.Errorf("cannot find the volume %q referenced by FileKeyRef", ref.VolumeName)
	}
	path, err := securejoin.SecureJoin(v.Path, ref.Path)
	if err != nil {
		return "", false, err
	}
	value, err := envutil.ParseEnv(path, ref.Key)
	switch {
	case err != nil && isTrue(ref.Optional):
		return "", false, nil
	case err != nil:
		return "", false, errors.New("couldn't parse env file")
	case value == "" && !isTrue(ref.Optional):
		return "", false, fmt.Errorf("environment variable key %q not found in file %q", ref.Key, path)
	}
	return value, value != "", nil
}

func (b *envBuilder) field(ref *v1.ObjectFieldSelector) (string, error) {
	path, _, err := podshelper.ConvertDownwardAPIFieldLabel(ref.APIVersion, ref.FieldPath, "")
	if err != nil {
		return "", err
	}
	var hosts []string
	for _, ip := range b.HostIPs {
		hosts = append(hosts, ip.String())
	}
	first := func(list []string) string {
		if len(list) == 0 {
			return ""
		}
		return list[0]
	}
	switch path {
	case "spec.nodeName":
		return b.pod.Spec.NodeName, nil
	case "spec.serviceAccountName":
		return b.pod.Spec.ServiceAccountName, nil
	case "status.hostIP":
		return first(hosts), nil
	case "status.hostIPs":
		return strings.Join(hosts, ","), nil
	case "status.podIP":
		return first(b.podIPs), nil
	case "status.podIPs":
		return strings.Join(b.podIPs, ","), nil
	}
	return fieldpath.ExtractFieldPathAsString(b.pod, path)
}

// resourceField reads a request or limit. Limits that are not set are those of
// the node.
func (b *envBuilder) resourceField(ref *v1.ResourceFieldSelector) (string, error) {
	allocatable := b.Allocatable()
	if ref.ContainerName == "" || ref.ContainerName == b.c.Name {
		c := b.c.DeepCopy()
		resource.MergeContainerResourceLimits(c, allocatable)
		return resource.ExtractContainerResourceValue(ref, c)
	}
	pod := b.pod.DeepCopy()
	for i := range pod.Spec.Containers {
		resource.MergeContainerResourceLimits(&pod.Spec.Containers[i], allocatable)
	}
	for i := range pod.Spec.InitContainers {
		resource.MergeContainerResourceLimits(&pod.Spec.InitContainers[i], allocatable)
	}
	return resource.ExtractResourceValueByContainerName(ref, pod, ref.ContainerName)
}

// serviceEnv describes the services of the pod's namespace, and the API's own
// service in any case.
func (g *Generator) serviceEnv(pod *v1.Pod) (map[string]string, error) {
	links := pod.Spec.EnableServiceLinks
	if links == nil {
		return nil, errors.New("nil pod.spec.enableServiceLinks encountered, cannot construct envvars")
	}
	all, err := g.Services()
	if err != nil {
		return nil, err
	}
	chosen := map[string]*v1.Service{}
	for _, s := range all {
		if !v1helper.IsServiceIPSet(s) {
			continue
		}
		switch {
		case s.Namespace == metav1.NamespaceDefault && s.Name == "kubernetes":
			if _, taken := chosen[s.Name]; !taken {
				chosen[s.Name] = s
			}
		case s.Namespace == pod.Namespace && *links:
			chosen[s.Name] = s
		}
	}
	out := map[string]string{}
	for _, e := range envvars.FromServices(slices.Collect(maps.Values(chosen))) {
		out[e.Name] = e.Value
	}
	return out, nil
}
