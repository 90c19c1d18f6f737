package apiserver

import (
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"

	"knarr/api"
	"knarr/store"
)

// customFormat is application/json of custom resources: trees whose keys are sorted, also those of a list.
type customFormat struct {
	jsonFormat
	kind     *api.Kind
	listKind string
}

func (f customFormat) name() string { return f.kind.JSONName() }

func (f customFormat) encode(obj runtime.Object) ([]byte, error) { return api.EncodeJSON(obj) }

func (f customFormat) raw(rec *store.Record) ([]byte, error) { return f.kind.ServedJSON(rec) }

func (f customFormat) parts(_ []byte, rec *store.Record, _ schema.GroupVersionKind) (head, body, tail []byte, err error) {
	body, err = f.raw(rec)
	return nil, body, newline, err
}

func (f customFormat) item(schema.GroupVersionKind) itemWriter {
	return func(out, item []byte, first bool) (_, rest []byte) { return separated(out, first), item }
}

func (f customFormat) list(page *api.Page, _ int, kind schema.GroupVersionKind) (head, tail []byte, err error) {
	m := listMeta(page)
	list := unstructured.UnstructuredList{}
	list.SetResourceVersion(m.ResourceVersion)
	list.SetContinue(m.Continue)
	list.SetRemainingItemCount(m.RemainingItemCount)
	meta, err := api.EncodeJSON(&unstructured.Unstructured{Object: list.Object})
	if err != nil {
		return nil, nil, err
	}
	head = []byte(`{"apiVersion":"` + kind.GroupVersion().String() + `","items":[`)
	return head, slices.Concat([]byte(`],"kind":"`+f.listKind+`",`), meta[1:], newline), nil
}

// formatFor is formatFor for custom resources, of which there is no protobuf: clients that would rather have that get what they accept next. It gives nil where
// upstream's handler has to write the objects.
func (s *served) formatFor(accept string) format {
	for part := range strings.SplitSeq(accept, ",") {
		switch strings.TrimSpace(part) {
		case runtime.ContentTypeProtobuf, runtime.ContentTypeProtobuf + ";stream=watch":
			continue
		case runtime.ContentTypeJSON:
		case "", "*/*":
			if len(part) != len(accept) { // others, which may be more to the point
				return nil
			}
		default:
			return nil
		}
		return customFormat{kind: s.kind, listKind: s.listKind}
	}
	return nil
}

// covers says whether a request is for where the instances are: in a namespace, or in none. Those in namespaces can be listed across them.
func (s *served) covers(info *apirequest.RequestInfo) bool {
	switch {
	case !s.namespaced:
		return info.Namespace == ""
	case info.Namespace == "":
		return info.Verb == "list" || info.Verb == "watch"
	}
	return true
}
