package podspec

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	v1 "k8s.io/api/core/v1"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
)

const (
	hostsHeader     = "# Kubernetes-managed hosts file.\n"
	hostsHeaderHost = "# Kubernetes-managed hosts file (host network).\n"
	hostsStatic     = "127.0.0.1\tlocalhost\n" +
		"::1\tlocalhost ip6-localhost ip6-loopback\n" +
		"fe00::0\tip6-localnet\n" +
		"fe00::0\tip6-mcastprefix\n" +
		"fe00::1\tip6-allnodes\n" +
		"fe00::2\tip6-allrouters\n"
)

// hostsMount writes the pod's /etc/hosts and returns its mount.
func (g *Generator) hostsMount(pod *v1.Pod, podIPs []string) (kubecontainer.Mount, error) {
	path := filepath.Join(g.PodDir(pod.UID), "etc-hosts")
	content, err := g.hosts(pod, podIPs)
	if err == nil {
		err = writeIfChanged(path, content)
	}
	if err != nil {
		return kubecontainer.Mount{}, fmt.Errorf("/etc/hosts of pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	return kubecontainer.Mount{Name: "k8s-managed-etc-hosts", ContainerPath: etcHosts, HostPath: path, SELinuxRelabel: true}, nil
}

func (g *Generator) hosts(pod *v1.Pod, podIPs []string) ([]byte, error) {
	if pod.Spec.HostNetwork {
		host, err := os.ReadFile(etcHosts)
		if err != nil {
			return nil, err
		}
		return append(append([]byte(hostsHeaderHost), host...), hostAliases(pod.Spec.HostAliases)...), nil
	}
	name, domain, err := g.Hostname(pod)
	if err != nil {
		return nil, err
	}
	return hostsFile(podIPs, name, domain, pod.Spec.HostAliases), nil
}

func hostsFile(podIPs []string, name, domain string, aliases []v1.HostAlias) []byte {
	var b bytes.Buffer
	b.WriteString(hostsHeader + hostsStatic)
	for _, ip := range podIPs {
		if domain != "" {
			fmt.Fprintf(&b, "%s\t%s.%s\t%s\n", ip, name, domain, name)
		} else {
			fmt.Fprintf(&b, "%s\t%s\n", ip, name)
		}
	}
	b.Write(hostAliases(aliases))
	return b.Bytes()
}

func hostAliases(aliases []v1.HostAlias) []byte {
	if len(aliases) == 0 {
		return nil
	}
	var b bytes.Buffer
	b.WriteString("\n# Entries added by HostAliases.\n")
	for _, a := range aliases {
		fmt.Fprintf(&b, "%s\t%s\n", a.IP, strings.Join(a.Hostnames, "\t"))
	}
	return b.Bytes()
}

// writeIfChanged keeps the file, which running containers have mounted, unless
// its content differs.
func writeIfChanged(path string, content []byte) error {
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, content) {
		return nil
	}
	if err := os.WriteFile(path, content, 0o644); err != nil {
		return err
	}
	return os.Chmod(path, 0o644)
}
