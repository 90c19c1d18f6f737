package pebble

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"knarr/store"
)

// See FORMAT.md.
const (
	metaPrefix = "\x00"
	keyFormat  = metaPrefix + "format"
	keyReserve = metaPrefix + "reserved" // revisions up to this may have been given out
	keyClean   = metaPrefix + "clean"    // last revision; present after a clean stop only
	keyDeleted = metaPrefix + "deleted"  // + table prefix: revision of its last deletion

	formatName = "knarr store 1"

	valueVersion = 1
	headerSize   = 1 + 3*8
)

// appendValue appends the stored form of a write.
func appendValue(dst []byte, w *store.Write) []byte {
	dst = append(dst, valueVersion)
	dst = binary.BigEndian.AppendUint64(dst, uint64(w.CreateRevision))
	dst = binary.BigEndian.AppendUint64(dst, uint64(w.Revision))
	expires := int64(0)
	if !w.Expires.IsZero() {
		expires = w.Expires.UnixNano()
	}
	dst = binary.BigEndian.AppendUint64(dst, uint64(expires))
	return append(dst, w.Value...)
}

// parseValue is the reverse; the entry's Value is a part of data.
func parseValue(key string, data []byte) (store.Entry, error) {
	if len(data) < headerSize {
		return store.Entry{}, fmt.Errorf("the value has %d bytes, less than its header of %d", len(data), headerSize)
	}
	if data[0] != valueVersion {
		return store.Entry{}, fmt.Errorf("value version %d is unknown; was it written by a newer knarr?", data[0])
	}
	e := store.Entry{
		Key:            key,
		CreateRevision: int64(binary.BigEndian.Uint64(data[1:])),
		Revision:       int64(binary.BigEndian.Uint64(data[9:])),
		Value:          data[headerSize:],
	}
	if e.CreateRevision <= 0 || e.Revision < e.CreateRevision {
		return store.Entry{}, fmt.Errorf("revision %d of an object created at %d cannot be", e.Revision, e.CreateRevision)
	}
	if ns := int64(binary.BigEndian.Uint64(data[17:])); ns != 0 {
		e.Expires = time.Unix(0, ns)
	}
	return e, nil
}

func revisionBytes(rev int64) []byte { return binary.BigEndian.AppendUint64(nil, uint64(rev)) }

func parseRevision(data []byte) (int64, error) {
	if len(data) != 8 {
		return 0, errors.New("a stored revision does not have 8 bytes")
	}
	return int64(binary.BigEndian.Uint64(data)), nil
}
