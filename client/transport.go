package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime/debug"
	"strconv"
	"sync"
	"time"

	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/klog/v2"
)

// maxBufferedBodyBytes bounds what the handler may write ahead of the reader of a response body. A handler that is further ahead waits;
// a watch whose reader does not read thus holds at most this much.
const maxBufferedBodyBytes = 256 << 10

// errUpgrade is returned for requests that want to leave HTTP.
var errUpgrade = errors.New("knarr's in-process transport cannot upgrade a connection: use the HTTPS endpoint for exec, attach and port-forward")

// errBodyClosed is what a handler's Write returns once the client has closed the response body.
var errBodyClosed = errors.New("in-process response body closed by the client")

// transport answers requests by calling handler. Safe for concurrent use.
type transport struct {
	handler http.Handler
	user    user.Info
}

func newTransport(handler http.Handler, u user.Info) *transport {
	return &transport{handler: handler, user: u}
}

// RoundTrip runs the handler in a goroutine of its own and returns as soon as the handler has sent its header; the body streams. The
// handler's context ends when the request's context ends, when the body is closed, or when the handler returns.
func (t *transport) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.Header.Get("Upgrade") != "" {
		closeBody(req)
		return nil, errUpgrade
	}
	if err := req.Context().Err(); err != nil {
		closeBody(req)
		return nil, err
	}
	ctx, cancel := context.WithCancel(WithUser(isolated{req.Context()}, t.user))
	w := newResponse(cancel)
	go t.serve(w, serverRequest(req, ctx))
	select {
	case <-w.headerSent:
	case <-req.Context().Done():
		select {
		case <-w.headerSent: // both: the answer is there, let the reader of the body find out
		default:
			w.abandon(req.Context().Err())
			return nil, req.Context().Err()
		}
	}
	if err := w.failure(); err != nil {
		return nil, err
	}
	return w.result(req), nil
}

// serve runs the handler and ends the response, also when the handler panics.
func (t *transport) serve(w *response, req *http.Request) {
	defer closeBody(req)
	defer func() {
		reason := recover()
		if reason == nil {
			w.finish(req.Context().Err())
			return
		}
		if reason != http.ErrAbortHandler { //nolint:errorlint // a sentinel by definition
			klog.ErrorS(nil, "Panic in the handler of an in-process request", "method", req.Method, "path", req.URL.Path,
				"panic", reason, "stack", string(debug.Stack()))
		}
		w.finish(fmt.Errorf("in-process request %s %s was aborted by its handler: %w", req.Method, req.URL.Path, io.ErrUnexpectedEOF))
	}()
	t.handler.ServeHTTP(w, req)
}

// serverRequest turns the client's request into what a handler expects from a server. Header is copied: handlers delete from it.
func serverRequest(req *http.Request, ctx context.Context) *http.Request {
	r := req.WithContext(ctx)
	r.Header = req.Header.Clone()
	r.Proto, r.ProtoMajor, r.ProtoMinor = "HTTP/2.0", 2, 0
	r.RequestURI = req.URL.RequestURI()
	r.RemoteAddr = "127.0.0.1:0"
	if r.Host == "" {
		r.Host = req.URL.Host
	}
	if r.Body == nil {
		r.Body = http.NoBody
	}
	return r
}

func closeBody(req *http.Request) {
	if req.Body != nil {
		_ = req.Body.Close()
	}
}

// isolated keeps a context's end and drops its values: as over a wire, nothing of the caller (its own request info, audit event or user,
// when it is itself serving a request) leaks into the called pipeline.
type isolated struct{ context.Context }

func (isolated) Value(any) any { return nil }

// response is the http.ResponseWriter given to the handler and the body given to the client.
type response struct {
	header     http.Header   // the handler's, until the header is sent
	headerSent chan struct{} // closed when status and sent are final, or when the handler failed before
	cancel     context.CancelFunc

	mu     sync.Mutex
	change *sync.Cond
	status int         // 0 until the header is sent
	sent   http.Header // snapshot of header
	buf    []byte      // written, not yet read
	off    int         // first unread byte of buf
	done   bool        // the handler has returned
	err    error       // why it ended early
	closed bool        // the client is gone
}

func newResponse(cancel context.CancelFunc) *response {
	w := &response{header: http.Header{}, headerSent: make(chan struct{}), cancel: cancel}
	w.change = sync.NewCond(&w.mu)
	return w
}

// Header implements http.ResponseWriter.
func (w *response) Header() http.Header { return w.header }

// WriteHeader implements http.ResponseWriter. Informational (1xx) statuses are dropped, a second call is ignored.
func (w *response) WriteHeader(status int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if status >= http.StatusOK {
		w.sendHeaderLocked(status)
	}
}

func (w *response) sendHeaderLocked(status int) {
	if w.status != 0 {
		return
	}
	w.status, w.sent = status, w.header.Clone()
	close(w.headerSent)
}

// Write implements io.Writer; it waits while maxBufferedBodyBytes are unread.
func (w *response) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sendHeaderLocked(http.StatusOK)
	for written := 0; ; {
		for !w.closed && len(w.buf)-w.off >= maxBufferedBodyBytes {
			w.change.Wait()
		}
		if w.closed {
			return written, errBodyClosed
		}
		if w.off > 0 {
			w.buf = append(w.buf[:0], w.buf[w.off:]...)
			w.off = 0
		}
		n := min(len(p)-written, maxBufferedBodyBytes-len(w.buf))
		w.buf = append(w.buf, p[written:written+n]...)
		w.change.Broadcast()
		if written += n; written == len(p) {
			return written, nil
		}
	}
}

// Flush implements http.Flusher: what was written is already readable, so only the header may be missing.
func (w *response) Flush() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sendHeaderLocked(http.StatusOK)
}

// FlushError is what http.ResponseController calls.
func (w *response) FlushError() error {
	w.Flush()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return errBodyClosed
	}
	return nil
}

// SetReadDeadline and SetWriteDeadline exist for http.ResponseController; deadlines of in-process requests come with the context.
func (w *response) SetReadDeadline(time.Time) error { return nil }

// SetWriteDeadline: see SetReadDeadline.
func (w *response) SetWriteDeadline(time.Time) error { return nil }

// CloseNotify implements the deprecated http.CloseNotifier, which upstream's response wrappers still ask for before they pass Flush on.
// Nothing is ever sent: the request's context says when the client is gone.
func (w *response) CloseNotify() <-chan bool { return nil }

// finish ends the response: err nil is a proper end. A handler that wrote nothing sent an empty 200, as with net/http, unless it returned
// because the request was over.
func (w *response) finish(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.done = true
	if w.err == nil {
		w.err = err
	}
	if err == nil {
		w.sendHeaderLocked(http.StatusOK)
	} else if w.status == 0 {
		w.status = http.StatusInternalServerError
		close(w.headerSent)
	}
	w.change.Broadcast()
	w.cancel()
}

// failure is the error of a handler that ended before it sent a header.
func (w *response) failure() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.sent == nil {
		return w.err
	}
	return nil
}

// abandon is the client walking away.
func (w *response) abandon(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	if w.err == nil {
		w.err = err
	}
	w.buf, w.off = nil, 0
	w.change.Broadcast()
	w.cancel()
}

func (w *response) result(req *http.Request) *http.Response {
	resp := &http.Response{
		Status: strconv.Itoa(w.status) + " " + http.StatusText(w.status), StatusCode: w.status,
		Proto: "HTTP/2.0", ProtoMajor: 2,
		Header: w.sent, Body: newBody(w, req.Context()), ContentLength: -1, Request: req,
	}
	if n, err := strconv.ParseInt(w.sent.Get("Content-Length"), 10, 64); err == nil {
		resp.ContentLength = n
	}
	return resp
}

// body is the client's end. Reads end with the request's context even when the handler does not.
type body struct {
	w    *response
	ctx  context.Context // the request's
	stop func() bool
}

func newBody(w *response, ctx context.Context) *body {
	return &body{w: w, ctx: ctx, stop: context.AfterFunc(ctx, func() { w.abandon(ctx.Err()) })}
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	w := b.w
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.off == len(w.buf) && !w.done && !w.closed {
		w.change.Wait()
	}
	if w.off < len(w.buf) {
		n := copy(p, w.buf[w.off:])
		w.off += n
		w.change.Broadcast()
		return n, nil
	}
	if w.err != nil {
		return 0, w.err
	}
	if w.closed {
		return 0, errBodyClosed
	}
	if err := b.ctx.Err(); err != nil {
		return 0, err // the handler returned because of it
	}
	b.stop()
	return 0, io.EOF
}

// Close implements io.Closer: the handler's context ends and its further writes fail.
func (b *body) Close() error {
	b.stop()
	b.w.abandon(nil)
	return nil
}
