package apiserver

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/validation"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
)

// newWriter makes the writer in front of the router, for the hot ones among what is installed.
func (s *Server) newWriter(in *installer) (*writer, error) {
	w := &writer{next: s.newRouter(in), metrics: s.reads, admit: s.admit, custom: s.custom.served, resources: map[hotName]*hot{}, audited: s.auditing.backend != nil}
	for _, group := range append([]*genericapiserver.APIGroupInfo{s.groups.Core}, s.groups.Named...) {
		for _, gv := range group.PrioritizedVersions {
			if err := w.addHot(s.config.Registry, in, gv, group.VersionedResourcesStorageMap[gv.Version]); err != nil {
				return nil, err
			}
		}
	}
	return w, nil
}

// accept decides by its head whether the request is one for this path.
func (w *writer) accept(req *http.Request) *change {
	info, ok := apirequest.RequestInfoFrom(req.Context())
	if !ok || !info.IsResourceRequest || w.audited {
		return nil
	}
	h := w.find(hotName{schemaResource(info), info.Subresource})
	if h == nil || h.namespaced != (info.Namespace != "") || req.Header.Get("Upgrade") != "" {
		return nil
	}
	wr := &change{hot: h, writer: w, info: info, format: h.formatFor(req.Header.Get("Accept")), contentType: mediaType(req)}
	if wr.format == nil || isBrowser(req.UserAgent()) || !wr.parameters(req.URL.RawQuery) {
		return nil
	}
	switch info.Verb {
	case "create":
		if h.custom != nil && (!h.custom.takesNew() || wr.contentType != runtime.ContentTypeJSON) {
			return nil
		}
		_, can := h.storage.(rest.Creater)
		if !can || info.Name != "" || serializers()[wr.contentType].Serializer == nil {
			return nil
		}
	case "patch":
		if h.custom != nil && wr.contentType != string(types.MergePatchType) {
			return nil
		}
		_, can := h.storage.(rest.Patcher)
		if !can || info.Name == "" || wr.contentType != string(types.StrategicMergePatchType) && wr.contentType != string(types.MergePatchType) {
			return nil
		}
	case "delete":
		_, can := h.storage.(rest.GracefulDeleter)
		if !can || info.Name == "" || req.URL.RawQuery != "" {
			return nil
		}
	default:
		return nil
	}
	if wr.user, ok = apirequest.UserFrom(req.Context()); !ok {
		return nil
	}
	wr.manager = wr.fieldManager
	if wr.manager == "" {
		wr.manager, _, _ = strings.Cut(req.UserAgent(), "/")
	}
	if len(wr.manager) > validation.FieldManagerMaxLength {
		return nil
	}
	if info.Verb == "delete" {
		return wr
	}
	if h.custom != nil {
		if !isPrintable(wr.manager) {
			return nil
		}
		return wr
	}
	var err error
	wr.owners, err = h.owner()
	if err != nil {
		return nil
	}
	return wr
}

// find gives what is known of a resource; nil where upstream's handlers have to write it.
func (w *writer) find(name hotName) *hot {
	if h := w.resources[name]; h != nil || isBuiltIn(name.Group) {
		return h
	}
	s := w.custom.find(name.Group, name.Version, name.Resource)
	switch {
	case s == nil:
	case name.subresource == "":
		return s.main
	case name.subresource == "status":
		return s.status
	}
	return nil
}

// isBuiltIn tells groups that hold no custom resources.
func isBuiltIn(group string) bool {
	return !strings.Contains(group, ".") || legacyscheme.Scheme.IsGroupRegistered(group)
}

// formatFor is how an answer is written; nil for one that upstream's handlers have to write.
func (h *hot) formatFor(accept string) format {
	if h.custom != nil {
		return h.custom.formatFor(accept)
	}
	return formatFor(accept)
}

// isPrintable tells names of managers in which upstream's handlers leave out nothing.
func isPrintable(manager string) bool {
	for i := range len(manager) {
		if manager[i] <= ' ' || manager[i] > '~' {
			return false
		}
	}
	return true
}

// mediaType is the content type without parameters.
func mediaType(req *http.Request) string {
	t, _, _ := strings.Cut(req.Header.Get("Content-Type"), ";")
	return t
}

// isBrowser tells clients whose answers upstream indents.
func isBrowser(agent string) bool {
	return strings.HasPrefix(agent, "curl") || strings.HasPrefix(agent, "Wget") || strings.HasPrefix(agent, "Mozilla/5.0")
}

// parameters reads the query; false for one with anything but a field manager and how to validate fields.
func (wr *change) parameters(raw string) bool {
	if raw == "" {
		return true
	}
	query, err := url.ParseQuery(raw)
	if err != nil {
		return false
	}
	for name, values := range query {
		if len(values) != 1 {
			return false
		}
		switch name {
		case "fieldManager":
			wr.fieldManager = values[0]
		case "fieldValidation":
			wr.fieldValidation = values[0]
		case "timeout": // is the filters'
		default:
			return false
		}
	}
	return len(validation.ValidateCreateOptions(&metav1.CreateOptions{FieldManager: wr.fieldManager, FieldValidation: wr.fieldValidation})) == 0
}

// serializers are what objects are read with, by media type.
var serializers = sync.OnceValue(func() map[string]runtime.SerializerInfo {
	out := map[string]runtime.SerializerInfo{}
	for _, info := range legacyscheme.Codecs.SupportedMediaTypes() {
		if info.MediaType == runtime.ContentTypeJSON || info.MediaType == runtime.ContentTypeProtobuf {
			out[info.MediaType] = info
		}
	}
	return out
})

// errTooLong is a body that is too large for the API.
var errTooLong = errors.New("the body is too long")

// readBody takes the body in, and puts it back for who comes next when there is something wrong with it.
func readBody(req *http.Request) ([]byte, error) {
	if req.Body == nil || req.Body == http.NoBody {
		return nil, nil
	}
	data, err := bodyOf(req)
	if err == nil && len(data) <= MaxRequestBodyBytes {
		_ = req.Body.Close()
		return data, nil
	}
	rest := io.MultiReader(bytes.NewReader(data), req.Body)
	if err != nil {
		rest = io.MultiReader(bytes.NewReader(data), failed{err})
	} else {
		err = errTooLong
	}
	req.Body = struct {
		io.Reader
		io.Closer
	}{rest, req.Body}
	return nil, err
}

// whole is a body that gives what it has when that is all.
type whole interface {
	TakeWhole() (data []byte, ok bool)
}

// bodyOf gives the body, or what came of it, and a byte more than the API takes of one that is too long.
func bodyOf(req *http.Request) ([]byte, error) {
	if b, ok := req.Body.(whole); ok {
		if data, ok := b.TakeWhole(); ok {
			return data, nil
		}
	}
	buf := bytes.Buffer{}
	if n := req.ContentLength; n > 0 && n <= MaxRequestBodyBytes {
		buf.Grow(int(n) + bytes.MinRead)
	}
	_, err := buf.ReadFrom(io.LimitReader(req.Body, MaxRequestBodyBytes+1))
	return buf.Bytes(), err
}

// failed is a body that ended with an error.
type failed struct{ err error }

// Read implements io.Reader.
func (f failed) Read([]byte) (int, error) { return 0, f.err }
