package h2

import (
	"crypto/tls"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Exchange is one request without a body, as it came off the wire, for Options.Fast. It and its fields are only good during that call.
type Exchange struct {
	// Method, Path (with the query) and Authority are the pseudo-header fields of those names.
	Method, Path, Authority string
	// Fields are the other header fields, their names in lower case.
	Fields []hpack.HeaderField
	// TLS and Remote are those of the connection, as http.Request has them.
	TLS    *tls.ConnectionState
	Remote string
	// Peer is kept for the connection, for what is worth remembering of it.
	Peer any

	conn *conn
	id   uint32
}

// Answer sends a whole answer: a header block, and a body in parts. False means that it cannot be sent now without waiting for the
// client, and nothing was.
func (e *Exchange) Answer(block []byte, now time.Time, parts ...[]byte) bool {
	size := 0
	for _, p := range parts {
		size += len(p)
	}
	c := e.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	if int64(size) > min(c.credit, c.initial) || len(c.out)+size > maxPending || c.err != nil || len(c.streams) >= c.server.MaxStreams {
		return false
	}
	c.lastUsed = now
	c.credit -= int64(size)
	c.beginLocked()
	c.out = appendHeaders(c.out, e.id, block, size == 0, c.frameSize)
	c.appendParts(e.id, size, parts)
	return true
}

// appendParts appends DATA frames that hold the parts one after another.
func (c *conn) appendParts(id uint32, size int, parts [][]byte) {
	for size > 0 {
		n := min(size, c.frameSize)
		size -= n
		flags := http2.Flags(0)
		if size == 0 {
			flags = http2.FlagDataEndStream
		}
		c.out = appendFrame(c.out, n, http2.FrameData, flags, id)
		for n > 0 {
			k := min(n, len(parts[0]))
			c.out = append(c.out, parts[0][:k]...)
			n -= k
			if parts[0] = parts[0][k:]; len(parts[0]) == 0 {
				parts = parts[1:]
			}
		}
	}
}
