package h2

import (
	"errors"
	"io"
	"net/http"
	"sync"
)

// errBodyClosed is what a read of a body after its Close gives.
var errBodyClosed = http.ErrBodyReadAfterClose

// body is a request's body: what the client has sent and the handler has not read. Its size is bounded by the stream's
// receive window.
type body struct {
	// taken is told how many bytes the handler has read, for the client may send as many more. May be called after the end.
	taken func(n int)
	// wanted is called once before the first read that finds nothing: a client that asked for it is told to send.
	wanted func()

	mu     sync.Mutex
	data   sync.Cond // L is mu
	bytes  []byte    // guarded by mu; from read on
	read   int       // guarded by mu
	err    error     // guarded by mu: what follows bytes; nil while more may come
	closed bool      // guarded by mu
}

func newBody(taken func(int), wanted func()) *body {
	b := &body{taken: taken, wanted: wanted}
	b.data.L = &b.mu
	return b
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	b.mu.Lock()
	for b.read == len(b.bytes) && b.err == nil && !b.closed {
		if b.wanted != nil {
			wanted := b.wanted
			b.wanted = nil
			b.mu.Unlock()
			wanted()
			b.mu.Lock()
			continue
		}
		b.data.Wait()
	}
	if b.closed {
		b.mu.Unlock()
		return 0, errBodyClosed
	}
	n := copy(p, b.bytes[b.read:])
	b.read += n
	err := b.err
	if b.read < len(b.bytes) || n > 0 && !errors.Is(err, io.EOF) {
		err = nil
	}
	if b.read == len(b.bytes) {
		b.bytes, b.read = b.bytes[:0], 0
	}
	b.mu.Unlock()
	if n > 0 {
		b.taken(n)
	}
	return n, err
}

// TakeWhole gives what is left of a body that has come completely, without copying it; the bytes are the caller's, and a later read finds the
// end. False, and nothing is taken, where more may come, the body was broken off, or it is closed.
func (b *body) TakeWhole() ([]byte, bool) {
	b.mu.Lock()
	if b.closed || !errors.Is(b.err, io.EOF) {
		b.mu.Unlock()
		return nil, false
	}
	data := b.bytes[b.read:]
	b.bytes, b.read = nil, 0
	b.mu.Unlock()
	if len(data) > 0 {
		b.taken(len(data))
	}
	return data, true
}

// Close implements io.Closer: what was not read is thrown away.
func (b *body) Close() error {
	b.mu.Lock()
	n := len(b.bytes) - b.read
	b.bytes, b.read, b.closed = nil, 0, true
	b.data.Broadcast()
	b.mu.Unlock()
	if n > 0 {
		b.taken(n)
	}
	return nil
}

// add takes what the client sent; false when nobody will read it.
func (b *body) add(p []byte) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed || b.err != nil {
		return false
	}
	b.bytes = append(b.bytes, p...)
	b.data.Broadcast()
	return true
}

// end says what follows the bytes: io.EOF, or why there is no more. The first counts.
func (b *body) end(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err == nil {
		b.err = err
	}
	b.data.Broadcast()
}

// ended reports whether the client has sent everything.
func (b *body) ended() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err != nil
}
