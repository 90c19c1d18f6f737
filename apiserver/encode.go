package apiserver

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/bits"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"

	"knarr/api"
	"knarr/store"
)

// A format writes stored objects in one media type. What it keeps per object is the object's own bytes, made once and
// shared by every get, list and watch; envelopes, lists and frames are put around them.
type format interface {
	// contentType is the media type of single objects and lists; streamType that of watches.
	contentType() string
	streamType() string
	// name is what records cache the bytes of raw by.
	name() string
	// parts give one object as a whole response: its own bytes and what stands around them, the head appended to scratch.
	parts(scratch []byte, rec *store.Record, kind schema.GroupVersionKind) (head, body, tail []byte, err error)
	// item makes what writes an object's own bytes into a list; inList is how many bytes that takes, where list needs to know.
	item(kind schema.GroupVersionKind) itemWriter
	inList(item []byte) int
	// list gives what stands around the items of a list, which are size bytes by inList.
	list(page *api.Page, size int, kind schema.GroupVersionKind) (head, tail []byte, err error)
	// event appends one frame of a watch; obj is what encodes the object.
	event(out []byte, kind watch.EventType, obj []byte, gvk schema.GroupVersionKind) []byte
	// raw gives the object's own bytes as event wants them.
	raw(rec *store.Record) ([]byte, error)
	// encode makes the bytes that raw gives, for an object that is not in a table.
	encode(obj runtime.Object) ([]byte, error)
}

// An itemWriter appends what stands before an object's bytes in a list, and gives those that are sent. It keeps nothing.
type itemWriter func(out, item []byte, first bool) (_, rest []byte)

// listMeta is a list's metadata.
func listMeta(page *api.Page) metav1.ListMeta {
	return metav1.ListMeta{ResourceVersion: fmt.Sprint(page.Revision), Continue: page.Continue, RemainingItemCount: page.Remaining}
}

// jsonFormat is application/json. An object's bytes are its JSON with kind and apiVersion in front, without the final newline.
type jsonFormat struct{}

func (jsonFormat) contentType() string { return runtime.ContentTypeJSON }
func (jsonFormat) streamType() string  { return runtime.ContentTypeJSON }
func (jsonFormat) name() string        { return runtime.ContentTypeJSON }

func (jsonFormat) encode(obj runtime.Object) ([]byte, error) { return json.Marshal(obj) }

func (f jsonFormat) raw(rec *store.Record) ([]byte, error) {
	return rec.Encoding(runtime.ContentTypeJSON, func() ([]byte, error) { return f.encode(rec.Object) })
}

var newline = []byte{'\n'}

func (f jsonFormat) parts(_ []byte, rec *store.Record, _ schema.GroupVersionKind) (head, body, tail []byte, err error) {
	body, err = f.raw(rec)
	return nil, body, newline, err
}

// typePrefix is how the JSON of every object of a kind begins; the items of a list lack it.
func typePrefix(gvk schema.GroupVersionKind) []byte {
	return []byte(`{"kind":"` + gvk.Kind + `","apiVersion":"` + gvk.GroupVersion().String() + `",`)
}

func (jsonFormat) item(kind schema.GroupVersionKind) itemWriter {
	prefix := typePrefix(kind)
	return func(out, item []byte, first bool) (_, rest []byte) {
		out = separated(out, first)
		if rest, ok := bytes.CutPrefix(item, prefix); ok {
			return append(out, '{'), rest
		}
		return out, item
	}
}

// separated appends what stands between items.
func separated(out []byte, first bool) []byte {
	if first {
		return out
	}
	return append(out, ',')
}

func (jsonFormat) inList([]byte) int { return 0 }

func (jsonFormat) list(page *api.Page, _ int, kind schema.GroupVersionKind) (head, tail []byte, err error) {
	meta, err := json.Marshal(listMeta(page))
	if err != nil {
		return nil, nil, err
	}
	head = slices.Concat([]byte(`{"kind":"`+kind.Kind+`List","apiVersion":"`+kind.GroupVersion().String()+`","metadata":`), meta, []byte(`,"items":[`))
	return head, []byte("]}\n"), nil
}

func (jsonFormat) event(out []byte, kind watch.EventType, obj []byte, _ schema.GroupVersionKind) []byte {
	out = append(out, `{"type":"`+string(kind)+`","object":`...)
	return append(append(out, obj...), "}\n"...)
}

// protoFormat is application/vnd.kubernetes.protobuf: https://kubernetes.io/docs/reference/using-api/api-concepts/#protobuf-encoding.
// An object's bytes are its bare message; the envelope (magic number, runtime.Unknown with type and message) is put around it.
type protoFormat struct{}

// protoMagic begins every enveloped message.
var protoMagic = []byte{'k', '8', 's', 0}

// Field tags of length-delimited fields one and two of any message, and the empty fields three and four of runtime.Unknown.
const (
	tagOne   = 0x0a
	tagTwo   = 0x12
	tagThree = 0x1a
	tagFour  = 0x22
)

func (protoFormat) contentType() string { return runtime.ContentTypeProtobuf }
func (protoFormat) streamType() string  { return runtime.ContentTypeProtobuf + ";stream=watch" }
func (protoFormat) name() string        { return runtime.ContentTypeProtobuf }

func (protoFormat) encode(obj runtime.Object) ([]byte, error) {
	m, ok := obj.(interface{ Marshal() ([]byte, error) })
	if !ok {
		return nil, fmt.Errorf("%T has no protobuf form", obj)
	}
	return m.Marshal()
}

func (f protoFormat) raw(rec *store.Record) ([]byte, error) {
	return rec.Encoding(runtime.ContentTypeProtobuf, func() ([]byte, error) { return f.encode(rec.Object) })
}

func (f protoFormat) parts(scratch []byte, rec *store.Record, kind schema.GroupVersionKind) (head, body, tail []byte, err error) {
	if body, err = f.raw(rec); err != nil {
		return nil, nil, nil, err
	}
	return openEnvelope(scratch, kind, len(body)), body, closeEnvelope, nil
}

// openEnvelope appends an envelope up to the message of size bytes.
func openEnvelope(out []byte, kind schema.GroupVersionKind, size int) []byte {
	version := kind.GroupVersion().String()
	out = append(out, protoMagic...)
	out = append(out, tagOne)
	out = binary.AppendUvarint(out, uint64(fieldSize(len(version))+fieldSize(len(kind.Kind))))
	out = appendField(out, tagOne, []byte(version))
	out = appendField(out, tagTwo, []byte(kind.Kind))
	out = append(out, tagTwo)
	return binary.AppendUvarint(out, uint64(size))
}

// closeEnvelope are the envelope's empty content encoding and type, which upstream writes too.
var closeEnvelope = []byte{tagThree, 0, tagFour, 0}

// appendEnveloped appends a whole message in its envelope.
func appendEnveloped(out []byte, kind schema.GroupVersionKind, message []byte) []byte {
	return append(append(openEnvelope(out, kind, len(message)), message...), closeEnvelope...)
}

// envelopeSize is the size of an envelope around a message of size bytes.
func envelopeSize(kind schema.GroupVersionKind, size int) int {
	types := fieldSize(len(kind.GroupVersion().String())) + fieldSize(len(kind.Kind))
	return len(protoMagic) + fieldSize(types) + fieldSize(size) + len(closeEnvelope)
}

func appendField(out []byte, tag byte, data []byte) []byte {
	return append(binary.AppendUvarint(append(out, tag), uint64(len(data))), data...)
}

// fieldSize is the size of a length-delimited field with a one-byte tag.
func fieldSize(n int) int { return 1 + uvarintSize(n) + n }

func uvarintSize(n int) int { return (bits.Len64(uint64(n)|1) + 6) / 7 }

func (protoFormat) item(schema.GroupVersionKind) itemWriter {
	return func(out, item []byte, _ bool) (_, rest []byte) {
		return binary.AppendUvarint(append(out, tagTwo), uint64(len(item))), item
	}
}

func (protoFormat) inList(item []byte) int { return fieldSize(len(item)) }

func (protoFormat) list(page *api.Page, size int, kind schema.GroupVersionKind) (head, tail []byte, err error) {
	m := listMeta(page)
	meta, err := m.Marshal()
	if err != nil {
		return nil, nil, err
	}
	kind.Kind += "List"
	return appendField(openEnvelope(nil, kind, fieldSize(len(meta))+size), tagOne, meta), closeEnvelope, nil
}

// event appends a length-prefixed metav1.WatchEvent whose object is an enveloped message.
func (protoFormat) event(out []byte, kind watch.EventType, obj []byte, gvk schema.GroupVersionKind) []byte {
	enveloped := envelopeSize(gvk, len(obj))
	extension := fieldSize(enveloped)
	out = binary.BigEndian.AppendUint32(out, uint32(fieldSize(len(kind))+fieldSize(extension)))
	out = appendField(out, tagOne, []byte(kind))
	out = binary.AppendUvarint(append(out, tagTwo), uint64(extension))
	out = binary.AppendUvarint(append(out, tagOne), uint64(enveloped))
	return appendEnveloped(out, gvk, obj)
}

// formatFor picks the format that a client prefers, nil where that is anything but a plain object: a table, metadata
// alone, YAML, several acceptable types with weights, pretty-printing.
func formatFor(accept string) format {
	for part := range strings.SplitSeq(accept, ",") {
		switch strings.TrimSpace(part) {
		case runtime.ContentTypeJSON, "*/*", "":
			return jsonFormat{}
		case runtime.ContentTypeProtobuf, runtime.ContentTypeProtobuf + ";stream=watch":
			return protoFormat{}
		}
		return nil
	}
	return jsonFormat{}
}
