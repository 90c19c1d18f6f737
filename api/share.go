package api

import (
	"bytes"
	"slices"
	"sync"

	"google.golang.org/protobuf/encoding/protowire"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// maxFieldSets bounds the descriptions of managed fields that are known for sharing, maxFieldSetBytes the size of one: 4 MiB in all.
const (
	maxFieldSets     = 1024
	maxFieldSetBytes = 4 << 10
)

// Names that are known for sharing, and the bytes of one at most.
const maxNames, maxNameBytes = 1024, 128

// fieldSets are descriptions of managed fields, one of each. Objects that the same program made have the same: of 5,000 pods of one
// workload, 5,000 copies of about 700 bytes otherwise. It is safe for concurrent use.
type fieldSets struct {
	mu    sync.Mutex
	known map[string]*metav1.FieldsV1 // guarded by mu
}

var sharedFields = fieldSets{known: map[string]*metav1.FieldsV1{}}

// share gives a description equal to f that nobody may change. When too many are known all are forgotten: those in use are simply not
// shared any more.
func (s *fieldSets) share(f *metav1.FieldsV1) *metav1.FieldsV1 {
	//lint:ignore SA1019 the functions that replace the field copy it
	raw := f.Raw
	if len(raw) == 0 || len(raw) > maxFieldSetBytes {
		return f
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if have, ok := s.known[string(raw)]; ok {
		return have
	}
	if len(s.known) >= maxFieldSets {
		clear(s.known)
	}
	s.known[string(raw)] = f
	return f
}

// names are strings that many objects have: of programs, versions, namespaces, phases.
type names struct {
	mu    sync.Mutex
	known map[string]string // guarded by mu
}

var sharedNames = names{known: map[string]string{}}

// named replaces a string by an equal one that is known. to.mu is held.
func named[S ~string](to *names, s *S) {
	if *s == "" || len(*s) > maxNameBytes {
		return
	}
	have, ok := to.known[string(*s)]
	if !ok {
		if len(to.known) >= maxNames {
			clear(to.known)
		}
		have = string(*s)
		to.known[have] = have
	}
	*s = S(have)
}

// shareParts lets an object that is about to become immutable share with others what they have in common, but for labels, which the store lets the
// objects of a table share.
func shareParts(obj runtime.Object) {
	m, err := meta.Accessor(obj)
	if err != nil {
		return
	}
	entries := m.GetManagedFields()
	for i := range entries {
		if f := entries[i].FieldsV1; f != nil {
			entries[i].FieldsV1 = sharedFields.share(f)
		}
	}
	to := &sharedNames
	to.mu.Lock()
	defer to.mu.Unlock()
	nameMeta(to, m, entries)
	if pod, ok := obj.(*corev1.Pod); ok {
		nameStatus(to, &pod.Status)
	}
}

// nameMeta and nameStatus replace strings by known ones. to.mu is held.
func nameMeta(to *names, m metav1.Object, entries []metav1.ManagedFieldsEntry) {
	space := m.GetNamespace()
	named(to, &space)
	m.SetNamespace(space)
	for i := range entries {
		e := &entries[i]
		named(to, &e.Manager)
		named(to, &e.Operation)
		named(to, &e.APIVersion)
		named(to, &e.FieldsType)
		named(to, &e.Subresource)
	}
}

func nameStatus(to *names, s *corev1.PodStatus) {
	named(to, &s.Phase)
	named(to, &s.QOSClass)
	named(to, &s.HostIP)
	for i := range s.Conditions {
		c := &s.Conditions[i]
		named(to, &c.Type)
		named(to, &c.Status)
		named(to, &c.Reason)
	}
	for i := range s.ContainerStatuses {
		c := &s.ContainerStatuses[i]
		named(to, &c.Name)
		named(to, &c.Image)
		named(to, &c.ImageID)
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
	shareParts(pod)
	settle(pod)
	return pod
}

// shareSpec lets a new version of a pod have the old one's spec where it is the same, as reread does, and says whether it does. data is
// the new version's encoding.
func shareSpec(out, old runtime.Object, data []byte) bool {
	pod, ok := out.(*corev1.Pod)
	if !ok {
		return false
	}
	was, ok := old.(*corev1.Pod)
	if !ok {
		return false
	}
	parts := podParts(data)
	same := parts != nil && isSpec(parts[1], &was.Spec)
	if same {
		pod.Spec = was.Spec
	}
	return same
}

// storedMagic begins stored bytes in protobuf; a message follows whose field rawField is the object's own, which of a pod has podFields fields:
// metadata, spec and status.
var storedMagic = []byte("k8s\x00")

const rawField, podFields = 2, 3

// podParts takes the encoding of a pod apart: nil for bytes other than our own encoder's.
func podParts(data []byte) [][]byte {
	if parts, ok := embedded(ownBytes(data)); ok && len(parts) == podFields {
		return parts
	}
	return nil
}

// embedded gives the fields of a message that has only embedded messages, bytes and strings, once each and in order.
func embedded(message []byte) (fields [][]byte, ok bool) {
	fields = make([][]byte, 0, podFields)
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
