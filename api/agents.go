package api

import (
	"context"
	"fmt"
	"net/http"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	core "k8s.io/kubernetes/pkg/apis/core"
	kubeletclient "k8s.io/kubernetes/pkg/kubelet/client"
	noderest "k8s.io/kubernetes/pkg/registry/core/node/storage"
)

// defaultAgentPort is where an agent listens that has not said so in its node's status.
const defaultAgentPort = 10250

// agentLocator finds a node's agent: its address by upstream's order of preference, its port from the node's status.
type agentLocator struct {
	nodes     *noderest.REST
	transport http.RoundTripper
	// byName gives the node's name for an address. The transport knows it, and the agent's certificate has it: so there is no
	// doubt which node is meant, also where several have one address. Upstream's proxy to nodes cannot do without an address:
	// it looks whether that is one to be proxied to.
	byName bool
}

var _ kubeletclient.ConnectionInfoGetter = (*agentLocator)(nil)

// GetConnectionInfo implements kubeletclient.ConnectionInfoGetter.
func (l *agentLocator) GetConnectionInfo(ctx context.Context, name types.NodeName) (*kubeletclient.ConnectionInfo, error) {
	obj, err := l.nodes.Get(ctx, string(name), &metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	node, ok := obj.(*core.Node)
	if !ok {
		return nil, fmt.Errorf("expected a node, got %T", obj)
	}
	host, err := agentAddress(node)
	if err != nil {
		return nil, err
	}
	if l.byName {
		host = node.Name
	}
	port := int(node.Status.DaemonEndpoints.KubeletEndpoint.Port)
	if port <= 0 {
		port = defaultAgentPort
	}
	return &kubeletclient.ConnectionInfo{
		Scheme:                         "https",
		Hostname:                       host,
		Port:                           strconv.Itoa(port),
		Transport:                      l.transport,
		InsecureSkipTLSVerifyTransport: l.transport,
	}, nil
}

// agentAddress prefers addresses that need no name resolution.
func agentAddress(node *core.Node) (string, error) {
	for _, kind := range []core.NodeAddressType{core.NodeInternalIP, core.NodeExternalIP, core.NodeHostName} {
		for _, a := range node.Status.Addresses {
			if a.Type == kind && a.Address != "" {
				return a.Address, nil
			}
		}
	}
	return "", fmt.Errorf("node %s has no address of type %s", node.Name, corev1.NodeInternalIP)
}
