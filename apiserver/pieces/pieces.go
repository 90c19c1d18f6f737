package pieces

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"math"
	"sync"

	"github.com/klauspost/compress/flate"
)

// level is the compression: of a list of pods, it takes the time of the fastest and makes a sixth less of them.
const level = 3

// Piece is a part of a stream. Immutable.
type Piece struct {
	data []byte // blocks
	size int    // bytes that they stand for
	sum  uint32 // CRC-32 of those
	past uint32 // power(size)
}

func newPiece(data, raw []byte) *Piece {
	return &Piece{data: data, size: len(raw), sum: crc32.ChecksumIEEE(raw), past: power(len(raw))}
}

// Size is the number of bytes that the piece stands for.
func (p *Piece) Size() int { return p.size }

var writers = sync.Pool{New: func() any {
	w, err := flate.NewWriter(nil, level)
	if err != nil {
		panic(err) // the level is wrong
	}
	return w
}}

// Compress makes a piece of raw bytes, which it does not keep.
func Compress(raw []byte) *Piece {
	w := writers.Get().(*flate.Writer)
	defer writers.Put(w)
	var out bytes.Buffer // its writes do not fail
	w.Reset(&out)
	_, _ = w.Write(raw)
	_ = w.Flush()
	return newPiece(bytes.Clone(out.Bytes()), raw)
}

// Store makes a piece of raw bytes as they are, for what is used once.
func Store(raw []byte) *Piece {
	var data []byte
	for rest := raw; len(rest) > 0; {
		n := min(len(rest), math.MaxUint16)
		data = append(append(data, storedBlock(n)...), rest[:n]...)
		rest = rest[n:]
	}
	return newPiece(data, raw)
}

// storedBlock begins a block of n bytes that are not compressed, which is not the last: three bits of type up to the end of a byte, the length, its complement.
func storedBlock(n int) []byte {
	return binary.LittleEndian.AppendUint16(binary.LittleEndian.AppendUint16([]byte{0}, uint16(n)), ^uint16(n))
}

// header begins a stream: DEFLATE, no name, no time, no flags, made by an unknown system.
var header = []byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff}

// lastBlock is empty and says that no other follows.
var lastBlock = []byte{1, 0, 0, 0xff, 0xff}

// Stream gives the parts of the gzip stream of some pieces, to be sent one after the other and not to be changed.
func Stream(list ...*Piece) [][]byte {
	parts := append(make([][]byte, 0, len(list)+2), header)
	var sum, size uint32
	for _, p := range list {
		sum = multiply(sum, p.past) ^ p.sum
		size += uint32(p.size)
		parts = append(parts, p.data)
	}
	trailer := binary.LittleEndian.AppendUint32(append(make([]byte, 0, len(lastBlock)+8), lastBlock...), sum)
	return append(parts, binary.LittleEndian.AppendUint32(trailer, size))
}

// A CRC-32 is a polynomial over two elements, modulo crc32.IEEE. The highest bit is the coefficient of x^0. That of two parts, one after the other, is that of the
// first times x^(8 * length of the second), plus that of the second.
const (
	one   = 1 << 31       // x^0
	eight = 1 << (31 - 8) // x^8, a byte
)

// multiply gives the product of two polynomials.
func multiply(a, b uint32) (product uint32) {
	for ; a != 0; a <<= 1 {
		if a&one != 0 {
			product ^= b
		}
		if b = b>>1 ^ crc32.IEEE*(b&1); b == 0 {
			break
		}
	}
	return product
}

// power gives x^(8n).
func power(n int) uint32 {
	product, square := uint32(one), uint32(eight)
	for ; n > 0; n >>= 1 {
		if n&1 != 0 {
			product = multiply(product, square)
		}
		square = multiply(square, square)
	}
	return product
}
