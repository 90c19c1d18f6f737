package system

import (
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/tools/cache"

	"knarr/apiserver"
	"knarr/cli"
	"knarr/system/pki"
	"knarr/system/tunnel"
)

// newTunnels makes the server's end of the nodes' tunnels, through which it also dials where there is none.
func (p *controlPlane) newTunnels() (*tunnel.Hub, error) {
	core := p.informers.Core().V1()
	nodes := core.Nodes().Informer()
	if err := nodes.AddIndexers(tunnel.NodeIndexers(p.config.PodCIDR)); err != nil {
		return nil, err
	}
	return tunnel.NewHub(tunnel.HubOptions{
		Nodes:     tunnel.NewNodes(nodes.GetIndexer(), p.config.PodCIDR),
		Pods:      tunnel.Pods{Lister: core.Pods().Lister()},
		PodRoutes: !p.config.NoAgent,
		Dialer:    &net.Dialer{Timeout: dialTimeout},
		Log:       p.log,
	}), nil
}

// keepTunnels keeps a tunnel of the node to each server.
func keepTunnels(g *group, config cli.AgentConfig, identity *pki.NodeIdentity, n *node) error {
	u, err := url.Parse(config.Server)
	if err != nil {
		return fmt.Errorf("the server's URL: %w", err)
	}
	server := u.Host
	if u.Port() == "" {
		server = net.JoinHostPort(u.Hostname(), "443")
	}
	endpoints := n.config.informers.Discovery().V1().EndpointSlices()
	changed, err := serversChange(endpoints.Informer())
	if err != nil {
		return err
	}
	a := tunnel.NewAgent(tunnel.AgentOptions{
		Server: server, Path: apiserver.TunnelPath, TLS: identity.ClientTLS(), Reach: n.reach, Log: slog.Default(), Changed: changed,
		Servers: func() []string {
			list, err := endpoints.Lister().EndpointSlices(metav1.NamespaceDefault).List(ofServers)
			if err != nil {
				return nil
			}
			return servers(list)
		},
	})
	g.run("tunnels", a.Run)
	return nil
}

// ofServers selects the endpoints of the Service that stands for the servers themselves.
var ofServers = labels.SelectorFromSet(labels.Set{discoveryv1.LabelServiceName: "kubernetes"})

// serversChange gives a channel that says when the endpoints of the servers changed; one word stands for several changes.
func serversChange(informer cache.SharedIndexInformer) (<-chan struct{}, error) {
	changed := make(chan struct{}, 1)
	tell := func(obj any) {
		if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
			obj = gone.Obj
		}
		if m, ok := obj.(metav1.Object); !ok || m.GetNamespace() != metav1.NamespaceDefault || !ofServers.Matches(labels.Set(m.GetLabels())) {
			return
		}
		select {
		case changed <- struct{}{}:
		default:
		}
	}
	_, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: tell, UpdateFunc: func(_, obj any) { tell(obj) }, DeleteFunc: tell})
	return changed, err
}

// servers are the addresses and ports of the servers, in order.
func servers(list []*discoveryv1.EndpointSlice) []string {
	var out []string
	for _, s := range list {
		for _, port := range s.Ports {
			if port.Port == nil {
				continue
			}
			for _, e := range s.Endpoints {
				for _, address := range e.Addresses {
					out = append(out, net.JoinHostPort(address, strconv.Itoa(int(*port.Port))))
				}
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// reach is what the node's tunnels may lead to.
func (n *node) reach() tunnel.Reach {
	c := &n.config
	r := tunnel.Reach{
		Addresses: []netip.Addr{c.ip.Unmap()}, Port: uint16(c.port),
		HostPort: func(port uint16) bool {
			return slices.ContainsFunc(n.agent.Pods(), func(p *corev1.Pod) bool { return tunnel.NamesHostPort(p, port) })
		},
	}
	if own, err := c.informers.Core().V1().Nodes().Lister().Get(c.name); err == nil {
		r.Ranges = tunnel.Ranges(own, c.cluster.PodCIDR)
	}
	return r
}
