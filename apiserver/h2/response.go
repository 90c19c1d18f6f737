package h2

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

// bufferBytes is how much of a body waits for more before it is sent, unless flushed.
const bufferBytes = 8 << 10

// headBytes is more than the header blocks of most answers have.
const headBytes = 384

// heads are for header blocks until they are sent.
var heads = sync.Pool{New: func() any { return new([headBytes]byte) }}

// giveHead gives a block back that is not needed any more; one that has grown is left to the collector.
func giveHead(block []byte) {
	if cap(block) == headBytes {
		heads.Put((*[headBytes]byte)(block[:headBytes]))
	}
}

// buffers are for the bodies of answers, of bufferBytes each.
var buffers = sync.Pool{New: func() any { b := make([]byte, 0, bufferBytes); return &b }}

// writer is the http.ResponseWriter of a stream. As any other, it is for one goroutine at a time.
type writer struct {
	stream *stream
	header http.Header
	isHead bool

	status   int    // 0: WriteHeader was not called
	block    []byte // encoded header; nil after it was sent
	declared int64  // content-length, -1 when not declared
	hasType  bool
	hasDate  bool
	sent     bool // the header
	ended    bool // the whole answer
	written  int64
	buffer   *[]byte // nil: empty
}

func newWriter(st *stream) *writer {
	return &writer{stream: st, header: http.Header{}, declared: -1, isHead: st.request != nil && st.request.Method == http.MethodHead}
}

// Header implements http.ResponseWriter.
func (w *writer) Header() http.Header { return w.header }

// WriteHeader implements http.ResponseWriter.
func (w *writer) WriteHeader(status int) {
	if status < 100 || status > 999 {
		panic(fmt.Sprintf("invalid WriteHeader code %v", status))
	}
	if w.status != 0 {
		return
	}
	if status < 200 {
		w.stream.conn.sendHeaders(w.stream, appendHeader(AppendStatus(nil, status), w.header), false)
		return
	}
	w.status = status
	w.hasType, w.hasDate = w.header["Content-Type"] != nil, w.header["Date"] != nil
	if v := w.header.Get("Content-Length"); v != "" {
		if n, err := strconv.ParseInt(v, 10, 64); err == nil && n >= 0 {
			w.declared = n
		} else {
			w.header.Del("Content-Length")
		}
	}
	if w.header.Get("Connection") == "close" {
		w.stream.conn.goAway(false)
	}
	w.block = appendHeader(AppendStatus(heads.Get().(*[headBytes]byte)[:0], status), w.header)
}

// bodyAllowed reports whether an answer of this status has a body: RFC 9110, section 6.4.1.
func (w *writer) bodyAllowed() bool {
	return w.status != http.StatusNoContent && w.status != http.StatusNotModified
}

// Write implements http.ResponseWriter.
func (w *writer) Write(p []byte) (int, error) { return w.write(p, "") }

// WriteString implements io.StringWriter.
func (w *writer) WriteString(s string) (int, error) { return w.write(nil, s) }

func (w *writer) write(p []byte, s string) (int, error) {
	if w.ended {
		return 0, errors.New("h2: the handler has returned")
	}
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	n := len(p) + len(s)
	if !w.bodyAllowed() {
		return 0, http.ErrBodyNotAllowed
	}
	w.written += int64(n)
	if w.declared >= 0 && w.written > w.declared {
		return 0, http.ErrContentLength
	}
	if w.isHead {
		return n, nil
	}
	if w.buffer == nil {
		w.buffer = buffers.Get().(*[]byte)
	}
	if len(*w.buffer)+n <= bufferBytes {
		*w.buffer = append(append(*w.buffer, p...), s...)
		return n, nil
	}
	if err := w.drain(false); err != nil {
		return 0, err
	}
	if s != "" {
		p = []byte(s)
	}
	if err := w.stream.conn.send(w.stream, nil, p, false, false); err != nil {
		return 0, err
	}
	return n, nil
}

// drain sends header and buffer; end says that nothing follows.
func (w *writer) drain(end bool) error {
	var data []byte
	if w.buffer != nil {
		data = *w.buffer
	}
	var block []byte
	if !w.sent {
		w.sent = true
		block = w.complete(data, end)
		w.block = nil
	}
	var err error
	if block != nil || len(data) > 0 || end {
		err = w.stream.conn.send(w.stream, block, data, end, end)
	}
	giveHead(block)
	if w.buffer != nil {
		*w.buffer = data[:0]
	}
	return err
}

// complete adds to the header what a handler may leave out.
func (w *writer) complete(data []byte, end bool) []byte {
	block := w.block
	if end && w.declared < 0 && w.bodyAllowed() && (len(data) > 0 || !w.isHead) {
		block = AppendField(block, "content-length", strconv.Itoa(len(data)))
	}
	if !w.hasType && len(data) > 0 && w.bodyAllowed() && w.header.Get("Content-Encoding") == "" {
		block = AppendField(block, "content-type", http.DetectContentType(data))
	}
	if !w.hasDate {
		block = AppendField(block, "date", Date(time.Now()))
	}
	return block
}

// FlushError implements what http.ResponseController looks for.
func (w *writer) FlushError() error {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	if w.ended {
		return errors.New("h2: the handler has returned")
	}
	if err := w.drain(false); err != nil {
		return err
	}
	if w.buffer != nil {
		buffers.Put(w.buffer)
		w.buffer = nil
	}
	w.stream.conn.flush()
	return nil
}

// Flush implements http.Flusher.
func (w *writer) Flush() { _ = w.FlushError() }

// finish ends the answer.
func (w *writer) finish() {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	trailers := w.trailers()
	if w.declared >= 0 && w.written < w.declared && !w.isHead && w.bodyAllowed() {
		panic(http.ErrAbortHandler) // the client must not take a part for the whole
	}
	_ = w.drain(trailers == nil)
	w.ended = true
	if trailers != nil {
		w.stream.conn.sendHeaders(w.stream, trailers, true)
	}
	if w.buffer != nil {
		buffers.Put(w.buffer)
		w.buffer = nil
	}
}

// trailers are the fields that the handler has announced, or put behind http.TrailerPrefix; nil when there are none.
func (w *writer) trailers() []byte {
	var block []byte
	for _, line := range w.header["Trailer"] {
		for name := range strings.SplitSeq(line, ",") {
			name = http.CanonicalHeaderKey(strings.TrimSpace(name))
			for _, v := range w.header[name] {
				block = AppendField(block, strings.ToLower(name), cleanValue(v))
			}
		}
	}
	for name, values := range w.header {
		if short, ok := strings.CutPrefix(name, http.TrailerPrefix); ok {
			for _, v := range values {
				block = AppendField(block, strings.ToLower(short), cleanValue(v))
			}
		}
	}
	return block
}

// SetReadDeadline implements what http.ResponseController looks for.
func (w *writer) SetReadDeadline(at time.Time) error {
	w.stream.setDeadlines(&at, nil)
	return nil
}

// SetWriteDeadline implements what http.ResponseController looks for.
func (w *writer) SetWriteDeadline(at time.Time) error {
	w.stream.setDeadlines(nil, &at)
	return nil
}

// SetDeadlines is SetReadDeadline and SetWriteDeadline in one.
func (w *writer) SetDeadlines(read, write time.Time) { w.stream.setDeadlines(&read, &write) }

// EnableFullDuplex implements what http.ResponseController looks for: HTTP/2 always is.
func (w *writer) EnableFullDuplex() error { return nil }

// CloseNotify implements http.CloseNotifier, by which upstream's wrappers tell HTTP/2 writers from others.
func (w *writer) CloseNotify() <-chan bool {
	gone := make(chan bool, 1)
	context.AfterFunc(w.stream.ctx, func() { gone <- true })
	return gone
}

var (
	_ http.Flusher    = (*writer)(nil)
	_ io.StringWriter = (*writer)(nil)
)
