package control

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/discovery"
	cacheddiscovery "k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	controllersmetrics "k8s.io/component-base/metrics/prometheus/controllers"
	"k8s.io/component-base/version"
	"k8s.io/controller-manager/pkg/informerfactory"
	"k8s.io/kubernetes/cmd/kube-controller-manager/app"
	"k8s.io/kubernetes/cmd/kube-controller-manager/app/options"
	"k8s.io/kubernetes/pkg/controller/apis/config"
	csrconfig "k8s.io/kubernetes/pkg/controller/certificates/signer/config"

	"knarr/client"
)

// managerName is the identity of everything that is not one controller's, and the field manager of all: upstream's name, since users and tools
// know it from managedFields.
const managerName = "kube-controller-manager"

// managerUser is the identity that upstream's controller manager has as a whole.
const managerUser = "system:" + managerName

// rootCAAccount is the service account that publishes the root certificates.
const rootCAAccount = "root-ca-cert-publisher"

// environment is what is shared by all controllers of one Run.
type environment struct {
	options   *Options
	component config.KubeControllerManagerConfiguration
	discovery discovery.CachedDiscoveryInterface
	mapper    *restmapper.DeferredDiscoveryRESTMapper
	changes   *changes
	metrics   *controllersmetrics.ControllerManagerMetrics
	builders  map[string]*app.ControllerDescriptor
	running   chan struct{} // closed: informers may be started by controllers themselves
}

func newEnvironment(o *Options) (*environment, error) {
	component, err := componentConfig(o)
	if err != nil {
		return nil, err
	}
	d, err := discovery.NewDiscoveryClientForConfig(o.configFor(""))
	if err != nil {
		return nil, fmt.Errorf("control: discovery client: %w", err)
	}
	e := &environment{options: o, component: component, metrics: controllersmetrics.NewControllerManagerMetrics(managerName),
		builders: app.NewControllerDescriptors(), running: make(chan struct{})}
	e.discovery = cacheddiscovery.NewMemCacheClient(d)
	e.mapper = restmapper.NewDeferredDiscoveryRESTMapper(e.discovery)
	e.changes = newChanges(e.mapper.Reset) // which also forgets what the discovery client has cached
	controllersmetrics.Register()
	close(e.running)
	return e, nil
}

// configFor is the client configuration of a service account, or of the manager itself ("").
func (o *Options) configFor(account string) *rest.Config {
	u := client.User(managerUser)
	if account != "" {
		u = client.ServiceAccount(account)
	}
	c := rest.CopyConfig(o.Config(u))
	c.UserAgent = fmt.Sprintf("%s/%s (knarr) %s", managerName, version.Get().GitVersion, account)
	return c
}

// componentConfig is upstream's default configuration with what the options say. Rates that upstream only sets while it parses flags are set
// here to the same values.
func componentConfig(o *Options) (config.KubeControllerManagerConfiguration, error) {
	c, err := options.NewDefaultComponentConfig()
	if err != nil {
		return c, fmt.Errorf("control: upstream's defaults: %w", err)
	}
	c.KubeCloudShared.AllocateNodeCIDRs = true
	c.KubeCloudShared.CIDRAllocatorType = "RangeAllocator"
	c.KubeCloudShared.ClusterCIDR = o.PodCIDR.String()
	c.KubeCloudShared.ConfigureCloudRoutes = false
	c.NodeIPAMController.ServiceCIDR = o.ServiceCIDR.String()
	c.NodeIPAMController.NodeCIDRMaskSize = int32(o.NodeMask)
	if o.NodeMask == 0 && o.PodCIDR.Addr().Is6() {
		c.NodeIPAMController.NodeCIDRMaskSize = 64
	}
	c.NodeLifecycleController.NodeEvictionRate = 0.1
	c.NodeLifecycleController.SecondaryNodeEvictionRate = 0.01
	c.NodeLifecycleController.LargeClusterSizeThreshold = 50
	c.NodeLifecycleController.UnhealthyZoneThreshold = 0.55
	signer := csrconfig.CSRSigningConfiguration{CertFile: o.ClientSigner.CertFile, KeyFile: o.ClientSigner.KeyFile}
	csr := &c.CSRSigningController
	csr.KubeletClientSignerConfiguration, csr.KubeAPIServerClientSignerConfiguration, csr.LegacyUnknownSignerConfiguration = signer, signer, signer
	csr.KubeletServingSignerConfiguration = csrconfig.CSRSigningConfiguration{CertFile: o.ServingSigner.CertFile, KeyFile: o.ServingSigner.KeyFile}
	return c, nil
}

// scope is the environment as one controller may see it.
type scope struct {
	*environment
	row       *controller
	informers informers.SharedInformerFactory

	mu         sync.Mutex
	undeclared []string // resources asked for outside the inputs; guarded by mu
}

func (e *environment) scopeOf(row *controller) *scope {
	s := &scope{environment: e, row: row}
	s.informers = client.Observe(e.options.Informers, s.asked)
	return s
}

// asked notes each informer that the controller asks for.
func (s *scope) asked(obj runtime.Object) {
	name := resourceName(obj)
	if slices.Contains(s.row.inputs, everything) || slices.Contains(s.row.inputs, name) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.undeclared = append(s.undeclared, name)
}

// check is an error when the controller asked for what it has not declared.
func (s *scope) check() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.undeclared) > 0 {
		return fmt.Errorf("it reads %v, which are not among its inputs: declare them in the table of package control", s.undeclared)
	}
	return nil
}

// resourceName is the resource of a built-in type as the table writes it.
func resourceName(obj runtime.Object) string {
	kinds, _, err := scheme.Scheme.ObjectKinds(obj)
	if err != nil {
		return fmt.Sprintf("%T", obj)
	}
	plural, _ := meta.UnsafeGuessKindToResource(kinds[0])
	return plural.GroupResource().String()
}

// config of the controller's identity.
func (s *scope) config() *rest.Config { return s.options.configFor(s.row.account) }

// client of the controller's identity.
func (s *scope) client() (kubernetes.Interface, error) { return kubernetes.NewForConfig(s.config()) }

// objectsOrMetadata gives informers of built-in types as they are and of all others by their metadata.
func (s *scope) objectsOrMetadata() informerfactory.InformerFactory {
	return informerfactory.NewInformerFactory(s.informers, s.options.Metadata)
}

// upstream is the context for upstream's own constructors.
func (s *scope) upstream() app.ControllerContext {
	return app.ControllerContext{
		ClientBuilder:                   clientBuilder{s.options},
		InformerFactory:                 s.informers,
		ObjectOrMetadataInformerFactory: s.objectsOrMetadata(),
		ComponentConfig:                 s.component,
		RESTMapper:                      s.mapper,
		InformersStarted:                s.running,
		ResyncPeriod:                    noResync,
		ControllerManagerMetrics:        s.metrics,
	}
}

// noResync: the store loses no event, so nothing has to be looked at again without a reason.
func noResync() time.Duration { return 0 }

// clientBuilder gives each name a client with the service account of that name.
type clientBuilder struct{ options *Options }

// Config implements clientbuilder.ControllerClientBuilder. Upstream takes the root certificates that it publishes from the configuration of
// this one name (it builds no client from it).
func (b clientBuilder) Config(name string) (*rest.Config, error) {
	c := b.options.configFor(name)
	if name == rootCAAccount {
		c.CAData = b.options.RootCA
	}
	return c, nil
}

func (b clientBuilder) ConfigOrDie(name string) *rest.Config { return b.options.configFor(name) }

func (b clientBuilder) Client(name string) (kubernetes.Interface, error) {
	return kubernetes.NewForConfig(b.options.configFor(name))
}

func (b clientBuilder) ClientOrDie(name string) kubernetes.Interface {
	return kubernetes.NewForConfigOrDie(b.options.configFor(name))
}

func (b clientBuilder) DiscoveryClient(name string) (discovery.DiscoveryInterface, error) {
	return discovery.NewDiscoveryClientForConfig(b.options.configFor(name))
}

func (b clientBuilder) DiscoveryClientOrDie(name string) discovery.DiscoveryInterface {
	return discovery.NewDiscoveryClientForConfigOrDie(b.options.configFor(name))
}

// constructor builds a controller without starting it; nil without an error means that it is switched off.
type constructor func(ctx context.Context, s *scope) (run func(context.Context), err error)

// newUpstream builds a controller by upstream's own constructor.
func newUpstream(ctx context.Context, s *scope) (func(context.Context), error) {
	c, err := s.builders[s.row.name].BuildController(ctx, s.upstream())
	if err != nil || c == nil {
		return nil, err
	}
	return c.Run, nil
}
