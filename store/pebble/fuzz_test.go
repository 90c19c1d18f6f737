package pebble

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"knarr/store"
)

// FuzzValue reads any bytes as a value of the engine. What can be read is written back as the same bytes.
func FuzzValue(f *testing.F) {
	for _, e := range []store.Write{{Revision: 7, CreateRevision: 3, Value: []byte("k8s\x00")}, {Revision: 1, CreateRevision: 1, Expires: time.Unix(5, 6)}} {
		data := appendValue(nil, &e)
		f.Add(data)
		f.Add(data[:len(data)-1])
		f.Add(append([]byte{data[0] + 1}, data[1:]...))
	}
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := parseValue("k", data)
		if err != nil {
			return
		}
		require.Equal(t, data, appendValue(nil, &store.Write{Revision: e.Revision, CreateRevision: e.CreateRevision, Expires: e.Expires, Value: e.Value}))
		require.Positive(t, e.CreateRevision)
		require.LessOrEqual(t, e.CreateRevision, e.Revision)
	})
}
