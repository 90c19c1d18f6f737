package api

import (
	"bytes"
	"strconv"

	"google.golang.org/protobuf/encoding/protowire"
	"k8s.io/apimachinery/pkg/runtime"

	"knarr/store"
)

// keeping is memory that a serializer encodes into, and then where it writes that to: one copy less than into a buffer that grows.
type keeping struct{ room, data []byte }

var _ runtime.MemoryAllocator = (*keeping)(nil)

// Allocate implements runtime.MemoryAllocator.
func (k *keeping) Allocate(n uint64) []byte {
	k.room = make([]byte, n)
	return k.room
}

// Write implements io.Writer. It keeps the memory that it gave.
func (k *keeping) Write(data []byte) (int, error) {
	if n := len(data); k.data == nil && n > 0 && len(k.room) >= n && &data[0] == &k.room[0] {
		k.data = data[:n:n]
	} else {
		k.data = append(k.data, data...)
	}
	return len(data), nil
}

// encoder makes a kind's encoder of a serializer.
func encoder(s runtime.Serializer) func(runtime.Object) ([]byte, error) {
	with, ok := s.(runtime.EncoderWithAllocator)
	if !ok {
		return func(obj runtime.Object) ([]byte, error) { return runtime.Encode(s, obj) }
	}
	return func(obj runtime.Object) ([]byte, error) {
		var k keeping
		err := with.EncodeWithAllocator(obj, &k, &k)
		return k.data, err
	}
}

// ownBytes gives an object's own bytes of its stored encoding in protobuf; nil of what is none.
func ownBytes(data []byte) []byte {
	raw, ok := bytes.CutPrefix(data, storedMagic)
	if !ok {
		return nil
	}
	size := fieldOf(raw) // the type
	if size < 0 {
		return nil
	}
	number, typ, n := protowire.ConsumeTag(raw[size:])
	if n < 0 || typ != protowire.BytesType || number != rawField {
		return nil
	}
	own, m := protowire.ConsumeBytes(raw[size+n:])
	if m < 0 {
		return nil
	}
	return own
}

// Numbers of fields in protobuf: of an object its metadata, of the metadata the resource version.
const metadataField, versionField = 1, 6

// Message gives the stored object as its method Marshal would, from the bytes that were made of it for the store, which lack nothing but its resource
// version. It is nil where it cannot tell, and must be called for rec, which the write gave, only.
func (o *Outcome) Message(rec *store.Record) []byte {
	if o.message == nil || rec != o.Record {
		return nil
	}
	return revised(o.message, rec.Revision)
}

// revised puts a resource version into an object's bytes; nil for what has one already or does not begin with metadata as our own encoder's.
func revised(object []byte, revision int64) []byte {
	number, typ, n := protowire.ConsumeTag(object)
	if n < 0 || typ != protowire.BytesType || number != metadataField {
		return nil
	}
	meta, m := protowire.ConsumeBytes(object[n:])
	if m < 0 {
		return nil
	}
	rest, head := object[n+m:], 0
	for range versionField - 1 {
		size := fieldOf(meta[head:])
		if size < 0 {
			return nil
		}
		head += size
	}
	number, typ, n = protowire.ConsumeTag(meta[head:])
	if n < 0 || typ != protowire.BytesType || number != versionField || len(meta) == head+n || meta[head+n] != 0 {
		return nil
	}
	var digits [20]byte
	version := strconv.AppendInt(digits[:0], revision, 10)
	size := len(meta) + len(version) // its length has one byte, as that of nothing
	out := make([]byte, 0, protowire.SizeTag(metadataField)+protowire.SizeBytes(size)+len(rest))
	out = protowire.AppendTag(out, metadataField, protowire.BytesType)
	out = protowire.AppendVarint(out, uint64(size))
	out = append(out, meta[:head+n]...)
	out = protowire.AppendBytes(out, version)
	out = append(out, meta[head+n+1:]...)
	return append(out, rest...)
}

// fieldOf is the size of the field with which a message begins; negative for none.
func fieldOf(message []byte) int {
	_, _, n := protowire.ConsumeField(message)
	return n
}
