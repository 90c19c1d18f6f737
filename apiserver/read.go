package apiserver

import (
	"compress/gzip"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/validate/content"
	"k8s.io/apimachinery/pkg/apis/meta/internalversion"
	internalvalidation "k8s.io/apimachinery/pkg/apis/meta/internalversion/validation"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/kubernetes/pkg/api/legacyscheme"

	"knarr/api"
	"knarr/apiserver/pieces"
)

const (
	// compressFrom is the size from which an answer is compressed, as upstream: for a client that is not on this machine, and see zip_list.go.
	compressFrom = 128 << 10
)

// reader answers gets, lists and watches of stored kinds straight from the store: the same object that everybody reads,
// encoded once. What it does not know (tables, other versions) goes to upstream's handlers.
type reader struct {
	registry *api.Registry
	custom   *servedResources
	next     http.Handler
	metrics  *readMetrics
	zips     *pieces.Cache
	// audited says that a policy may want answers recorded, which upstream's handlers do.
	audited bool
}

// read is one request that the reader can answer.
type read struct {
	info   *apirequest.RequestInfo
	kind   *api.Kind
	custom *served // nil: a built-in kind
	format format
	zips   *pieces.Cache // of all lists
	// namespace of the object, or of the list; empty for cluster-scoped kinds and lists across namespaces.
	namespace string
}

func (r *reader) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	rd := r.accept(req)
	if rd == nil || r.audited && recordsAnswer(req) {
		r.next.ServeHTTP(w, req)
		return
	}
	counted := r.metrics.begin(w, req, rd.kind, rd.info)
	defer counted.done()
	w = counted
	err := rd.fresh(req)
	switch {
	case err != nil:
	case rd.info.Verb == "get":
		err = rd.get(w, req)
	case rd.info.Verb == "list":
		err = rd.list(w, req)
	case rd.info.Verb == "watch":
		err = rd.watch(w, req)
	}
	if err != nil {
		responsewriters.ErrorNegotiated(err, legacyscheme.Codecs, rd.kind.Stored.GroupVersion(), w, req)
	}
}

// accept decides whether the request is one for this path.
func (r *reader) accept(req *http.Request) *read {
	info, ok := apirequest.RequestInfoFrom(req.Context())
	if !ok || !info.IsResourceRequest || info.Subresource != "" || req.Method != http.MethodGet {
		return nil
	}
	if info.Verb != "get" && info.Verb != "list" && info.Verb != "watch" || len(info.Parts) > 2 || strings.Contains(req.URL.Path, "/watch/") {
		return nil
	}
	if asksForMore(req.URL.RawQuery) || req.Header.Get("Upgrade") != "" {
		return nil
	}
	kind := r.registry.Kind(schema.GroupResource{Group: info.APIGroup, Resource: info.Resource})
	if kind == nil {
		return nil
	}
	if !kind.Plain() {
		return r.acceptCustom(info, req.Header.Get("Accept"))
	}
	f := formatFor(req.Header.Get("Accept"))
	if f == nil || !r.knows(kind, info.APIGroup, info.APIVersion) {
		return nil
	}
	if _, ok := f.(protoFormat); ok && isJSONOnly(kind.Stored.Group) {
		return nil
	}
	namespace := info.Namespace
	if kind.Stored == (schema.GroupVersionKind{Version: "v1", Kind: "Namespace"}) {
		namespace = "" // RequestInfo puts a namespace into itself
	}
	return &read{info: info, kind: kind, format: f, zips: r.zips, namespace: namespace}
}

// acceptCustom is accept for a custom resource.
func (r *reader) acceptCustom(info *apirequest.RequestInfo, accept string) *read {
	s := r.custom.find(info.APIGroup, info.APIVersion, info.Resource)
	if s == nil || !s.covers(info) {
		return nil
	}
	f := s.formatFor(accept)
	if f == nil {
		return nil
	}
	return &read{info: info, kind: s.kind, custom: s, format: f, zips: r.zips, namespace: info.Namespace}
}

// asksForMore tells parameters that upstream's handlers have an answer of their own to.
func asksForMore(query string) bool {
	return strings.Contains(query, "pretty=") || strings.Contains(query, "export=")
}

// knows reports whether objects of the kind are served as they are stored.
func (r *reader) knows(kind *api.Kind, group, version string) bool {
	return kind.Plain() && kind.Stored.Group == group && kind.Stored.Version == version && !isDeprecated(kind)
}

// isJSONOnly tells groups whose Go types have no protobuf form that is served.
func isJSONOnly(group string) bool {
	return group == "apiextensions.k8s.io" || group == "apiregistration.k8s.io"
}

// isDeprecated tells kinds whose every answer carries a warning, which upstream's handlers add.
func isDeprecated(kind *api.Kind) bool {
	return kind.Stored == schema.GroupVersionKind{Version: "v1", Kind: "Endpoints"}
}

// fresh waits, where several servers share a store, until this one holds what the request must see.
func (rd *read) fresh(req *http.Request) error {
	if !rd.kind.Shared() {
		return nil
	}
	return rd.kind.Fresh(req.Context(), req.URL.Query().Get("resourceVersion"))
}

func (rd *read) get(w http.ResponseWriter, req *http.Request) error {
	if v := req.URL.Query().Get("resourceVersion"); v != "" && v != "0" {
		if err := rd.kind.NotNewer(v); err != nil {
			return err
		}
	}
	rec := rd.kind.Table.Get(rd.kind.Key(rd.namespace, rd.info.Name))
	if rec == nil {
		return rd.absent()
	}
	head, body, tail, err := rd.format.parts(nil, rec, rd.kind.Stored)
	if err != nil {
		return apierrors.NewInternalError(err)
	}
	return write(w, req, rd.format.contentType(), head, body, tail)
}

// absent says why there is no object: nobody has made it, or nobody could.
func (rd *read) absent() error {
	if msgs := content.IsPathSegmentName(rd.info.Name); len(msgs) > 0 {
		return apierrors.NewBadRequest(fmt.Sprintf("Name parameter invalid: %q: %s", rd.info.Name, strings.Join(msgs, ";")))
	}
	return apierrors.NewNotFound(rd.kind.Resource, rd.info.Name)
}

func (rd *read) list(w http.ResponseWriter, req *http.Request) error {
	sel, opts, _, err := rd.selection(req)
	if err != nil {
		return err
	}
	l := listings.Get().(*listing)
	defer l.leave()
	if err := rd.kind.ListInto(&l.page, sel, opts); err != nil {
		return err
	}
	return rd.sendList(w, req, l)
}

// decodeListOptions does what upstream's parameter codec does, without looking for how.
func decodeListOptions(query url.Values, into *internalversion.ListOptions) error {
	if len(query) == 0 {
		return nil
	}
	var versioned metav1.ListOptions
	if err := metav1.Convert_url_Values_To_v1_ListOptions(&query, &versioned, nil); err != nil {
		return err
	}
	return internalversion.Convert_v1_ListOptions_To_internalversion_ListOptions(&versioned, into, nil)
}

// selection reads the request's parameters as upstream's list handler does.
func (rd *read) selection(req *http.Request) (api.Selection, storage.ListOptions, *internalversion.ListOptions, error) {
	opts := &internalversion.ListOptions{}
	fail := func(err error) (api.Selection, storage.ListOptions, *internalversion.ListOptions, error) {
		return api.Selection{}, storage.ListOptions{}, nil, err
	}
	if err := decodeListOptions(req.URL.Query(), opts); err != nil {
		return fail(apierrors.NewBadRequest(err.Error()))
	}
	internalversion.SetListOptionsDefaults(opts, true)
	if errs := internalvalidation.ValidateListOptions(opts, true); len(errs) > 0 {
		return fail(apierrors.NewInvalid(schema.GroupKind{Group: metav1.GroupName, Kind: "ListOptions"}, "", errs))
	}
	if opts.FieldSelector != nil {
		var err error
		opts.FieldSelector, err = opts.FieldSelector.Transform(func(label, value string) (string, string, error) {
			if rd.custom != nil {
				return rd.custom.scope.Convertor.ConvertFieldLabel(rd.kind.Stored, label, value)
			}
			return rd.kind.ConvertFieldLabel(label, value)
		})
		if err != nil {
			return fail(apierrors.NewBadRequest(err.Error()))
		}
	}
	label := opts.LabelSelector
	if label == nil {
		label = labels.Everything()
	}
	sel := rd.kind.Select(rd.namespace, label, opts.FieldSelector)
	return sel, storage.ListOptions{
		ResourceVersion:      opts.ResourceVersion,
		ResourceVersionMatch: opts.ResourceVersionMatch,
		SendInitialEvents:    opts.SendInitialEvents,
		Recursive:            true,
		Predicate:            storage.SelectionPredicate{Limit: opts.Limit, Continue: opts.Continue, AllowWatchBookmarks: opts.AllowWatchBookmarks},
	}, opts, nil
}

// write sends a whole answer, of parts.
func write(w http.ResponseWriter, req *http.Request, contentType string, parts ...[]byte) error {
	size := 0
	for _, part := range parts {
		size += len(part)
	}
	h := w.Header()
	h.Set("Content-Type", contentType)
	out, end, err := compressed(w, req, size)
	if err != nil {
		return err
	}
	if h.Get("Content-Encoding") == "" {
		h.Set("Content-Length", strconv.Itoa(size))
	}
	for _, part := range parts {
		if len(part) == 0 {
			continue
		}
		if _, err := out.Write(part); err != nil { // the client went away: nobody is left to tell
			return nil
		}
	}
	end()
	return nil
}

// compressed gives what to write an answer of size bytes to, and what to call after the last: a compressor where that pays.
func compressed(w http.ResponseWriter, req *http.Request, size int) (io.Writer, func(), error) {
	if size < compressFrom || !acceptsZip(req) || isLocal(req) {
		return w, func() {}, nil
	}
	z, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
	if err != nil {
		return nil, nil, apierrors.NewInternalError(err)
	}
	announceZip(w.Header())
	return z, func() { _ = z.Close() }, nil
}

func announceZip(h http.Header) {
	h.Set("Content-Encoding", "gzip")
	h.Add("Vary", "Accept-Encoding")
}

// acceptsZip tells who takes gzip, as upstream does: with a weight it is not taken for that.
func acceptsZip(req *http.Request) bool {
	for token := range strings.SplitSeq(req.Header.Get("Accept-Encoding"), ",") {
		if strings.TrimSpace(token) == "gzip" {
			return true
		}
	}
	return false
}

// isLocal tells clients for whom compression only costs.
func isLocal(req *http.Request) bool {
	host, _, err := net.SplitHostPort(req.RemoteAddr)
	return err != nil || net.ParseIP(host).IsLoopback()
}
