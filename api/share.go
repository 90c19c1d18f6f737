package api

import (
	"bytes"
	"slices"
	"sync"

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

// specBuffers hold two encodings while they are compared.
var specBuffers = sync.Pool{New: func() any { return new([]byte) }}

// shareUnchanged lets the new version of an object share with the old one what did not change, since watches keep both for a while: the spec
// of a pod, which most of its writes leave alone. Both are immutable, or about to be.
func shareUnchanged(now, old runtime.Object) {
	a, ok := now.(*corev1.Pod)
	b, same := old.(*corev1.Pod)
	if !ok || !same {
		return
	}
	n := a.Spec.Size()
	if n != b.Spec.Size() {
		return
	}
	held := specBuffers.Get().(*[]byte)
	defer specBuffers.Put(held)
	*held = slices.Grow((*held)[:0], 2*n)
	x, y := (*held)[:n], (*held)[n:2*n]
	_, errX := a.Spec.MarshalToSizedBuffer(x)
	_, errY := b.Spec.MarshalToSizedBuffer(y)
	if errX == nil && errY == nil && bytes.Equal(x, y) {
		a.Spec = b.Spec
	}
}
