package api

import (
	"fmt"
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/registry/rest"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/client-go/kubernetes"
	core "k8s.io/kubernetes/pkg/apis/core"
	kubeletclient "k8s.io/kubernetes/pkg/kubelet/client"
	"k8s.io/kubernetes/pkg/registry/core/componentstatus"
	endpointsstore "k8s.io/kubernetes/pkg/registry/core/endpoint/storage"
	limitrangestore "k8s.io/kubernetes/pkg/registry/core/limitrange/storage"
	nodestore "k8s.io/kubernetes/pkg/registry/core/node/storage"
	pvstore "k8s.io/kubernetes/pkg/registry/core/persistentvolume/storage"
	pvcstore "k8s.io/kubernetes/pkg/registry/core/persistentvolumeclaim/storage"
	podstore "k8s.io/kubernetes/pkg/registry/core/pod/storage"
	podtemplatestore "k8s.io/kubernetes/pkg/registry/core/podtemplate/storage"
	controllerstore "k8s.io/kubernetes/pkg/registry/core/replicationcontroller/storage"
	corerest "k8s.io/kubernetes/pkg/registry/core/rest"
	"k8s.io/kubernetes/pkg/registry/core/service/allocator"
	"k8s.io/kubernetes/pkg/registry/core/service/ipallocator"
	ipcontroller "k8s.io/kubernetes/pkg/registry/core/service/ipallocator/controller"
	"k8s.io/kubernetes/pkg/registry/core/service/portallocator"
	portcontroller "k8s.io/kubernetes/pkg/registry/core/service/portallocator/controller"
	servicestore "k8s.io/kubernetes/pkg/registry/core/service/storage"
	serviceaccountstore "k8s.io/kubernetes/pkg/registry/core/serviceaccount/storage"
)

// RepairInterval is how often the service address and node port allocations are checked against the services.
const RepairInterval = 3 * time.Minute

// storageMap is the REST storage of one group version, by resource or resource/subresource.
type storageMap map[string]rest.Storage

// coreGroup builds the group of /api/v1. It follows upstream's corerest provider, whose allocators would open etcd
// clients of their own.
func (r *Registry) coreGroup(c Config, client kubernetes.Interface, g *Groups) (*genericapiserver.APIGroupInfo, error) {
	base := corerest.GenericConfig{
		StorageFactory:              r.factory,
		EventTTL:                    EventTTL,
		ServiceAccountIssuer:        c.TokenIssuer,
		ServiceAccountMaxExpiration: c.TokenMaxExpiration,
		ExtendExpiration:            true,
		APIAudiences:                c.Audiences,
		LoopbackClientConfig:        c.Loopback,
		Informers:                   c.Informers,
	}
	info, err := base.NewRESTStorage(r.resources, r)
	if err != nil {
		return nil, err
	}
	m := storageMap(info.VersionedResourcesStorageMap["v1"])
	if err := r.addPlain(m); err != nil {
		return nil, err
	}
	pods, nodes, err := r.addNodesAndPods(m, c, client)
	if err != nil {
		return nil, err
	}
	if err := r.addServices(m, c, client, pods, g); err != nil {
		return nil, err
	}
	accounts, err := serviceaccountstore.NewREST(r, c.TokenIssuer, c.Audiences, c.TokenMaxExpiration, pods.Pod.Store,
		m["secrets"].(rest.Getter), nodes.Node.Store, base.ExtendExpiration, base.MaxExtendedExpiration)
	if err != nil {
		return nil, err
	}
	m["serviceaccounts"] = accounts
	m["serviceaccounts/token"] = accounts.Token
	info.VersionedResourcesStorageMap["v1"] = m
	return &info, nil
}

// addPlain adds the resources that need nothing but storage.
func (r *Registry) addPlain(m storageMap) error {
	templates, err := podtemplatestore.NewREST(r)
	if err != nil {
		return err
	}
	limits, err := limitrangestore.NewREST(r)
	if err != nil {
		return err
	}
	volumes, volumeStatus, err := pvstore.NewREST(r)
	if err != nil {
		return err
	}
	claims, claimStatus, err := pvcstore.NewREST(r)
	if err != nil {
		return err
	}
	controllers, err := controllerstore.NewStorage(r)
	if err != nil {
		return err
	}
	m["podtemplates"] = templates
	m["limitranges"] = limits
	m["persistentvolumes"], m["persistentvolumes/status"] = volumes, volumeStatus
	m["persistentvolumeclaims"], m["persistentvolumeclaims/status"] = claims, claimStatus
	m["replicationcontrollers"] = controllers.Controller
	m["replicationcontrollers/status"] = controllers.Status
	m["replicationcontrollers/scale"] = controllers.Scale
	m["componentstatuses"] = componentstatus.NewStorage(func() map[string]componentstatus.Server { return nil })
	return nil
}

func (r *Registry) addNodesAndPods(m storageMap, c Config, client kubernetes.Interface) (*podstore.PodStorage, *nodestore.NodeStorage, error) {
	nodes, err := nodestore.NewStorage(r, kubeletclient.KubeletClientConfig{}, c.ProxyTransport)
	if err != nil {
		return nil, nil, err
	}
	nodes.Proxy.Connection = &agentLocator{nodes: nodes.Node, transport: c.KubeletTransport}
	nodes.KubeletConnectionInfo = &agentLocator{nodes: nodes.Node, transport: c.KubeletTransport, byName: true}
	pods, err := podstore.NewStorage(r, nodes.KubeletConnectionInfo, c.ProxyTransport, client.PolicyV1(), c.Authorizer)
	if err != nil {
		return nil, nil, err
	}
	m["nodes"], m["nodes/proxy"], m["nodes/status"] = nodes.Node, nodes.Proxy, nodes.Status
	m["pods"] = pods.Pod
	m["pods/attach"] = pods.Attach
	m["pods/status"] = pods.Status
	m["pods/log"] = pods.Log
	m["pods/exec"] = pods.Exec
	m["pods/portforward"] = pods.PortForward
	m["pods/proxy"] = pods.Proxy
	m["pods/binding"] = pods.Binding
	m["pods/eviction"] = pods.Eviction
	m["pods/ephemeralcontainers"] = pods.EphemeralContainers
	m["pods/resize"] = pods.Resize
	m["bindings"] = pods.LegacyBinding
	return &pods, nodes, nil
}

// addServices adds services with their address and port allocators, endpoints, and the allocators' repair loops.
func (r *Registry) addServices(m storageMap, c Config, client kubernetes.Interface, pods *podstore.PodStorage, g *Groups) error {
	addresses, err := ipallocator.NewMetaAllocator(client.NetworkingV1(), c.Informers.Networking().V1().ServiceCIDRs(),
		c.Informers.Networking().V1().IPAddresses(), c.ServiceCIDR.IP.To4() == nil, nil)
	if err != nil {
		return fmt.Errorf("make the service address allocator: %w", err)
	}
	var ranges *rangeStore
	ports, err := portallocator.New(c.NodePorts, func(size int, spec string, offset int) (allocator.Interface, error) {
		ranges, err = r.newRangeStore(allocator.NewAllocationMapWithOffset(size, spec, offset), "/ranges/servicenodeports",
			schema.GroupResource{Resource: "servicenodeportallocations"})
		return ranges, err
	})
	if err != nil {
		return fmt.Errorf("make the node port allocator: %w", err)
	}
	endpoints, err := endpointsstore.NewREST(r)
	if err != nil {
		return err
	}
	services, status, proxy, err := servicestore.NewREST(r, addresses.IPFamily(),
		map[core.IPFamily]ipallocator.Interface{addresses.IPFamily(): addresses}, ports, endpoints, pods.Pod, c.ProxyTransport)
	if err != nil {
		return err
	}
	m["services"], m["services/status"], m["services/proxy"] = services, status, proxy
	m["endpoints"] = endpoints
	g.Repairs = append(g.Repairs,
		ipcontroller.NewRepairIPAddress(RepairInterval, client, c.Informers.Core().V1().Services(),
			c.Informers.Networking().V1().ServiceCIDRs(), c.Informers.Networking().V1().IPAddresses()).RunUntil,
		portcontroller.NewRepair(RepairInterval, client.CoreV1(), client.EventsV1(), c.NodePorts, ranges).RunUntil)
	return nil
}
