package h2

import (
	"strings"

	"golang.org/x/net/http/httpguts"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// keptFields is from how many on the fields of a block are not kept for the next.
const keptFields = 64

// block is the header block of a request, or its trailers. A connection has one, for one after another.
type block struct {
	pseudo
	fields    []hpack.HeaderField // all but the pseudo-header fields
	truncated bool                // there were more than the connection's bound allows

	framer  *http2.Framer
	decoder *hpack.Decoder
	bound   int  // of the fields' sizes as RFC 9113, section 6.5.2, counts them
	left    int  // of it
	invalid bool // RFC 9113, section 8.2.1, forbids a field, or section 8.3 where it stands: no more of the block is looked at
	odd     bool // a pseudo-header field is there twice, or none of requests
}

func newBlock(framer *http2.Framer, bound uint32) *block {
	b := &block{framer: framer, decoder: hpack.NewDecoder(tableBytes, nil), bound: int(bound)}
	b.decoder.SetMaxStringLength(b.bound)
	b.decoder.SetEmitFunc(b.add)
	return b
}

// read decodes the block that f begins, with the frames that continue it. A returned error is for conn.survives. Also what nobody will look at is
// decoded, as the blocks after it build on it, unless the client sends far more than it was told it may.
func (b *block) read(f *http2.HeadersFrame) error {
	b.pseudo, b.fields, b.left = pseudo{}, b.fields[:0], b.bound
	b.truncated, b.invalid, b.odd = false, false, false
	b.decoder.SetEmitEnabled(true)
	id := f.StreamID
	fragment, ended := f.HeaderBlockFragment(), f.HeadersEnded()
	for {
		if b.invalid || b.truncated && len(fragment) > 0 || len(fragment) > 2*(b.left+b.bound) {
			return http2.ConnectionError(http2.ErrCodeProtocol)
		}
		if _, err := b.decoder.Write(fragment); err != nil {
			return http2.ConnectionError(http2.ErrCodeCompression)
		}
		if ended {
			break
		}
		next, err := b.framer.ReadFrame()
		if err != nil {
			return err
		}
		more := next.(*http2.ContinuationFrame) // the framer lets nothing else follow
		fragment, ended = more.HeaderBlockFragment(), more.HeadersEnded()
	}
	if err := b.decoder.Close(); err != nil {
		return http2.ConnectionError(http2.ErrCodeCompression)
	}
	if b.invalid || b.odd {
		return http2.StreamError{StreamID: id, Code: http2.ErrCodeProtocol, Cause: errMalformed}
	}
	return nil
}

// add takes one field.
func (b *block) add(f hpack.HeaderField) {
	size := int(f.Size())
	if f.Name == "trailer" {
		size += strings.Count(f.Value, ",") * int(hpack.HeaderField{}.Size()) // each name becomes an entry
	}
	pseudo := f.IsPseudo()
	b.invalid = !httpguts.ValidHeaderFieldValue(f.Value) || pseudo && len(b.fields) > 0 || !pseudo && !isWireName(f.Name)
	b.truncated = size > b.left
	switch {
	case b.invalid || b.truncated:
		b.decoder.SetEmitEnabled(false)
		return
	case pseudo:
		b.odd = !b.pseudo.set(f) || b.odd
	default:
		b.fields = append(b.fields, f)
	}
	b.left -= size
}

// forget lets go of what was read.
func (b *block) forget() {
	b.pseudo = pseudo{}
	clear(b.fields)
	if cap(b.fields) > keptFields {
		b.fields = nil
	}
}

// isWireName reports whether a field may have this name: RFC 9113, section 8.2.1.
func isWireName(name string) bool {
	if _, known := canonicalNames[name]; known {
		return true
	}
	for _, r := range name {
		if !httpguts.IsTokenRune(r) || 'A' <= r && r <= 'Z' {
			return false
		}
	}
	return name != ""
}
