package h2

import (
	"errors"
	"io"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestTakeWhole(t *testing.T) {
	for _, c := range []struct {
		name  string
		read  int   // bytes read before
		end   error // nil: more may come
		close bool
		want  string
		ok    bool
	}{
		{name: "whole", end: io.EOF, want: "knarr", ok: true},
		{name: "begun", read: 2, end: io.EOF, want: "arr", ok: true},
		{name: "read", read: 5, end: io.EOF, ok: true},
		{name: "more may come"},
		{name: "broken off", end: errors.New("reset")},
		{name: "closed", end: io.EOF, close: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			told := 0
			b := newBody(func(n int) { told += n }, nil)
			require.True(t, b.add([]byte("kna")))
			require.True(t, b.add([]byte("rr")))
			if c.end != nil {
				b.end(c.end)
			}
			n, err := io.ReadFull(b, make([]byte, c.read))
			require.NoError(t, err)
			require.Equal(t, c.read, n)
			if c.close {
				require.NoError(t, b.Close())
			}
			data, ok := b.TakeWhole()
			require.Equal(t, c.ok, ok)
			require.Equal(t, c.want, string(data))
			if !ok {
				return
			}
			require.Equal(t, 5, told, "the client may send as much again")
			n, err = b.Read(make([]byte, 1))
			require.Zero(t, n)
			require.Equal(t, io.EOF, err)
			again, ok := b.TakeWhole()
			require.True(t, ok)
			require.Empty(t, again)
		})
	}
}
