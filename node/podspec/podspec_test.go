package podspec

import (
	"errors"
	"net"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
)

func generator() *Generator {
	return &Generator{
		ClusterDomain: "cluster.local", HostIPs: []net.IP{net.ParseIP("192.0.2.1"), net.ParseIP("fd00::1")},
		ConfigMap: func(_, name string) (*v1.ConfigMap, error) {
			if name == "cm" {
				return &v1.ConfigMap{Data: map[string]string{"k": "v"}}, nil
			}
			return nil, apierrors.NewNotFound(v1.Resource("configmaps"), name)
		},
		Secret: func(_, name string) (*v1.Secret, error) {
			return nil, apierrors.NewNotFound(v1.Resource("secrets"), name)
		},
		Services: func() ([]*v1.Service, error) {
			svc := func(ns, name, ip string) *v1.Service {
				return &v1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}, Spec: v1.ServiceSpec{ClusterIP: ip, Ports: []v1.ServicePort{{Port: 80, Protocol: v1.ProtocolTCP}}}}
			}
			return []*v1.Service{svc("default", "kubernetes", "10.0.0.1"), svc("ns", "web", "10.0.0.2"), svc("other", "db", "10.0.0.3"), svc("ns", "headless", "None")}, nil
		},
		Allocatable:       func() v1.ResourceList { return v1.ResourceList{v1.ResourceCPU: resource.MustParse("4")} },
		RecursiveReadOnly: func(*v1.Pod) bool { return false },
	}
}

func envPod(links bool) *v1.Pod {
	return &v1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: "ns", Labels: map[string]string{"a": "b"}}, Spec: v1.PodSpec{EnableServiceLinks: &links}}
}

func asMap(list []kubecontainer.EnvVar) map[string]string {
	out := map[string]string{}
	for _, e := range list {
		out[e.Name] = e.Value
	}
	return out
}

func TestEnv(t *testing.T) {
	yes := true
	from := func(s v1.EnvVarSource) *v1.EnvVarSource { return &s }
	ref := func(name string) v1.LocalObjectReference { return v1.LocalObjectReference{Name: name} }
	for name, c := range map[string]struct {
		env  v1.EnvVar
		want string
		err  string
	}{
		"value":               {v1.EnvVar{Value: "x"}, "x", ""},
		"service":             {v1.EnvVar{Value: "$(WEB_SERVICE_HOST)"}, "10.0.0.2", ""},
		"escaped":             {v1.EnvVar{Value: "$$(WEB_SERVICE_HOST)"}, "$(WEB_SERVICE_HOST)", ""},
		"unknown variable":    {v1.EnvVar{Value: "$(NO)"}, "$(NO)", ""},
		"key":                 {v1.EnvVar{ValueFrom: from(v1.EnvVarSource{ConfigMapKeyRef: &v1.ConfigMapKeySelector{LocalObjectReference: ref("cm"), Key: "k"}})}, "v", ""},
		"no key":              {v1.EnvVar{ValueFrom: from(v1.EnvVarSource{ConfigMapKeyRef: &v1.ConfigMapKeySelector{LocalObjectReference: ref("cm"), Key: "z"}})}, "", "couldn't find key z in ConfigMap ns/cm"},
		"no key, optional":    {v1.EnvVar{ValueFrom: from(v1.EnvVarSource{ConfigMapKeyRef: &v1.ConfigMapKeySelector{LocalObjectReference: ref("cm"), Key: "z", Optional: &yes}})}, "unset", ""},
		"no secret":           {v1.EnvVar{ValueFrom: from(v1.EnvVarSource{SecretKeyRef: &v1.SecretKeySelector{LocalObjectReference: ref("s"), Key: "z"}})}, "", `secrets "s" not found`},
		"no secret, optional": {v1.EnvVar{ValueFrom: from(v1.EnvVarSource{SecretKeyRef: &v1.SecretKeySelector{LocalObjectReference: ref("s"), Key: "z", Optional: &yes}})}, "unset", ""},
		"pod IPs":             {v1.EnvVar{ValueFrom: from(v1.EnvVarSource{FieldRef: &v1.ObjectFieldSelector{APIVersion: "v1", FieldPath: "status.podIPs"}})}, "10.1.1.1,fd00::9", ""},
		"host IPs":            {v1.EnvVar{ValueFrom: from(v1.EnvVarSource{FieldRef: &v1.ObjectFieldSelector{APIVersion: "v1", FieldPath: "status.hostIPs"}})}, "192.0.2.1,fd00::1", ""},
		"label":               {v1.EnvVar{ValueFrom: from(v1.EnvVarSource{FieldRef: &v1.ObjectFieldSelector{APIVersion: "v1", FieldPath: "metadata.labels['a']"}})}, "b", ""},
		"limit of the node":   {v1.EnvVar{ValueFrom: from(v1.EnvVarSource{ResourceFieldRef: &v1.ResourceFieldSelector{Resource: "limits.cpu"}})}, "4", ""},
	} {
		t.Run(name, func(t *testing.T) {
			c.env.Name = "V"
			got, err := generator().Env(envPod(true), &v1.Container{Name: "c", Env: []v1.EnvVar{c.env}}, []string{"fd00::9", "10.1.1.1"}, nil)
			if c.err != "" {
				require.ErrorContains(t, err, c.err)
				return
			}
			require.NoError(t, err)
			value, set := asMap(got)["V"]
			if c.want == "unset" {
				require.False(t, set)
				return
			}
			require.Equal(t, c.want, value)
		})
	}
}

func TestServiceLinks(t *testing.T) {
	with, err := generator().Env(envPod(true), &v1.Container{}, nil, nil)
	require.NoError(t, err)
	without, err := generator().Env(envPod(false), &v1.Container{}, nil, nil)
	require.NoError(t, err)
	require.Contains(t, asMap(with), "WEB_SERVICE_HOST")
	require.NotContains(t, asMap(with), "DB_SERVICE_HOST")
	require.NotContains(t, asMap(with), "HEADLESS_SERVICE_HOST")
	require.NotContains(t, asMap(without), "WEB_SERVICE_HOST")
	require.Equal(t, "10.0.0.1", asMap(without)["KUBERNETES_SERVICE_HOST"])
	g := generator()
	g.Services = func() ([]*v1.Service, error) { return nil, errors.New("not yet") }
	_, err = g.Env(envPod(true), &v1.Container{}, nil, nil)
	require.ErrorContains(t, err, "not yet")
}

func TestHostname(t *testing.T) {
	g := generator()
	p := envPod(true)
	p.Name = strings.Repeat("a", 62) + ".b"
	name, domain, err := g.Hostname(p)
	require.NoError(t, err)
	require.Equal(t, strings.Repeat("a", 62), name, "cut, and not ending in a dot")
	require.Empty(t, domain)
	p.Spec.Hostname, p.Spec.Subdomain = "h", "s"
	name, domain, err = g.Hostname(p)
	require.NoError(t, err)
	require.Equal(t, "h s.ns.svc.cluster.local", name+" "+domain)
	p.Spec.Hostname = "No"
	_, _, err = g.Hostname(p)
	require.ErrorContains(t, err, `pod Hostname "No" is not a valid DNS label`)
}

func TestHostsFile(t *testing.T) {
	got := string(hostsFile([]string{"10.1.1.1"}, "h", "s.ns.svc.cluster.local", []v1.HostAlias{{IP: "1.2.3.4", Hostnames: []string{"x", "y"}}}))
	require.True(t, strings.HasPrefix(got, "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n"))
	require.Contains(t, got, "10.1.1.1\th.s.ns.svc.cluster.local\th\n")
	require.True(t, strings.HasSuffix(got, "\n# Entries added by HostAliases.\n1.2.3.4\tx\ty\n"))
}

func TestRecursiveReadOnly(t *testing.T) {
	on, maybe := v1.RecursiveReadOnlyEnabled, v1.RecursiveReadOnlyIfPossible
	ok, err := recursive(&v1.VolumeMount{ReadOnly: true, RecursiveReadOnly: &maybe}, false)
	require.NoError(t, err)
	require.False(t, ok)
	_, err = recursive(&v1.VolumeMount{ReadOnly: true, RecursiveReadOnly: &on}, false)
	require.ErrorContains(t, err, "not supported by the runtime")
	ok, err = recursive(&v1.VolumeMount{ReadOnly: true, RecursiveReadOnly: &on}, true)
	require.NoError(t, err)
	require.True(t, ok)
}
