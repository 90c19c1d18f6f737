package apiserver

import (
	"fmt"
	"maps"
	"net/http"
	"slices"

	"github.com/emicklei/go-restful/v3"
	apidiscoveryv2 "k8s.io/api/apidiscovery/v2"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/managedfields"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	genericapi "k8s.io/apiserver/pkg/endpoints"
	"k8s.io/apiserver/pkg/endpoints/discovery"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/kubernetes/pkg/api/legacyscheme"

	"knarr/api"
)

// installer describes groups of REST storage to clients, and puts upstream's handlers before it.
type installer struct {
	discovery   *discoveries
	equivalents runtime.EquivalentResourceRegistry
	admit       admission.Interface
	authorizer  authorizer.Authorizer
	schemas     schemas
	versions    map[schema.GroupVersion]*version
	// groups serve the documents that list the versions of a named group.
	groups map[string]http.Handler
}

// group is a group of REST storage and where it is to be served.
type group struct {
	*genericapiserver.APIGroupInfo
	prefix string
	types  managedfields.TypeConverter
}

// installAll serves all groups.
func (in *installer) installAll(groups *api.Groups) error {
	all := []group{{groups.Core, "/api", in.schemas.builtin}, {groups.Aggregation, "/apis", in.schemas.aggregation}, {groups.Extensions, "/apis", in.schemas.extension}}
	for _, named := range groups.Named {
		all = append(all, group{named, "/apis", in.schemas.builtin})
	}
	for i := range all {
		if err := in.install(&all[i]); err != nil {
			return err
		}
	}
	in.discovery.setPriorities()
	return nil
}

// install serves every version of a group, in their order, as equivalent resources of a group are known by that.
func (in *installer) install(g *group) error {
	var served []metav1.GroupVersionForDiscovery
	for _, gv := range g.PrioritizedVersions {
		if len(g.VersionedResourcesStorageMap[gv.Version]) == 0 {
			continue
		}
		v, err := in.makeVersion(g, gv)
		if err != nil {
			return fmt.Errorf("install %s: %w", gv, err)
		}
		in.versions[gv] = v
		in.discovery.addVersion(g.prefix, gv, v.aggregated)
		served = append(served, metav1.GroupVersionForDiscovery{GroupVersion: gv.String(), Version: gv.Version})
	}
	if g.prefix == "/apis" && len(served) > 0 {
		known := metav1.APIGroup{Name: g.PrioritizedVersions[0].Group, Versions: served, PreferredVersion: served[0]}
		in.discovery.root.AddGroup(known)
		in.groups[known.Name] = onDemand(func() (*restful.WebService, error) {
			return discovery.NewAPIGroupHandler(legacyscheme.Codecs, known).WebService(), nil
		})
	}
	return nil
}

func (in *installer) makeVersion(info *group, gv schema.GroupVersion) (*version, error) {
	return newVersion(&genericapi.APIGroupVersion{
		Storage:                     info.VersionedResourcesStorageMap[gv.Version],
		Root:                        info.prefix,
		GroupVersion:                gv,
		AllServedVersionsByResource: servedVersions(info.APIGroupInfo),
		OptionsExternalVersion:      info.OptionsExternalVersion,
		MetaGroupVersion:            info.MetaGroupVersion,
		ParameterCodec:              info.ParameterCodec,
		Serializer:                  info.NegotiatedSerializer,
		Creater:                     info.Scheme,
		Convertor:                   info.Scheme,
		ConvertabilityChecker:       info.Scheme,
		UnsafeConvertor:             runtime.UnsafeObjectConvertor(info.Scheme),
		Defaulter:                   info.Scheme,
		Typer:                       info.Scheme,
		Namer:                       runtime.Namer(meta.NewAccessor()),
		TypeConverter:               info.types,
		EquivalentResourceRegistry:  in.equivalents,
		Authorizer:                  in.authorizer,
		Admit:                       in.admit,
		MinRequestTimeout:           MinWatchTimeout,
		MaxRequestBodyBytes:         MaxRequestBodyBytes,
	})
}

// servedVersions lists, by resource, the group versions that serve it; webhooks match equivalent resources by it.
func servedVersions(info *genericapiserver.APIGroupInfo) map[string][]string {
	out := map[string][]string{}
	for _, version := range slices.Sorted(maps.Keys(info.VersionedResourcesStorageMap)) {
		name := version
		if group := info.PrioritizedVersions[0].Group; group != "" {
			name = group + "/" + version
		}
		for resource := range info.VersionedResourcesStorageMap[version] {
			out[resource] = append(out[resource], name)
		}
	}
	return out
}

// discoveries is what clients learn of the API: the old documents per group and version, and the aggregated ones.
type discoveries struct {
	root   discovery.GroupManager
	named  resourceManager
	legacy resourceManager
}

func (d *discoveries) addVersion(prefix string, gv schema.GroupVersion, resources []apidiscoveryv2.APIResourceDiscovery) {
	manager := d.named
	if prefix == "/api" {
		manager = d.legacy
	}
	manager.AddGroupVersion(gv.Group, apidiscoveryv2.APIVersionDiscovery{
		Freshness: apidiscoveryv2.DiscoveryFreshnessCurrent,
		Version:   gv.Version,
		Resources: resources,
	})
}
