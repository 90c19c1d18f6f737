package apiserver

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/emicklei/go-restful/v3"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	crdbuilder "k8s.io/apiextensions-apiserver/pkg/controller/openapi/builder"
	"k8s.io/apimachinery/pkg/runtime/schema"
	endpointsopenapi "k8s.io/apiserver/pkg/endpoints/openapi"
	genericapiserver "k8s.io/apiserver/pkg/server"
	aggregatorscheme "k8s.io/kube-aggregator/pkg/apiserver/scheme"
	"k8s.io/kube-openapi/pkg/builder"
	"k8s.io/kube-openapi/pkg/builder3"
	"k8s.io/kube-openapi/pkg/common"
	"k8s.io/kube-openapi/pkg/common/restfuladapter"
	"k8s.io/kube-openapi/pkg/handler"
	"k8s.io/kube-openapi/pkg/handler3"
	"k8s.io/kube-openapi/pkg/spec3"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	generatedopenapi "k8s.io/kubernetes/pkg/generated/openapi"

	apiextensionsserver "k8s.io/apiextensions-apiserver/pkg/apiserver"
)

// document is one OpenAPI description, built when first asked for and then kept as bytes.
type document struct {
	build func() (json []byte, err error)
	proto func(json []byte) ([]byte, error)

	once sync.Once
	json []byte
	err  error

	protoOnce sync.Once
	protoData []byte
	protoErr  error
}

func (d *document) asJSON() ([]byte, error) {
	d.once.Do(func() { d.json, d.err = d.build() })
	return d.json, d.err
}

func (d *document) asProto() ([]byte, error) {
	data, err := d.asJSON()
	if err != nil {
		return nil, err
	}
	d.protoOnce.Do(func() { d.protoData, d.protoErr = d.proto(data) })
	return d.protoData, d.protoErr
}

// serve answers in the representation that the client prefers; protobuf has a name of its own per OpenAPI version.
func (d *document) serve(w http.ResponseWriter, req *http.Request) {
	get, contentType := d.asJSON, "application/json"
	if strings.Contains(req.Header.Get("Accept"), "com.github.proto-openapi.spec") {
		get, contentType = d.asProto, firstProtoType(req.Header.Get("Accept"))
	}
	data, err := get()
	if err != nil {
		http.Error(w, fmt.Sprintf("build the OpenAPI document: %v", err), http.StatusInternalServerError)
		return
	}
	sum := sha256.Sum256(data)
	w.Header().Set("Etag", `"`+strings.ToUpper(hex.EncodeToString(sum[:]))+`"`)
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Vary", "Accept")
	http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(data))
}

func firstProtoType(accept string) string {
	for part := range strings.SplitSeq(accept, ",") {
		if mediaType, _, _ := strings.Cut(strings.TrimSpace(part), ";"); strings.Contains(mediaType, "com.github.proto-openapi.spec") {
			return strings.Replace(mediaType, "@", ".", 1)
		}
	}
	return "application/octet-stream"
}

// openAPI serves /openapi/v2 and /openapi/v3. Nothing is built before it is asked for: a server that no kubectl visits
// never pays for it.
type openAPI struct {
	builtin     map[schema.GroupVersion]*version
	definitions func() []*apiextensionsv1.CustomResourceDefinition

	mu       sync.Mutex
	v2       *document                         // guarded by mu
	versions map[schema.GroupVersion]*document // guarded by mu
	crdKey   string                            // guarded by mu: identifies the CRDs that the documents describe
}

// schemas is what the definitions and their names come from.
func getDefinitions(ref common.ReferenceCallback) map[string]common.OpenAPIDefinition {
	return generatedopenapi.GetOpenAPIDefinitions(ref)
}

func newNamer() *endpointsopenapi.DefinitionNamer {
	return endpointsopenapi.NewDefinitionNamer(legacyscheme.Scheme, apiextensionsserver.Scheme, aggregatorscheme.Scheme)
}

// refresh drops what describes CRDs that have changed since.
func (o *openAPI) refresh() []*apiextensionsv1.CustomResourceDefinition {
	crds := o.definitions()
	var key strings.Builder
	for _, crd := range crds {
		fmt.Fprintf(&key, "%s=%d;", crd.UID, crd.Generation)
	}
	if key.String() != o.crdKey || o.versions == nil {
		o.crdKey, o.v2 = key.String(), nil
		kept := map[schema.GroupVersion]*document{}
		for gv, doc := range o.versions {
			if o.builtin[gv] != nil {
				kept[gv] = doc
			}
		}
		o.versions = kept
	}
	return crds
}

// customVersions groups the served versions of established CRDs.
func customVersions(crds []*apiextensionsv1.CustomResourceDefinition) map[schema.GroupVersion][]*apiextensionsv1.CustomResourceDefinition {
	out := map[schema.GroupVersion][]*apiextensionsv1.CustomResourceDefinition{}
	for _, crd := range crds {
		if !isEstablished(crd) {
			continue
		}
		for _, v := range crd.Spec.Versions {
			if v.Served {
				gv := schema.GroupVersion{Group: crd.Spec.Group, Version: v.Name}
				out[gv] = append(out[gv], crd)
			}
		}
	}
	return out
}

// pathOf is a group version's path below /openapi/v3.
func pathOf(gv schema.GroupVersion) string {
	if gv.Group == "" {
		return "api/" + gv.Version
	}
	return "apis/" + gv.Group + "/" + gv.Version
}

// serveRoot lists the documents of /openapi/v3. The hash in each address changes when the document may have changed, so
// that clients can keep what they have.
func (o *openAPI) serveRoot(w http.ResponseWriter, _ *http.Request) {
	o.mu.Lock()
	crds := customVersions(o.refresh())
	key := o.crdKey
	o.mu.Unlock()
	type address struct {
		ServerRelativeURL string `json:"serverRelativeURL"`
	}
	paths := map[string]address{}
	add := func(gv schema.GroupVersion, seed string) {
		sum := sha256.Sum256([]byte(seed + pathOf(gv)))
		hash := strings.ToUpper(hex.EncodeToString(sum[:]))
		paths[pathOf(gv)] = address{"/openapi/v3/" + pathOf(gv) + "?hash=" + url.QueryEscape(hash)}
	}
	for gv := range o.builtin {
		add(gv, effectiveVersion().Info().GitVersion)
	}
	for gv := range crds {
		add(gv, key)
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{"paths": paths})
}

// serveVersion serves one group version's document.
func (o *openAPI) serveVersion(w http.ResponseWriter, req *http.Request) {
	parts := strings.Split(strings.Trim(strings.TrimPrefix(req.URL.Path, "/openapi/v3/"), "/"), "/")
	var gv schema.GroupVersion
	switch {
	case len(parts) == 2 && parts[0] == "api":
		gv.Version = parts[1]
	case len(parts) == 3 && parts[0] == "apis":
		gv.Group, gv.Version = parts[1], parts[2]
	}
	doc := o.version(gv)
	if doc == nil {
		http.NotFound(w, req)
		return
	}
	doc.serve(w, req)
}

func (o *openAPI) version(gv schema.GroupVersion) *document {
	o.mu.Lock()
	defer o.mu.Unlock()
	crds := customVersions(o.refresh())[gv]
	if doc := o.versions[gv]; doc != nil {
		return doc
	}
	builtin := o.builtin[gv]
	if builtin == nil && crds == nil {
		return nil
	}
	doc := &document{proto: handler3.ToV3ProtoBinary, build: func() ([]byte, error) { return buildV3(builtin, crds, gv) }}
	o.versions[gv] = doc
	return doc
}

func buildV3(builtin *version, crds []*apiextensionsv1.CustomResourceDefinition, gv schema.GroupVersion) ([]byte, error) {
	var specs []*spec3.OpenAPI
	if builtin != nil {
		service, err := builtin.documented()
		if err != nil {
			return nil, err
		}
		config := genericapiserver.DefaultOpenAPIV3Config(getDefinitions, newNamer())
		config.Info.Title = "Kubernetes"
		config.Info.Version = effectiveVersion().Info().GitVersion
		s, err := builder3.BuildOpenAPISpecFromRoutes(restfuladapter.AdaptWebServices([]*restful.WebService{service}), config)
		if err != nil {
			return nil, err
		}
		specs = append(specs, s)
	}
	for _, crd := range crds {
		s, err := crdbuilder.BuildOpenAPIV3(crd, gv.Version, crdbuilder.Options{})
		if err != nil {
			return nil, err
		}
		specs = append(specs, s)
	}
	merged, err := crdbuilder.MergeSpecsV3(specs...)
	if err != nil {
		return nil, err
	}
	return json.Marshal(merged)
}

func (o *openAPI) serveV2(w http.ResponseWriter, req *http.Request) {
	o.mu.Lock()
	crds := o.refresh()
	if o.v2 == nil {
		o.v2 = &document{proto: handler.ToProtoBinary, build: func() ([]byte, error) { return o.buildV2(crds) }}
	}
	doc := o.v2
	o.mu.Unlock()
	doc.serve(w, req)
}

func (o *openAPI) buildV2(crds []*apiextensionsv1.CustomResourceDefinition) ([]byte, error) {
	config := genericapiserver.DefaultOpenAPIConfig(getDefinitions, newNamer())
	config.Info.Title = "Kubernetes"
	config.Info.Version = effectiveVersion().Info().GitVersion
	services := make([]*restful.WebService, 0, len(o.builtin))
	for _, v := range o.builtin {
		service, err := v.documented()
		if err != nil {
			return nil, err
		}
		services = append(services, service)
	}
	static, err := builder.BuildOpenAPISpecFromRoutes(restfuladapter.AdaptWebServices(services), config)
	if err != nil {
		return nil, err
	}
	var errs []error
	for gv, list := range customVersions(crds) {
		for _, crd := range list {
			s, err := crdbuilder.BuildOpenAPIV2(crd, gv.Version, crdbuilder.Options{V2: true})
			if err == nil {
				static, err = crdbuilder.MergeSpecs(static, s)
			}
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return json.Marshal(static)
}
