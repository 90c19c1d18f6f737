package apiserver

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"

	apidiscoveryv2 "k8s.io/api/apidiscovery/v2"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	genericapi "k8s.io/apiserver/pkg/endpoints"
	"k8s.io/apiserver/pkg/endpoints/discovery/aggregated"
	"k8s.io/client-go/transport"
	apiregistrationv1 "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"
	controlplaneapiserver "k8s.io/kubernetes/pkg/controlplane/apiserver"
)

// maxDiscoveryBytes bounds what is read of an aggregated server's discovery document.
const maxDiscoveryBytes = 4 << 20

// builtinPriorities orders groups and their versions in discovery, which decides what a bare resource name means to
// kubectl. Source: upstream's generic table and cmd/kube-apiserver/app/aggregator.go.
func builtinPriorities() map[schema.GroupVersion]controlplaneapiserver.APIServicePriority {
	out := controlplaneapiserver.DefaultGenericAPIServicePriorities()
	add := func(group string, priority int32, versions map[string]int32) {
		for version, v := range versions {
			out[schema.GroupVersion{Group: group, Version: version}] = controlplaneapiserver.APIServicePriority{Group: priority, Version: v}
		}
	}
	add("apps", 17800, map[string]int32{"v1": 15})
	add("autoscaling", 17500, map[string]int32{"v1": 15, "v2": 30})
	add("batch", 17400, map[string]int32{"v1": 15})
	add("networking.k8s.io", 17200, map[string]int32{"v1": 15, "v1beta1": 9})
	add("policy", 17100, map[string]int32{"v1": 15})
	add("storage.k8s.io", 16800, map[string]int32{"v1": 15, "v1beta1": 9, "v1alpha1": 1})
	add("scheduling.k8s.io", 16600, map[string]int32{"v1": 15, "v1alpha2": 2})
	add("node.k8s.io", 16300, map[string]int32{"v1": 15})
	add("resource.k8s.io", 16200, map[string]int32{"v1": 21, "v1beta2": 15, "v1beta1": 9, "v1alpha3": 1})
	return out
}

// fetch reads a document of an aggregated server in this server's own name.
func (a *aggregator) fetch(ctx context.Context, r *remoteServer, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, availabilityTimeout)
	defer cancel()
	location, err := a.services.ResolveEndpoint(r.namespace, r.name, r.port)
	if err != nil {
		return nil, err
	}
	location.Path = path
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, location.String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	transport.SetAuthProxyHeaders(req, "system:kube-aggregator", "", []string{"system:masters"}, nil)
	resp, err := r.transport.RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", location, err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxDiscoveryBytes))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return nil, fmt.Errorf("%s: bad status from %s: %d", location, location, resp.StatusCode)
	}
	return data, nil
}

// learn adds what an aggregated server serves, by its own document, to ours.
func (a *aggregator) learn(service *apiregistrationv1.APIService, document []byte) error {
	var list metav1.APIResourceList
	if err := json.Unmarshal(document, &list); err != nil {
		return err
	}
	resources, err := genericapi.ConvertGroupVersionIntoToDiscovery(list.APIResources)
	if err != nil {
		return err
	}
	manager := a.named.WithSource(aggregated.AggregatorSource)
	manager.AddGroupVersion(service.Spec.Group, apidiscoveryv2.APIVersionDiscovery{
		Freshness: apidiscoveryv2.DiscoveryFreshnessCurrent, Version: service.Spec.Version, Resources: resources,
	})
	manager.SetGroupVersionPriority(metav1.GroupVersion{Group: service.Spec.Group, Version: service.Spec.Version},
		int(service.Spec.GroupPriorityMinimum), int(service.Spec.VersionPriority))
	if info := a.groupInfo(service.Spec.Group); info != nil {
		a.root.AddGroup(*info)
	}
	return nil
}

// setPriorities orders the built-in groups.
func (d *discoveries) setPriorities() {
	for gv, p := range builtinPriorities() {
		d.named.SetGroupVersionPriority(metav1.GroupVersion(gv), int(p.Group), int(p.Version))
	}
}
