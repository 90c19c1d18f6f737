package apiserver

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	utilproxy "k8s.io/apimachinery/pkg/util/proxy"
	"k8s.io/apiserver/pkg/endpoints/discovery"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/util/webhook"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/transport"
	"k8s.io/client-go/util/retry"
	"k8s.io/client-go/util/workqueue"
	apiregistrationv1 "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"
	apiregistrationhelpers "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1/helper"
	aggregatorscheme "k8s.io/kube-aggregator/pkg/apiserver/scheme"
	aggregatorclient "k8s.io/kube-aggregator/pkg/client/clientset_generated/clientset"
	aggregatorlisters "k8s.io/kube-aggregator/pkg/client/listers/apiregistration/v1"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	controlplaneapiserver "k8s.io/kubernetes/pkg/controlplane/apiserver"
)

const (
	// availabilityTimeout bounds one look whether an aggregated server answers, as upstream.
	availabilityTimeout = 5 * time.Second
	// autoManagedLabel marks APIServices that this server keeps itself; source: upstream's autoregister controller.
	autoManagedLabel = "kube-aggregator.kubernetes.io/automanaged"
)

// aggregator forwards group versions that an APIService gives to another server, and keeps the APIServices of its own.
type aggregator struct {
	config   *Config
	client   aggregatorclient.Interface
	lister   aggregatorlisters.APIServiceLister
	services webhook.ServiceResolver
	named    resourceManager
	root     discovery.GroupManager
	queue    workqueue.TypedRateLimitingInterface[string]

	mu         sync.RWMutex
	remote     map[schema.GroupVersion]*remoteServer // guarded by mu
	builtin    map[schema.GroupVersion]bool
	customList func() map[schema.GroupVersion]bool
}

// remoteServer is an aggregated server behind one APIService.
type remoteServer struct {
	name, namespace string
	port            int32
	transport       http.RoundTripper
	available       bool
}

func newAggregator(c *Config, client aggregatorclient.Interface, services webhook.ServiceResolver, d *discoveries) (*aggregator, error) {
	informer := c.AggregationInformers.Apiregistration().V1().APIServices()
	a := &aggregator{
		config: c, client: client, lister: informer.Lister(), services: services, root: d.root, named: d.named,
		queue:   workqueue.NewTypedRateLimitingQueue(workqueue.DefaultTypedControllerRateLimiter[string]()),
		remote:  map[schema.GroupVersion]*remoteServer{},
		builtin: map[schema.GroupVersion]bool{},
	}
	enqueue := func(obj any) {
		if key, err := cache.DeletionHandlingMetaNamespaceKeyFunc(obj); err == nil {
			a.queue.Add(key)
		}
	}
	_, err := informer.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: enqueue, UpdateFunc: func(_, obj any) { enqueue(obj) }, DeleteFunc: enqueue,
	})
	if err != nil {
		return nil, err
	}
	// An aggregated server comes and goes with the endpoints of its service.
	_, err = c.Informers.Discovery().V1().EndpointSlices().Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: a.enqueueBehind, UpdateFunc: func(_, obj any) { a.enqueueBehind(obj) }, DeleteFunc: a.enqueueBehind,
	})
	return a, err
}

// enqueueBehind looks again at the APIServices whose service's endpoints changed.
func (a *aggregator) enqueueBehind(obj any) {
	if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
		obj = gone.Obj
	}
	m, ok := obj.(metav1.Object)
	if !ok {
		return
	}
	a.mu.RLock()
	defer a.mu.RUnlock()
	for gv, r := range a.remote {
		if r.namespace == m.GetNamespace() && r.name == m.GetLabels()["kubernetes.io/service-name"] {
			a.queue.Add(gv.Version + "." + gv.Group)
		}
	}
}

// run keeps proxies, discovery and availability in step with the APIServices.
func (a *aggregator) run(ctx context.Context) {
	context.AfterFunc(ctx, a.queue.ShutDown)
	for {
		name, shutdown := a.queue.Get()
		if shutdown {
			return
		}
		if err := a.sync(ctx, name); err != nil {
			a.queue.AddRateLimited(name)
		} else {
			a.queue.Forget(name)
		}
		a.queue.Done(name)
	}
}

func (a *aggregator) sync(ctx context.Context, name string) error {
	service, err := a.lister.Get(name)
	if apierrors.IsNotFound(err) {
		version, group, _ := strings.Cut(name, ".")
		return a.drop(ctx, schema.GroupVersion{Group: group, Version: version})
	}
	if err != nil {
		return err
	}
	gv := schema.GroupVersion{Group: service.Spec.Group, Version: service.Spec.Version}
	if service.Spec.Service == nil {
		if err := a.drop(ctx, gv); err != nil {
			return err
		}
		return a.setCondition(ctx, service, local())
	}
	remote, err := a.newRemote(service)
	if err != nil {
		return a.setCondition(ctx, service, unavailable("InvalidConfiguration", err.Error()))
	}
	condition, document := a.probe(ctx, service, remote)
	remote.available = condition.Status == apiregistrationv1.ConditionTrue
	a.mu.Lock()
	a.remote[gv] = remote
	a.mu.Unlock()
	if remote.available {
		if err := a.learn(service, document); err != nil {
			return err
		}
	}
	if err := a.setCondition(ctx, service, condition); err != nil {
		return err
	}
	if !remote.available {
		return errors.New(condition.Message)
	}
	return nil
}

// drop forgets an aggregated server; a group version of our own gets its APIService back.
func (a *aggregator) drop(ctx context.Context, gv schema.GroupVersion) error {
	a.mu.Lock()
	_, was := a.remote[gv]
	delete(a.remote, gv)
	a.mu.Unlock()
	if was {
		a.named.RemoveGroupVersion(metav1.GroupVersion(gv))
		a.root.RemoveGroup(gv.Group)
	}
	if _, err := a.lister.Get(gv.Version + "." + gv.Group); apierrors.IsNotFound(err) && (a.builtin[gv] || a.customList()[gv]) {
		return a.register(ctx, gv)
	}
	return nil
}

func (a *aggregator) newRemote(service *apiregistrationv1.APIService) (*remoteServer, error) {
	port := int32(443)
	if service.Spec.Service.Port != nil {
		port = *service.Spec.Service.Port
	}
	r := &remoteServer{name: service.Spec.Service.Name, namespace: service.Spec.Service.Namespace, port: port}
	config := &tls.Config{
		InsecureSkipVerify: service.Spec.InsecureSkipTLSVerify, //nolint:gosec // the APIService asks for it
		ServerName:         r.name + "." + r.namespace + ".svc",
		MinVersion:         tls.VersionTLS12,
	}
	if len(service.Spec.CABundle) > 0 {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(service.Spec.CABundle) {
			return nil, errors.New("spec.caBundle holds no certificate")
		}
	}
	config.GetClientCertificate = a.config.ProxyClientCert
	r.transport = &http.Transport{DialContext: a.config.ProxyTransport.DialContext, TLSClientConfig: config, ForceAttemptHTTP2: true,
		IdleConnTimeout: 90 * time.Second, MaxIdleConnsPerHost: 25}
	return r, nil
}

// probe asks the aggregated server for its group version's discovery document, and says by the answer whether it is available.
func (a *aggregator) probe(ctx context.Context, service *apiregistrationv1.APIService, r *remoteServer) (apiregistrationv1.APIServiceCondition, []byte) {
	if _, err := a.config.Informers.Core().V1().Services().Lister().Services(r.namespace).Get(r.name); err != nil {
		return unavailable("ServiceNotFound", fmt.Sprintf("service/%s in %q is not present", r.name, r.namespace)), nil
	}
	document, err := a.fetch(ctx, r, "/apis/"+service.Spec.Group+"/"+service.Spec.Version)
	if err != nil {
		return unavailable("FailedDiscoveryCheck", "failing or missing response from "+err.Error()), nil
	}
	return apiregistrationv1.APIServiceCondition{Type: apiregistrationv1.Available, Status: apiregistrationv1.ConditionTrue, Reason: "Passed", Message: "all checks passed"}, document
}

func local() apiregistrationv1.APIServiceCondition {
	return apiregistrationv1.APIServiceCondition{Type: apiregistrationv1.Available, Status: apiregistrationv1.ConditionTrue, Reason: "Local",
		Message: "Local APIServices are always available"}
}

func unavailable(reason, message string) apiregistrationv1.APIServiceCondition {
	return apiregistrationv1.APIServiceCondition{Type: apiregistrationv1.Available, Status: apiregistrationv1.ConditionFalse, Reason: reason, Message: message}
}

func (a *aggregator) setCondition(ctx context.Context, service *apiregistrationv1.APIService, c apiregistrationv1.APIServiceCondition) error {
	if old := apiregistrationhelpers.GetAPIServiceConditionByType(service, c.Type); old != nil &&
		old.Status == c.Status && old.Reason == c.Reason && old.Message == c.Message {
		return nil
	}
	return retry.RetryOnConflict(retry.DefaultRetry, func() error {
		current, err := a.client.ApiregistrationV1().APIServices().Get(ctx, service.Name, metav1.GetOptions{})
		if err != nil {
			return ignoreMissing(err)
		}
		c.LastTransitionTime = metav1.Now()
		apiregistrationhelpers.SetAPIServiceCondition(current, c)
		_, err = a.client.ApiregistrationV1().APIServices().UpdateStatus(ctx, current, metav1.UpdateOptions{})
		return ignoreMissing(err)
	})
}

func ignoreMissing(err error) error {
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// serve forwards a request of an aggregated group version; false when the group version is not another server's.
func (a *aggregator) serve(w http.ResponseWriter, req *http.Request, gv schema.GroupVersion) bool {
	a.mu.RLock()
	r := a.remote[gv]
	a.mu.RUnlock()
	if r == nil {
		return false
	}
	if !r.available {
		http.Error(w, "service unavailable", http.StatusServiceUnavailable)
		return true
	}
	a.forward(w, req, r)
	return true
}

// isRemote says that another server has a group version.
func (a *aggregator) isRemote(gv schema.GroupVersion) bool {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return a.remote[gv] != nil
}

func (a *aggregator) forward(w http.ResponseWriter, req *http.Request, r *remoteServer) {
	location, err := a.services.ResolveEndpoint(r.namespace, r.name, r.port)
	if err != nil {
		http.Error(w, "service unavailable", http.StatusServiceUnavailable)
		return
	}
	location.Path, location.RawQuery = req.URL.Path, req.URL.RawQuery
	user, ok := apirequest.UserFrom(req.Context())
	if !ok {
		http.Error(w, "missing user", http.StatusInternalServerError)
		return
	}
	out := req.Clone(req.Context())
	out.URL, out.Host = location, location.Host
	speaks := transport.NewAuthProxyRoundTripper(user.GetName(), user.GetUID(), user.GetGroups(), user.GetExtra(), r.transport)
	proxy := utilproxy.NewUpgradeAwareHandler(location, speaks, true, isUpgrade(req), &proxyErrors{})
	if isUpgrade(req) {
		transport.SetAuthProxyHeaders(out, user.GetName(), user.GetUID(), user.GetGroups(), user.GetExtra())
		proxy.UpgradeTransport = utilproxy.NewUpgradeRequestRoundTripper(r.transport, r.transport)
	}
	proxy.UseRequestLocation = true
	proxy.ServeHTTP(w, out)
}

func isUpgrade(req *http.Request) bool {
	return strings.Contains(strings.ToLower(req.Header.Get("Connection")), "upgrade")
}

// proxyErrors answers a failed forward as upstream does.
type proxyErrors struct{}

func (*proxyErrors) Error(w http.ResponseWriter, req *http.Request, err error) {
	responsewriters.ErrorNegotiated(apierrors.NewServiceUnavailable("Error trying to reach service: "+err.Error()), legacyscheme.Codecs,
		schema.GroupVersion{Version: "v1"}, w, req)
}

// serveGroup answers /apis/<group> for a group that only aggregated servers have.
func (a *aggregator) serveGroup(w http.ResponseWriter, req *http.Request, group string) bool {
	info := a.groupInfo(group)
	if info == nil {
		return false
	}
	discovery.NewAPIGroupHandler(aggregatorscheme.Codecs, *info).ServeHTTP(w, req)
	return true
}

func (a *aggregator) groupInfo(group string) *metav1.APIGroup {
	list, err := a.lister.List(labels.Everything())
	if err != nil {
		return nil
	}
	var of []*apiregistrationv1.APIService
	for _, s := range list {
		if s.Spec.Group == group && s.Spec.Service != nil {
			of = append(of, s)
		}
	}
	if len(of) == 0 {
		return nil
	}
	slices.SortFunc(of, func(x, y *apiregistrationv1.APIService) int {
		return int(y.Spec.VersionPriority - x.Spec.VersionPriority)
	})
	info := &metav1.APIGroup{Name: group}
	for _, s := range of {
		info.Versions = append(info.Versions, metav1.GroupVersionForDiscovery{GroupVersion: group + "/" + s.Spec.Version, Version: s.Spec.Version})
	}
	info.PreferredVersion = info.Versions[0]
	return info
}

// register writes the APIService of a group version that this server serves itself.
func (a *aggregator) register(ctx context.Context, gv schema.GroupVersion) error {
	p, ok := builtinPriorities()[gv]
	mode := "onstart"
	if !ok {
		p, mode = controlplaneapiserver.APIServicePriority{Group: customPriority, Version: 100}, "true"
	}
	_, err := a.client.ApiregistrationV1().APIServices().Create(ctx, &apiregistrationv1.APIService{
		ObjectMeta: metav1.ObjectMeta{Name: gv.Version + "." + gv.Group, Labels: map[string]string{autoManagedLabel: mode}},
		Spec: apiregistrationv1.APIServiceSpec{
			Group: gv.Group, Version: gv.Version, GroupPriorityMinimum: p.Group, VersionPriority: p.Version,
		},
	}, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	return err
}
