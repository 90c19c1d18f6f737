package dns

import (
	"context"
	"fmt"
	"net/netip"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"
)

// ServiceNamespace and ServiceName name the Service that holds the DNS addresses; clients and tools know it by this name.
const (
	ServiceNamespace = metav1.NamespaceSystem
	ServiceName      = "kube-dns"
)

// EnsureService creates the Service that keeps the DNS addresses (one per family, the first decides the primary one) taken and visible. It has no selector and no
// endpoints: every node answers itself. One that is there with the same address is left alone; with another address it is an error.
func EnsureService(ctx context.Context, client kubernetes.Interface, addresses ...netip.Addr) error {
	if len(addresses) == 0 {
		return fmt.Errorf("dns: no address for the service %s/%s", ServiceNamespace, ServiceName)
	}
	svc := kubeDNS(addresses)
	_, err := client.CoreV1().Services(ServiceNamespace).Create(ctx, svc, metav1.CreateOptions{})
	if !apierrors.IsAlreadyExists(err) && !apierrors.IsInvalid(err) { // an address that is taken, by the service itself too, is "invalid"
		return err
	}
	old, getErr := client.CoreV1().Services(ServiceNamespace).Get(ctx, ServiceName, metav1.GetOptions{})
	if getErr != nil {
		return fmt.Errorf("dns: create the service %s/%s: %w", ServiceNamespace, ServiceName, err)
	}
	if old.Spec.ClusterIP != svc.Spec.ClusterIP {
		return fmt.Errorf("dns: the service %s/%s has the address %s, not %s: delete it, or start with its address", ServiceNamespace, ServiceName, old.Spec.ClusterIP, svc.Spec.ClusterIP)
	}
	return nil
}

func kubeDNS(addresses []netip.Addr) *v1.Service {
	svc := &v1.Service{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: ServiceNamespace, Name: ServiceName,
			Labels: map[string]string{"k8s-app": "kube-dns", "kubernetes.io/cluster-service": "true", "kubernetes.io/name": "CoreDNS"},
		},
		Spec: v1.ServiceSpec{
			Type: v1.ServiceTypeClusterIP,
			Ports: []v1.ServicePort{
				{Name: "dns", Protocol: v1.ProtocolUDP, Port: port, TargetPort: intstr.FromInt32(port)},
				{Name: "dns-tcp", Protocol: v1.ProtocolTCP, Port: port, TargetPort: intstr.FromInt32(port)},
			},
		},
	}
	for _, ip := range addresses {
		family := v1.IPv4Protocol
		if ip.Is6() {
			family = v1.IPv6Protocol
		}
		svc.Spec.ClusterIPs = append(svc.Spec.ClusterIPs, ip.String())
		svc.Spec.IPFamilies = append(svc.Spec.IPFamilies, family)
	}
	svc.Spec.ClusterIP = svc.Spec.ClusterIPs[0]
	policy := v1.IPFamilyPolicySingleStack
	if len(addresses) > 1 {
		policy = v1.IPFamilyPolicyRequireDualStack
	}
	svc.Spec.IPFamilyPolicy = &policy
	return svc
}
