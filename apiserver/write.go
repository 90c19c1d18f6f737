package apiserver

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/managedfields"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/endpoints/handlers"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	"sigs.k8s.io/structured-merge-diff/v6/fieldpath"
	"sigs.k8s.io/structured-merge-diff/v6/typed"

	"knarr/api"
	"knarr/apiserver/ownership"
)

// writeTimeout bounds a write below the bound of the request, as upstream's handlers.
const writeTimeout = 34 * time.Second

// writer answers the creates, patches and deletions that a cluster does most, with the same results as upstream's handlers: the same decoders,
// defaults, conversions, admission and REST storage types, but with managed fields and patches of our own, no copies that nobody
// needs, and an answer from the stored record's shared bytes. Whatever is out of the ordinary goes to upstream's handlers before
// anything was done.
type writer struct {
	next      http.Handler
	metrics   *readMetrics
	admit     *plugins
	custom    *servedResources
	resources map[hotName]*hot
	// audited says that a policy may want requests recorded, which upstream's handlers do.
	audited bool
	// deletions are the options of the last usual deletion; nil before it.
	deletions atomic.Pointer[knownOptions]
}

// hotName is a resource, or one's subresource.
type hotName struct {
	schema.GroupVersionResource
	subresource string
}

// hot is a resource that is written often. Its REST storage hands stored objects on as they are.
type hot struct {
	hotName
	kind    *api.Kind
	hub     schema.GroupVersion
	storage rest.Storage
	scope   *handlers.RequestScope // what admission plugins may ask
	// namespaced says that the resource's objects live in namespaces.
	namespaced bool
	// custom is set for custom resources.
	custom *served
	// owner makes the manager of managed fields at the first write, since that needs the schema of all kinds.
	owner func() (*ownership.Manager, error)
}

// hotResources are the resources and subresources whose writes take the writer's way: what a cluster writes most, what people write, and what a start writes.
var hotResources = map[schema.GroupVersion][]string{
	{Version: "v1"}: {"pods", "pods/status", "nodes", "nodes/status", "configmaps", "secrets", "events", "namespaces", "serviceaccounts", "persistentvolumeclaims",
		"limitranges", "resourcequotas"},
	{Group: "events.k8s.io", Version: "v1"}:                {"events"},
	{Group: "coordination.k8s.io", Version: "v1"}:          {"leases"},
	{Group: "discovery.k8s.io", Version: "v1"}:             {"endpointslices"},
	{Group: "apps", Version: "v1"}:                         {"deployments", "replicasets", "statefulsets", "daemonsets"},
	{Group: "batch", Version: "v1"}:                        {"jobs", "cronjobs"},
	{Group: "autoscaling", Version: "v2"}:                  {"horizontalpodautoscalers"},
	{Group: "networking.k8s.io", Version: "v1"}:            {"ingresses", "networkpolicies"},
	{Group: "policy", Version: "v1"}:                       {"poddisruptionbudgets"},
	{Group: "rbac.authorization.k8s.io", Version: "v1"}:    {"roles", "rolebindings", "clusterroles", "clusterrolebindings"},
	{Group: "scheduling.k8s.io", Version: "v1"}:            {"priorityclasses"},
	{Group: "flowcontrol.apiserver.k8s.io", Version: "v1"}: {"flowschemas", "prioritylevelconfigurations"},
}

// addHot remembers the hot ones among the resources of a group version.
func (w *writer) addHot(registry *api.Registry, in *installer, gv schema.GroupVersion, storages map[string]rest.Storage) error {
	for _, path := range hotResources[gv] {
		resource, subresource, _ := strings.Cut(path, "/")
		name := hotName{gv.WithResource(resource), subresource}
		kind := registry.Kind(name.GroupResource())
		if storages[path] == nil || kind == nil || !kind.Plain() || kind.Stored.GroupVersion() != gv {
			continue
		}
		h := &hot{hotName: name, kind: kind, storage: storages[path], scope: hotScope(in, kind, name)}
		scoper, ok := storages[name.Resource].(rest.Scoper)
		h.namespaced = ok && scoper.NamespaceScoped()
		h.owner = sync.OnceValues(func() (*ownership.Manager, error) { return h.newOwner(in.schemas.builtin) })
		kinds, _, err := legacyscheme.Scheme.ObjectKinds(h.storage.New())
		if err != nil {
			return err
		}
		h.hub = kinds[0].GroupVersion()
		w.resources[name] = h
	}
	return nil
}

func hotScope(in *installer, kind *api.Kind, name hotName) *handlers.RequestScope {
	scheme := legacyscheme.Scheme
	return &handlers.RequestScope{Serializer: legacyscheme.Codecs, Creater: scheme, Convertor: scheme, Defaulter: scheme, Typer: scheme,
		UnsafeConvertor: runtime.UnsafeObjectConvertor(scheme), Authorizer: in.authorizer, EquivalentResourceMapper: in.equivalents,
		Resource: name.GroupVersionResource, Subresource: name.subresource, Kind: kind.Stored}
}

// newOwner makes the manager of the managed fields of a resource.
func (h *hot) newOwner(types managedfields.TypeConverter) (*ownership.Manager, error) {
	example, err := legacyscheme.Scheme.New(h.kind.Stored)
	if err != nil {
		return nil, err
	}
	example.GetObjectKind().SetGroupVersionKind(h.kind.Stored)
	value, err := types.ObjectToTyped(example, typed.AllowDuplicates)
	if err != nil {
		return nil, err
	}
	if _, ok := h.storage.(rest.ResetFieldsFilterStrategy); ok {
		return nil, fmt.Errorf("%s filters its fields in a way of its own", h.Resource)
	}
	gv := h.kind.Stored.GroupVersion()
	var reset *fieldpath.Set
	if s, ok := h.storage.(rest.ResetFieldsStrategy); ok {
		reset = s.GetResetFields()[fieldpath.APIVersion(gv.String())]
	}
	return ownership.New(example, value, gv, h.subresource, reset)
}

// change is one request on the writer's way.
type change struct {
	*hot
	writer          *writer
	info            *apirequest.RequestInfo
	format          format
	manager         string
	fieldManager    string
	fieldValidation string
	user            user.Info
	contentType     string
	body            []byte
	outcome         *api.Outcome
	owners          *ownership.Manager
	times           heldTimes
	// owned are the managed fields of a patched custom resource while they are not in it.
	owned any
	// refused is set when the last try turned out to be one for upstream's handlers; nothing was written then.
	refused bool
}

// errRefused ends a write that upstream's handlers have to do.
var errRefused = errors.New("for upstream's handlers")

// refuse gives the write to upstream's handlers.
func (wr *change) refuse() error {
	wr.refused = true
	return errRefused
}

// ServeHTTP implements http.Handler.
func (w *writer) ServeHTTP(rw http.ResponseWriter, req *http.Request) {
	if wr := w.accept(req); wr != nil {
		var err error
		if wr.body, err = readBody(req); err == nil {
			if wr.serve(rw, req) {
				return
			}
			req.Body = io.NopCloser(bytes.NewReader(wr.body))
		}
	}
	w.next.ServeHTTP(rw, req)
}

// serve does the write and answers; false leaves both to upstream's handlers.
func (wr *change) serve(rw http.ResponseWriter, req *http.Request) bool {
	limit := newDeadlined(req.Context(), time.Now().Add(writeTimeout))
	defer limit.stop()
	outcome := &api.Outcome{Kind: wr.kind, Deletion: wr.info.Verb == "delete"}
	wr.outcome = outcome
	ctx := api.WithOutcome(apirequest.WithNamespace(limit, wr.info.Namespace), outcome)
	var result runtime.Object
	var err error
	code := http.StatusOK
	switch wr.info.Verb {
	case "create":
		code = http.StatusCreated
		result, err = wr.create(ctx)
	case "delete":
		result, code, err = wr.delete(ctx)
	default:
		result, err = wr.patch(ctx)
	}
	if err != nil && (wr.refused || isTooLarge(err)) {
		return false
	}
	wr.answer(rw, req, code, outcome, result, err)
	return true
}

// answer sends the result.
func (wr *change) answer(rw http.ResponseWriter, req *http.Request, code int, outcome *api.Outcome, result runtime.Object, err error) {
	counted := wr.writer.metrics.begin(rw, req, wr.kind, wr.info)
	defer counted.done()
	counted.took(len(wr.body))
	gv := wr.kind.Stored.GroupVersion()
	if err == nil {
		var head, body, tail []byte
		status, isStatus := result.(*metav1.Status)
		switch {
		case isStatus:
			head, body, tail, err = wr.encodeStatus(status)
		case outcome.Record != nil:
			head, body, tail, err = wr.encode(outcome)
		}
		if err == nil && body == nil {
			responsewriters.WriteObjectNegotiated(wr.scope.Serializer, wr.scope, gv, counted, req, code, result, false)
			return
		}
		if err == nil {
			err = write(&answering{counted, code}, req, wr.format.contentType(), head, body, tail)
		}
	}
	if err != nil {
		responsewriters.ErrorNegotiated(err, wr.scope.Serializer, gv, counted, req)
	}
}

// encode gives the answer, in parts. Protobuf is made of the bytes that were made for the store, where it is not there yet.
func (wr *change) encode(outcome *api.Outcome) (head, body, tail []byte, err error) {
	f, ok := wr.format.(protoFormat)
	if !ok {
		return wr.format.parts(nil, outcome.Record, wr.kind.Stored)
	}
	body, err = outcome.Record.Encoding(f.name(), func() ([]byte, error) {
		if data := outcome.Message(outcome.Record); data != nil {
			return data, nil
		}
		return f.encode(outcome.Record.Object)
	})
	return openEnvelope(nil, wr.kind.Stored, len(body)), body, closeEnvelope, err
}

// encodeStatus gives the answer of a deletion, in parts; nothing in other formats than these two.
func (wr *change) encodeStatus(status *metav1.Status) (head, body, tail []byte, err error) {
	kind := metav1.Unversioned.WithKind("Status")
	switch f := wr.format.(type) {
	case jsonFormat:
		named := *status
		named.SetGroupVersionKind(kind)
		body, err = f.encode(&named)
		tail = newline
	case protoFormat:
		body, err = f.encode(status)
		head, tail = openEnvelope(nil, kind, len(body)), closeEnvelope
	}
	return head, body, tail, err
}

// answering is a response writer whose status is another than 200.
type answering struct {
	http.ResponseWriter
	code int
}

// Write implements http.ResponseWriter.
func (a *answering) Write(data []byte) (int, error) {
	if a.code != 0 {
		a.WriteHeader(a.code)
		a.code = 0
	}
	return a.ResponseWriter.Write(data)
}

// isTooLarge tells errors after which upstream tries again without managed fields.
func isTooLarge(err error) bool {
	return err != nil && (apierrors.IsRequestEntityTooLargeError(err) || strings.Contains(err.Error(), "request is too large") ||
		strings.Contains(err.Error(), "ResourceExhausted"))
}
