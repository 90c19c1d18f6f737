package api

import (
	"fmt"
	"net"
	"net/http"
	"time"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apiextensionsserver "k8s.io/apiextensions-apiserver/pkg/apiserver"
	"k8s.io/apiextensions-apiserver/pkg/registry/customresourcedefinition"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/registry/generic"
	"k8s.io/apiserver/pkg/registry/rest"
	genericapiserver "k8s.io/apiserver/pkg/server"
	serverstorage "k8s.io/apiserver/pkg/server/storage"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	restclient "k8s.io/client-go/rest"
	apiregistrationv1 "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"
	aggregatorrest "k8s.io/kube-aggregator/pkg/registry/apiservice/rest"
	"k8s.io/kubernetes/pkg/capabilities"
	admissionregistrationrest "k8s.io/kubernetes/pkg/registry/admissionregistration/rest"
	apiserverinternalrest "k8s.io/kubernetes/pkg/registry/apiserverinternal/rest"
	appsrest "k8s.io/kubernetes/pkg/registry/apps/rest"
	authenticationrest "k8s.io/kubernetes/pkg/registry/authentication/rest"
	authorizationrest "k8s.io/kubernetes/pkg/registry/authorization/rest"
	autoscalingrest "k8s.io/kubernetes/pkg/registry/autoscaling/rest"
	batchrest "k8s.io/kubernetes/pkg/registry/batch/rest"
	certificatesrest "k8s.io/kubernetes/pkg/registry/certificates/rest"
	coordinationrest "k8s.io/kubernetes/pkg/registry/coordination/rest"
	discoveryrest "k8s.io/kubernetes/pkg/registry/discovery/rest"
	eventsrest "k8s.io/kubernetes/pkg/registry/events/rest"
	flowcontrolrest "k8s.io/kubernetes/pkg/registry/flowcontrol/rest"
	networkingrest "k8s.io/kubernetes/pkg/registry/networking/rest"
	noderest "k8s.io/kubernetes/pkg/registry/node/rest"
	policyrest "k8s.io/kubernetes/pkg/registry/policy/rest"
	rbacrest "k8s.io/kubernetes/pkg/registry/rbac/rest"
	resourcerest "k8s.io/kubernetes/pkg/registry/resource/rest"
	schedulingrest "k8s.io/kubernetes/pkg/registry/scheduling/rest"
	storagerest "k8s.io/kubernetes/pkg/registry/storage/rest"
	svmrest "k8s.io/kubernetes/pkg/registry/storagemigration/rest"
	"k8s.io/kubernetes/pkg/serviceaccount"
)

// EventTTL is how long events live, as upstream's default.
const EventTTL = time.Hour

// Config is what the REST storage types need from the server around them. All fields are required.
type Config struct {
	// Loopback reaches this very API as its most privileged user.
	Loopback *restclient.Config
	// Informers watch this very API.
	Informers informers.SharedInformerFactory

	Authenticator authenticator.Request
	Audiences     authenticator.Audiences
	Authorizer    authorizer.Authorizer
	RuleResolver  authorizer.RuleResolver

	// TokenIssuer signs service-account tokens.
	TokenIssuer serviceaccount.TokenGenerator
	// TokenMaxExpiration bounds requested token lifetimes; zero means unbounded.
	TokenMaxExpiration time.Duration

	// KubeletTransport reaches the agents' HTTPS API, also by a node's name; ProxyTransport carries proxied requests to pods and services.
	KubeletTransport http.RoundTripper
	ProxyTransport   http.RoundTripper

	ServiceCIDR net.IPNet
	NodePorts   utilnet.PortRange
}

// Groups is everything the registry serves.
type Groups struct {
	// Core is the group of /api; Named are those of /apis, in the order of discovery.
	Core  *genericapiserver.APIGroupInfo
	Named []*genericapiserver.APIGroupInfo
	// Extensions is apiextensions.k8s.io and Aggregation apiregistration.k8s.io: groups with schemes of their own.
	Extensions  *genericapiserver.APIGroupInfo
	Aggregation *genericapiserver.APIGroupInfo
	// Repairs check the service address and port allocations now and then; each calls ready after its first success.
	Repairs []func(ready func(), stop chan struct{})
	// Hooks are the providers' post-start hooks, by upstream's names.
	Hooks map[string]genericapiserver.PostStartHookFunc
}

// All lists every group, in the order of discovery.
func (g *Groups) All() []*genericapiserver.APIGroupInfo {
	return append([]*genericapiserver.APIGroupInfo{g.Core, g.Aggregation, g.Extensions}, g.Named...)
}

// provider is upstream's RESTStorageProvider.
type provider interface {
	GroupName() string
	NewRESTStorage(serverstorage.APIResourceConfigSource, generic.RESTOptionsGetter) (genericapiserver.APIGroupInfo, error)
}

// Groups builds upstream's REST storage of every group that a default Kubernetes serves, over this registry.
func (r *Registry) Groups(c Config) (*Groups, error) {
	// Validation asks this setting of the process; pod security admission is what tells who may run what.
	capabilities.Setup(true, 0)
	client, err := kubernetes.NewForConfig(c.Loopback)
	if err != nil {
		return nil, err
	}
	g := &Groups{Hooks: map[string]genericapiserver.PostStartHookFunc{}}
	if g.Core, err = r.coreGroup(c, client, g); err != nil {
		return nil, fmt.Errorf("build the core group: %w", err)
	}
	for _, p := range namedProviders(c, client) {
		info, err := p.NewRESTStorage(r.resources, r)
		if err != nil {
			return nil, fmt.Errorf("build the group %s: %w", p.GroupName(), err)
		}
		if len(info.VersionedResourcesStorageMap) == 0 {
			continue
		}
		g.Named = append(g.Named, &info)
		if err := g.addHook(p); err != nil {
			return nil, err
		}
	}
	if g.Extensions, err = r.extensionsGroup(); err != nil {
		return nil, fmt.Errorf("build the group apiextensions.k8s.io: %w", err)
	}
	aggregation := aggregatorrest.NewRESTStorage(aggregationResources(), r, false)
	g.Aggregation = &aggregation
	sharePrinters(g.All())
	return g, nil
}

func (g *Groups) addHook(p provider) error {
	hooker, ok := p.(genericapiserver.PostStartHookProvider)
	if !ok {
		return nil
	}
	name, hook, err := hooker.PostStartHook()
	if err == nil {
		g.Hooks[name] = hook
	}
	return err
}

// namedProviders lists the groups under /apis in upstream's order, which decides which group a bare resource name means.
func namedProviders(c Config, client kubernetes.Interface) []provider {
	return []provider{
		apiserverinternalrest.StorageProvider{},
		authenticationrest.RESTStorageProvider{Authenticator: c.Authenticator, APIAudiences: c.Audiences},
		authorizationrest.RESTStorageProvider{Authorizer: c.Authorizer, RuleResolver: c.RuleResolver},
		autoscalingrest.RESTStorageProvider{},
		batchrest.RESTStorageProvider{},
		certificatesrest.RESTStorageProvider{Authorizer: c.Authorizer},
		coordinationrest.RESTStorageProvider{},
		discoveryrest.StorageProvider{},
		networkingrest.RESTStorageProvider{},
		noderest.RESTStorageProvider{},
		policyrest.RESTStorageProvider{},
		rbacrest.RESTStorageProvider{Authorizer: c.Authorizer},
		schedulingrest.RESTStorageProvider{},
		storagerest.RESTStorageProvider{},
		svmrest.RESTStorageProvider{},
		flowcontrolrest.RESTStorageProvider{InformerFactory: c.Informers},
		appsrest.StorageProvider{},
		admissionregistrationrest.RESTStorageProvider{Authorizer: c.Authorizer, DiscoveryClient: client.Discovery()},
		eventsrest.RESTStorageProvider{TTL: EventTTL},
		resourcerest.RESTStorageProvider{NamespaceClient: client.CoreV1().Namespaces(), Authorizer: c.Authorizer},
	}
}

// extensionsGroup serves CustomResourceDefinitions themselves; their instances have a handler of their own.
func (r *Registry) extensionsGroup() (*genericapiserver.APIGroupInfo, error) {
	info := genericapiserver.NewDefaultAPIGroupInfo(apiextensionsv1.GroupName, apiextensionsserver.Scheme, metav1.ParameterCodec, apiextensionsserver.Codecs)
	definitions, err := customresourcedefinition.NewREST(apiextensionsserver.Scheme, r)
	if err != nil {
		return nil, err
	}
	info.VersionedResourcesStorageMap["v1"] = map[string]rest.Storage{
		"customresourcedefinitions":        definitions,
		"customresourcedefinitions/status": customresourcedefinition.NewStatusREST(apiextensionsserver.Scheme, definitions),
	}
	return &info, nil
}

func aggregationResources() *serverstorage.ResourceConfig {
	resources := serverstorage.NewResourceConfig()
	resources.EnableVersions(apiregistrationv1.SchemeGroupVersion)
	return resources
}
