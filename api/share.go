package api

import (
	"bytes"
	"slices"
	"sync"

	"google.golang.org/protobuf/encoding/protowire"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
)

// maxFieldSets bounds the descriptions of managed fields that are known for sharing, maxFieldSetBytes the size of one: 4 MiB in all.
const (
	maxFieldSets     = 1024
	maxFieldSetBytes = 4 << 10
)

// fieldSets are descriptions of managed fields, one of each. Objects that the same program made have the same: of 5,000 pods of one
// workload, 5,000 copies of about 700 bytes otherwise. It is safe for concurrent use.
type fieldSets struct {
	mu    sync.Mutex
	known map[string][]byte // guarded by mu
}

var sharedFields = fieldSets{known: map[string][]byte{}}

// share gives bytes equal to b that nobody may change. When too many are known all are forgotten: those in use are simply not shared any more.
func (s *fieldSets) share(b []byte) []byte {
	if len(b) == 0 || len(b) > maxFieldSetBytes {
		return b
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if have, ok := s.known[string(b)]; ok {
		return have
	}
	if len(s.known) >= maxFieldSets {
		clear(s.known)
	}
	s.known[string(b)] = b
	return b
}

// shareFields lets an object that is about to become immutable share its descriptions of managed fields with others.
func shareFields(obj runtime.Object) {
	m, err := meta.Accessor(obj)
	if err != nil {
		return
	}
	entries := m.GetManagedFields()
	for i := range entries {
		if f := entries[i].FieldsV1; f != nil {
			//lint:ignore SA1019 the functions that replace the field copy it
			f.Raw = sharedFields.share(f.Raw)
		}
	}
}

// specBuffers hold encodings while they are compared.
var specBuffers = sync.Pool{New: func() any { return new([]byte) }}

// reread gives what decoding a pod's stored bytes gives, but with the spec of the old pod, which most writes leave alone: nothing has to read it
// again, and the two versions, which watches keep both for a while, share it. It gives nil for another spec, and for bytes other than
// our own encoder's.
func (f *hubForm) reread(data []byte, old runtime.Object) *corev1.Pod {
	was, ok := old.(*corev1.Pod)
	if !ok {
		return nil
	}
	parts := podParts(data)
	if parts == nil || !isSpec(parts[1], &was.Spec) {
		return nil
	}
	pod := &corev1.Pod{}
	if pod.ObjectMeta.Unmarshal(parts[0]) != nil || pod.Status.Unmarshal(parts[2]) != nil {
		return nil
	}
	f.scheme.Default(pod)
	pod.Spec = was.Spec
	pod.SetGroupVersionKind(f.stored)
	shareFields(pod)
	settle(pod)
	return pod
}

// shareSpec lets a new version of a pod have the old one's spec where it is the same, as reread does. data is the new version's encoding.
func shareSpec(out, old runtime.Object, data []byte) {
	pod, ok := out.(*corev1.Pod)
	if !ok {
		return
	}
	was, ok := old.(*corev1.Pod)
	if !ok {
		return
	}
	if parts := podParts(data); parts != nil && isSpec(parts[1], &was.Spec) {
		pod.Spec = was.Spec
	}
}

// storedMagic begins stored bytes in protobuf; a message follows whose field rawField is the object's own, which of a pod has podFields fields:
// metadata, spec and status.
var storedMagic = []byte("k8s\x00")

const rawField, podFields = 2, 3

// podParts takes the encoding of a pod apart: nil for bytes other than our own encoder's.
func podParts(data []byte) [][]byte {
	raw, ok := bytes.CutPrefix(data, storedMagic)
	if !ok {
		return nil
	}
	outer, ok := embedded(raw)
	if !ok || len(outer) < rawField {
		return nil
	}
	if parts, ok := embedded(outer[rawField-1]); ok && len(parts) == podFields {
		return parts
	}
	return nil
}

// embedded gives the fields of a message that has only embedded messages, bytes and strings, once each and in order.
func embedded(message []byte) (fields [][]byte, ok bool) {
	for len(message) > 0 {
		number, typ, n := protowire.ConsumeTag(message)
		if n < 0 || typ != protowire.BytesType || int(number) != len(fields)+1 {
			return nil, false
		}
		field, m := protowire.ConsumeBytes(message[n:])
		if m < 0 {
			return nil, false
		}
		fields, message = append(fields, field), message[n+m:]
	}
	return fields, true
}

// isSpec says whether bytes are the encoding of a spec.
func isSpec(data []byte, spec *corev1.PodSpec) bool {
	if spec.Size() != len(data) {
		return false
	}
	held := specBuffers.Get().(*[]byte)
	defer specBuffers.Put(held)
	*held = slices.Grow((*held)[:0], len(data))[:len(data)]
	_, err := spec.MarshalToSizedBuffer(*held)
	return err == nil && bytes.Equal(*held, data)
}
