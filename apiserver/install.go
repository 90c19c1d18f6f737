package apiserver

import (
	"fmt"
	"maps"
	"net/http"
	"reflect"
	goruntime "runtime"
	"slices"
	"unsafe"

	"github.com/emicklei/go-restful/v3"
	"golang.org/x/sync/errgroup"
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

	"knarr/api"
)

// installer puts groups of REST storage behind upstream's handlers, one go-restful web service per group version.
type installer struct {
	container   *restful.Container
	discovery   *discoveries
	equivalents runtime.EquivalentResourceRegistry
	admit       admission.Interface
	authorizer  authorizer.Authorizer
	schemas     schemas
	services    map[schema.GroupVersion]describe
}

// describe makes the web service of a group version anew, with the documentation of its routes, which the one that serves has lost.
type describe func() (*restful.WebService, error)

func newContainer() *restful.Container {
	c := restful.NewContainer()
	c.ServeMux = http.NewServeMux()
	c.Router(restful.CurlyRouter{})
	c.DoNotRecover(true)
	return c
}

// group is a group of REST storage and where it is to be served.
type group struct {
	*genericapiserver.APIGroupInfo
	prefix string
	types  managedfields.TypeConverter
}

// version is what serves a version of a group.
type version struct {
	gv        schema.GroupVersion
	service   *restful.WebService
	describe  describe
	resources []apidiscoveryv2.APIResourceDiscovery
}

// installAll serves all groups. They are made side by side, which is a sixth of a start, and added in order.
func (in *installer) installAll(groups *api.Groups) error {
	all := []group{{groups.Core, "/api", in.schemas.builtin}, {groups.Aggregation, "/apis", in.schemas.extension}, {groups.Extensions, "/apis", in.schemas.extension}}
	for _, named := range groups.Named {
		all = append(all, group{named, "/apis", in.schemas.builtin})
	}
	versions := make([][]version, len(all))
	var g errgroup.Group
	g.SetLimit(goruntime.GOMAXPROCS(0))
	for i := range all {
		g.Go(func() (err error) {
			versions[i], err = in.makeGroup(&all[i])
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for i := range all {
		in.add(&all[i], versions[i])
	}
	in.discovery.setPriorities()
	return nil
}

// makeGroup makes every version of a group, in their order, as equivalent resources of a group are known by that.
func (in *installer) makeGroup(g *group) ([]version, error) {
	var out []version
	for _, gv := range g.PrioritizedVersions {
		if len(g.VersionedResourcesStorageMap[gv.Version]) == 0 {
			continue
		}
		v, err := in.makeVersion(g, gv)
		if err != nil {
			return nil, fmt.Errorf("install %s: %w", gv, err)
		}
		out = append(out, v)
	}
	return out, nil
}

// add serves the versions of a group.
func (in *installer) add(g *group, versions []version) {
	var served []metav1.GroupVersionForDiscovery
	for _, v := range versions {
		in.container.Add(v.service)
		in.services[v.gv] = v.describe
		in.discovery.addVersion(g.prefix, v.gv, v.resources)
		served = append(served, metav1.GroupVersionForDiscovery{GroupVersion: v.gv.String(), Version: v.gv.Version})
	}
	if g.prefix == "/apis" && len(served) > 0 {
		in.discovery.addGroup(metav1.APIGroup{Name: g.PrioritizedVersions[0].Group, Versions: served, PreferredVersion: served[0]})
	}
}

func (in *installer) makeVersion(info *group, gv schema.GroupVersion) (version, error) {
	v := &genericapi.APIGroupVersion{
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
	}
	service, resources, err := webService(v)
	if err != nil {
		return version{}, err
	}
	drop(service, documentation)
	again := func() (*restful.WebService, error) {
		again := *v
		again.EquivalentResourceRegistry = runtime.NewEquivalentResourceRegistry() // the server's knows these resources
		service, _, err := webService(&again)
		return service, err
	}
	return version{gv, service, again, resources}, nil
}

// webService makes the web service of a group version, without regular expressions.
func webService(v *genericapi.APIGroupVersion) (*restful.WebService, []apidiscoveryv2.APIResourceDiscovery, error) {
	to := newContainer()
	resources, _, err := v.InstallREST(to)
	if err != nil {
		return nil, nil, err
	}
	service := to.RegisteredWebServices()[0]
	drop(service, expressions)
	return service, resources, nil
}

// Fields of a route that a server does not need.
var (
	// expressions are the regular expressions of routes, 5 MB in all, which go-restful compiles for a router that is not ours: CurlyRouter matches by the parts of a path.
	expressions = []string{"pathExpr"}
	// documentation is what OpenAPI documents are made of, a seventh of all objects that an idle server has.
	documentation = []string{"Doc", "Notes", "Operation", "ParameterDocs", "ResponseErrors", "DefaultResponse", "ReadSample", "WriteSample", "WriteSamples", "Metadata"}
)

// drop frees fields of a web service's routes, and counts them. Where the library keeps them elsewhere nothing happens; a test tells.
func drop(service *restful.WebService, fields []string) (dropped int) {
	routes := reflect.ValueOf(service).Elem().FieldByName("routes")
	if routes.Kind() != reflect.Slice {
		return 0
	}
	for i := range routes.Len() {
		for _, name := range fields {
			if f := routes.Index(i).FieldByName(name); f.IsValid() {
				// The routes are the library's own, hence the detour.
				reflect.NewAt(f.Type(), unsafe.Pointer(f.UnsafeAddr())).Elem().SetZero()
				dropped++
			}
		}
	}
	return dropped
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
	root       discovery.GroupManager
	named      resourceManager
	legacy     resourceManager
	container  *restful.Container
	serializer runtime.NegotiatedSerializer
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

func (d *discoveries) addGroup(group metav1.APIGroup) {
	d.root.AddGroup(group)
	d.container.Add(discovery.NewAPIGroupHandler(d.serializer, group).WebService())
}
