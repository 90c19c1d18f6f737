package pieces

import (
	"bytes"
	"compress/gzip"
	"errors"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestStream reads streams of random pieces, the way each client does.
func TestStream(t *testing.T) {
	seeds := [2]uint64{rand.Uint64(), rand.Uint64()}
	t.Log("seeds", seeds)
	r := rand.New(rand.NewPCG(seeds[0], seeds[1]))
	for range 40 {
		var whole []byte
		var list []*Piece
		for range r.IntN(6) {
			raw := make([]byte, []int{0, 1, 100, 5_000, 70_000, 200_000}[r.IntN(6)])
			for i := range raw {
				raw[i] = byte(r.IntN(3))
			}
			whole = append(whole, raw...)
			if r.IntN(2) == 0 {
				list = append(list, Compress(raw))
			} else {
				list = append(list, Store(raw))
			}
			require.Equal(t, len(raw), list[len(list)-1].Size())
		}
		z, err := gzip.NewReader(bytes.NewReader(bytes.Join(Stream(list...), nil)))
		require.NoError(t, err)
		z.Multistream(false) // one member: some clients know no other
		got, err := io.ReadAll(z)
		require.NoError(t, err, "checksum and length are right")
		require.True(t, bytes.Equal(whole, got))
	}
}

func TestPower(t *testing.T) {
	require.EqualValues(t, one, power(0))
	for _, n := range []int{1, 2, 255, 70_000} {
		a, b := []byte("first"), bytes.Repeat([]byte{7}, n)
		require.Equal(t, crc32.ChecksumIEEE(append(a[:len(a):len(a)], b...)), multiply(crc32.ChecksumIEEE(a), power(n))^crc32.ChecksumIEEE(b))
	}
}

func TestCache(t *testing.T) {
	c := NewCache(20 * entryBytes)
	raw := func() ([]byte, error) { return []byte("bytes"), nil }
	e := c.Find("pods", []int64{1, 2})
	require.Nil(t, e.Piece())
	_, err := e.Make(func() ([]byte, error) { return nil, errors.New("no") })
	require.EqualError(t, err, "no")
	p, err := e.Make(raw)
	require.NoError(t, err)
	require.Same(t, p, c.Find("pods", []int64{1, 2}).Piece())
	for _, other := range []struct {
		source   string
		versions []int64
	}{{"services", []int64{1, 2}}, {"pods", []int64{2, 1}}, {"pods", []int64{1}}, {"pods", nil}} {
		require.Nil(t, c.Find(other.source, other.versions).Piece(), other)
	}
	for i := range int64(1000) { // the first is asked for all the time, and stays
		_, err := c.Find("pods", []int64{i, i}).Make(raw)
		require.NoError(t, err)
		require.Same(t, p, c.Find("pods", []int64{1, 2}).Piece())
		require.LessOrEqual(t, c.bytes, c.limit)
		require.Equal(t, c.recent.Len(), len(c.entries))
	}
	require.Nil(t, c.Find("pods", []int64{3, 3}).Piece(), "it had to go")
}

// TestCacheAtOnce makes a piece from many goroutines: it is made once, and one that is too large for the cache is made all the same.
func TestCacheAtOnce(t *testing.T) {
	c := NewCache(2 * entryBytes)
	made := 0
	e := c.Find("pods", []int64{1})
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			p, err := e.Make(func() ([]byte, error) {
				made++
				data := make([]byte, 4*entryBytes)
				for i := range data {
					data[i] = byte(rand.Uint32())
				}
				return data, nil
			})
			if err != nil || p.Size() != 4*entryBytes {
				panic("not the piece")
			}
		})
	}
	all.Wait()
	require.Equal(t, 1, made)
	require.Zero(t, c.bytes)
	require.Empty(t, c.entries)
}

func BenchmarkStream(b *testing.B) {
	p := Compress(bytes.Repeat([]byte("0123456789"), 7_000))
	list := make([]*Piece, 80)
	for i := range list {
		list[i] = p
	}
	for b.Loop() {
		Stream(list...)
	}
}
