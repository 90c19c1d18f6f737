package tunnel

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"knarr/network/pod"
)

// Reach is what the tunnel of one node may lead to. Server and agent each make theirs from what they know, and each refuses
// all else: a server that was taken over reaches nothing of a node's surroundings, and a node's tunnel gets no connection
// that was meant for another. The zero value leads nowhere.
type Reach struct {
	// Addresses are the node's own.
	Addresses []netip.Addr
	// Port is that of the node's API.
	Port uint16
	// Ranges are those of the node's pods.
	Ranges []netip.Prefix
	// HostPort says whether a pod in the node's own network names the port. Nil means that none does.
	HostPort func(port uint16) bool
}

// Permits says whether a tunnel of the node may lead to target: to the node's API, to a port that a pod in the node's
// network names, to any port of its other pods. The node's own address in a pod range is no pod.
func (r Reach) Permits(target netip.AddrPort) bool {
	ip := target.Addr().Unmap()
	if slices.Contains(r.Addresses, ip) {
		return target.Port() == r.Port || r.HostPort != nil && r.HostPort(target.Port())
	}
	return slices.ContainsFunc(r.Ranges, func(p netip.Prefix) bool { return p.Contains(ip) && ip != pod.NodeAddress(p) })
}

// NamesHostPort says whether a pod in its node's network names the port.
func NamesHostPort(p *corev1.Pod, port uint16) bool {
	if !p.Spec.HostNetwork {
		return false
	}
	names := func(c corev1.Container) bool {
		return slices.ContainsFunc(c.Ports, func(p corev1.ContainerPort) bool { return p.ContainerPort == int32(port) })
	}
	return slices.ContainsFunc(p.Spec.Containers, names) || slices.ContainsFunc(p.Spec.InitContainers, names)
}

// Ranges are the pod ranges of a Node that lie in one of the cluster's, without those that cannot be read.
func Ranges(node *corev1.Node, cluster netip.Prefix) []netip.Prefix {
	texts := node.Spec.PodCIDRs
	if len(texts) == 0 && node.Spec.PodCIDR != "" {
		texts = []string{node.Spec.PodCIDR}
	}
	var out []netip.Prefix
	for _, text := range texts {
		p, err := netip.ParsePrefix(text)
		if err == nil && cluster.Bits() <= p.Bits() && cluster.Contains(p.Addr()) {
			out = append(out, p.Masked())
		}
	}
	return out
}

// addresses are those of a Node, the preferred first (upstream's order for reaching its API).
func addresses(node *corev1.Node) []netip.Addr {
	var out []netip.Addr
	for _, kind := range []corev1.NodeAddressType{corev1.NodeInternalIP, corev1.NodeExternalIP} {
		for _, a := range node.Status.Addresses {
			if ip, err := netip.ParseAddr(a.Address); err == nil && a.Type == kind {
				out = append(out, ip.Unmap())
			}
		}
	}
	return out
}
