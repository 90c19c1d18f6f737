package apiserver

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"sync"

	apidiscoveryv2 "k8s.io/api/apidiscovery/v2"
	apiextensionshelpers "k8s.io/apiextensions-apiserver/pkg/apihelpers"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apiextensionsserver "k8s.io/apiextensions-apiserver/pkg/apiserver"
	crdclient "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset"
	"k8s.io/apiextensions-apiserver/pkg/controller/apiapproval"
	"k8s.io/apiextensions-apiserver/pkg/controller/establish"
	"k8s.io/apiextensions-apiserver/pkg/controller/finalizer"
	"k8s.io/apiextensions-apiserver/pkg/controller/nonstructuralschema"
	"k8s.io/apiextensions-apiserver/pkg/controller/status"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	utilversion "k8s.io/apimachinery/pkg/version"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/endpoints/discovery"
	"k8s.io/apiserver/pkg/endpoints/discovery/aggregated"
	"k8s.io/apiserver/pkg/endpoints/handlers/negotiation"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/util/webhook"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
	"k8s.io/kube-openapi/pkg/validation/spec"
	"k8s.io/kubernetes/pkg/api/legacyscheme"

	"knarr/api"
)

type resourceManager = aggregated.ResourceManager

// crdWorkers is the number of workers of each CRD controller, as upstream.
const crdWorkers = 5

// customResources serves the instances of CustomResourceDefinitions and tells clients of them.
type customResources struct {
	handler http.Handler
	served  *servedResources
	// controllers accept names, establish, check and finalize definitions.
	controllers []func(context.Context)

	lister   func() []*apiextensionsv1.CustomResourceDefinition
	root     discovery.GroupManager
	named    resourceManager
	mu       sync.RWMutex
	groups   map[string]http.Handler              // guarded by mu: /apis/<group>
	versions map[schema.GroupVersion]http.Handler // guarded by mu: /apis/<group>/<version>
}

// newCustomResources builds upstream's handler of custom resources over our registry, and the controllers around it. gone is told of kinds whose
// objects are not served that way any more.
func newCustomResources(c *Config, client crdclient.Interface, admit admission.Interface, authz authorizer.Authorizer, services webhook.ServiceResolver,
	webhooks webhook.AuthenticationInfoResolverWrapper, d *discoveries, gone func(*api.Kind)) (*customResources, error) {
	informer := c.ExtensionInformers.Apiextensions().V1().CustomResourceDefinitions()
	establishing := establish.NewEstablishingController(informer, client.ApiextensionsV1())
	// The two nil arguments answer discovery requests, which never reach this handler: route.go asks customResources.
	// The schemas that apply knows a definition's instances by start from none: those of a definition include all that they
	// refer to. (Without a start, nil, apply would take any field.)
	h, err := apiextensionsserver.NewCustomResourceDefinitionHandler(nil, nil, informer, http.NotFoundHandler(), c.Registry.CustomResources(), admit, establishing,
		services, webhooks, 1, authz, RequestTimeout, MinWatchTimeout, map[string]*spec.Schema{}, MaxRequestBodyBytes)
	if err != nil {
		return nil, err
	}
	r := &customResources{
		handler:  refuseProtobuf(h),
		served:   &servedResources{upstream: h, lister: informer.Lister(), gone: gone, known: map[string]*served{}},
		root:     d.root,
		named:    d.named.WithSource(aggregated.CRDSource),
		groups:   map[string]http.Handler{},
		versions: map[schema.GroupVersion]http.Handler{},
		lister: func() []*apiextensionsv1.CustomResourceDefinition {
			crds, err := informer.Lister().List(labels.Everything())
			if err != nil {
				return nil
			}
			slices.SortFunc(crds, func(a, b *apiextensionsv1.CustomResourceDefinition) int { return strings.Compare(a.Name, b.Name) })
			return crds
		},
	}
	naming := status.NewNamingConditionController(klog.Background(), informer, client.ApiextensionsV1())
	structural := nonstructuralschema.NewConditionController(informer, client.ApiextensionsV1())
	approval := apiapproval.NewKubernetesAPIApprovalPolicyConformantConditionController(informer, client.ApiextensionsV1())
	finalizing := finalizer.NewCRDFinalizer(informer, client.ApiextensionsV1(), h)
	r.controllers = []func(context.Context){
		naming.RunWithContext,
		establishing.RunWithContext,
		func(ctx context.Context) { structural.RunWithContext(crdWorkers, ctx) },
		func(ctx context.Context) { approval.RunWithContext(crdWorkers, ctx) },
		func(ctx context.Context) { finalizing.RunWithContext(crdWorkers, ctx) },
	}
	_, err = informer.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { r.publish(groupOf(obj)) },
		UpdateFunc: func(_, obj any) { r.publish(groupOf(obj)) },
		DeleteFunc: func(obj any) {
			if crd, ok := obj.(*apiextensionsv1.CustomResourceDefinition); ok {
				r.served.forget(crd)
				c.Registry.Forget(schema.GroupResource{Group: crd.Spec.Group, Resource: crd.Spec.Names.Plural})
			}
			r.publish(groupOf(obj))
		},
	})
	return r, err
}

func groupOf(obj any) string {
	if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
		obj = gone.Obj
	}
	if crd, ok := obj.(*apiextensionsv1.CustomResourceDefinition); ok {
		return crd.Spec.Group
	}
	return ""
}

func isEstablished(crd *apiextensionsv1.CustomResourceDefinition) bool {
	return apiextensionshelpers.IsCRDConditionTrue(crd, apiextensionsv1.Established)
}

// run runs the controllers until ctx ends.
func (r *customResources) run(ctx context.Context) {
	var wg sync.WaitGroup
	for _, run := range r.controllers {
		wg.Go(func() { run(ctx) })
	}
	wg.Wait()
}

// publish renews everything that discovery says of a group.
func (r *customResources) publish(group string) {
	versions := map[string][]*apiextensionsv1.CustomResourceDefinition{}
	for gv, crds := range customVersions(r.lister()) {
		if gv.Group == group {
			versions[gv.Version] = crds
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for gv := range r.versions {
		if gv.Group == group && versions[gv.Version] == nil {
			delete(r.versions, gv)
			r.named.RemoveGroupVersion(metav1.GroupVersion(gv))
		}
	}
	if len(versions) == 0 {
		if r.groups[group] != nil {
			delete(r.groups, group)
			r.root.RemoveGroup(group)
			r.named.RemoveGroup(group)
		}
		return
	}
	names := sortedVersions(versions)
	served := make([]metav1.GroupVersionForDiscovery, 0, len(names))
	for i, name := range names {
		gv := schema.GroupVersion{Group: group, Version: name}
		served = append(served, metav1.GroupVersionForDiscovery{GroupVersion: gv.String(), Version: name})
		r.publishVersion(gv, versions[name], len(names)-i)
	}
	info := metav1.APIGroup{Name: group, Versions: served, PreferredVersion: served[0]}
	r.groups[group] = discovery.NewAPIGroupHandler(apiextensionsserver.Codecs, info)
	r.root.AddGroup(info)
}

// publishVersion renews one version's documents; r.mu is held.
func (r *customResources) publishVersion(gv schema.GroupVersion, crds []*apiextensionsv1.CustomResourceDefinition, priority int) {
	var resources []metav1.APIResource
	for _, crd := range crds {
		resources = append(resources, apiResources(crd, gv)...)
	}
	lister := discovery.APIResourceListerFunc(func() []metav1.APIResource { return resources })
	r.versions[gv] = discovery.NewAPIVersionHandler(apiextensionsserver.Codecs, gv, lister)
	r.named.AddGroupVersion(gv.Group, apidiscoveryv2.APIVersionDiscovery{
		Freshness: apidiscoveryv2.DiscoveryFreshnessCurrent,
		Version:   gv.Version,
		Resources: aggregatedResources(crds, gv),
	})
	r.named.SetGroupVersionPriority(metav1.GroupVersion(gv), customPriority, priority)
}

// customPriority is where CRD groups stand among all groups; source: upstream's CRD registration.
const customPriority = 1000

func sortedVersions(versions map[string][]*apiextensionsv1.CustomResourceDefinition) []string {
	names := make([]string, 0, len(versions))
	for name := range versions {
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b string) int { return utilversion.CompareKubeAwareVersionStrings(b, a) })
	return names
}

func verbsOf(crd *apiextensionsv1.CustomResourceDefinition) metav1.Verbs {
	if apiextensionshelpers.IsCRDConditionTrue(crd, apiextensionsv1.Terminating) {
		return metav1.Verbs{"delete", "deletecollection", "get", "list", "watch"}
	}
	return metav1.Verbs{"delete", "deletecollection", "get", "list", "patch", "create", "update", "watch"}
}

var subresourceVerbs = metav1.Verbs{"get", "patch", "update"}

func storageHash(crd *apiextensionsv1.CustomResourceDefinition) string {
	for _, v := range crd.Spec.Versions {
		if v.Storage {
			return discovery.StorageVersionHash(crd.Spec.Group, v.Name, crd.Spec.Names.Kind)
		}
	}
	return ""
}

func subresourcesOf(crd *apiextensionsv1.CustomResourceDefinition, gv schema.GroupVersion) apiextensionsv1.CustomResourceSubresources {
	sub, err := apiextensionshelpers.GetSubresourcesForVersion(crd, gv.Version)
	if err != nil || sub == nil {
		return apiextensionsv1.CustomResourceSubresources{}
	}
	return *sub
}

// apiResources is one CRD in a version's old-style document.
func apiResources(crd *apiextensionsv1.CustomResourceDefinition, gv schema.GroupVersion) []metav1.APIResource {
	names, namespaced := crd.Status.AcceptedNames, crd.Spec.Scope == apiextensionsv1.NamespaceScoped
	out := []metav1.APIResource{{
		Name: names.Plural, SingularName: names.Singular, Namespaced: namespaced, Kind: names.Kind, Verbs: verbsOf(crd),
		ShortNames: names.ShortNames, Categories: names.Categories, StorageVersionHash: storageHash(crd),
	}}
	sub := subresourcesOf(crd, gv)
	if sub.Status != nil {
		out = append(out, metav1.APIResource{Name: names.Plural + "/status", Namespaced: namespaced, Kind: names.Kind, Verbs: subresourceVerbs})
	}
	if sub.Scale != nil {
		out = append(out, metav1.APIResource{Group: "autoscaling", Version: "v1", Kind: "Scale", Name: names.Plural + "/scale",
			Namespaced: namespaced, Verbs: subresourceVerbs})
	}
	return out
}

// aggregatedResources is a version's CRDs in the aggregated document, sorted by resource.
func aggregatedResources(crds []*apiextensionsv1.CustomResourceDefinition, gv schema.GroupVersion) []apidiscoveryv2.APIResourceDiscovery {
	out := make([]apidiscoveryv2.APIResourceDiscovery, 0, len(crds))
	for _, crd := range crds {
		names := crd.Status.AcceptedNames
		kind := &metav1.GroupVersionKind{Group: gv.Group, Version: gv.Version, Kind: names.Kind}
		r := apidiscoveryv2.APIResourceDiscovery{
			Resource: names.Plural, SingularResource: names.Singular, ResponseKind: kind, Scope: apidiscoveryv2.ScopeCluster,
			Verbs: verbsOf(crd), ShortNames: names.ShortNames, Categories: names.Categories,
		}
		if crd.Spec.Scope == apiextensionsv1.NamespaceScoped {
			r.Scope = apidiscoveryv2.ScopeNamespace
		}
		sub := subresourcesOf(crd, gv)
		if sub.Status != nil {
			r.Subresources = append(r.Subresources, apidiscoveryv2.APISubresourceDiscovery{Subresource: "status", ResponseKind: kind, Verbs: subresourceVerbs})
		}
		if sub.Scale != nil {
			scale := &metav1.GroupVersionKind{Group: "autoscaling", Version: "v1", Kind: "Scale"}
			r.Subresources = append(r.Subresources, apidiscoveryv2.APISubresourceDiscovery{Subresource: "scale", ResponseKind: scale, Verbs: subresourceVerbs})
		}
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b apidiscoveryv2.APIResourceDiscovery) int { return strings.Compare(a.Resource, b.Resource) })
	return out
}

// serveDiscovery answers /apis/<group> and /apis/<group>/<version>; false when the group is not one of CRDs.
func (r *customResources) serveDiscovery(w http.ResponseWriter, req *http.Request, gv schema.GroupVersion) bool {
	r.mu.RLock()
	h := r.groups[gv.Group]
	if gv.Version != "" {
		h = r.versions[gv]
	}
	r.mu.RUnlock()
	if h == nil {
		return false
	}
	h.ServeHTTP(w, req)
	return true
}

// refuseProtobuf answers 415 to bodies in protobuf, which custom resources do not have. Upstream's handler takes the media
// type for the sake of other objects (scales, delete options) and falls over a custom resource in it.
func refuseProtobuf(h http.Handler) http.Handler {
	err := negotiation.NewUnsupportedMediaTypeError([]string{runtime.ContentTypeJSON, runtime.ContentTypeYAML})
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		info, ok := apirequest.RequestInfoFrom(req.Context())
		writes := req.Method == http.MethodPost || req.Method == http.MethodPut
		if ok && writes && info.Subresource != "scale" && strings.HasPrefix(req.Header.Get("Content-Type"), runtime.ContentTypeProtobuf) {
			responsewriters.ErrorNegotiated(err, legacyscheme.Codecs, schema.GroupVersion{Group: info.APIGroup, Version: info.APIVersion}, w, req)
			return
		}
		h.ServeHTTP(w, req)
	})
}
