package h2

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
)

// stream is one request that a handler serves, with its answer.
type stream struct {
	// Guarded by conn.mu. What is looked at first for each of many streams lies together.
	feeding
	err          error // why nothing can be sent any more
	credit       int64 // bytes of the answer's body that the client takes
	endedSending bool
	writeBy      time.Time
	readBy       time.Time

	conn *conn
	id   uint32
	ctx  context.Context
	stop context.CancelFunc

	// Owned by the reading goroutine until the handler starts.
	request  *http.Request
	refusal  int   // status of the answer where no handler is asked; zero: none
	declared int64 // size of the body, -1 when not declared
	got      int64 // bytes of the body that came
	expects  int   // 1: the client waits to be told to send the body
	started  bool

	body    *body // nil: the request has none
	window  inWindow
	aborted atomic.Bool
}

func newStream(c *conn, id uint32) *stream {
	st := &stream{conn: c, id: id, declared: -1}
	st.ctx, st.stop = context.WithCancel(c.ctx)
	return st
}

// prepare makes the handler's request.
func (st *stream) prepare(b *block) {
	if b.truncated {
		st.refusal = http.StatusRequestHeaderFieldsTooLarge
		return
	}
	req, declared, err := newRequest(st.ctx, b.pseudo, b.fields)
	if err != nil {
		st.refusal = http.StatusBadRequest
		return
	}
	req.TLS, req.RemoteAddr = &st.conn.state, st.conn.remote
	st.request = req
	st.request.Body = http.NoBody
	if st.body == nil {
		return
	}
	st.declared, st.request.ContentLength, st.request.Body = declared, declared, st.body
	if req.Header.Get("Expect") == "100-continue" {
		delete(req.Header, "Expect")
		st.expects = 1
		st.body.wanted = func() { st.conn.sendHeaders(st, AppendStatus(nil, http.StatusContinue), false) }
	}
}

// taken lets the client send what the handler has read.
func (st *stream) taken(n int) { st.conn.allow(st, int32(n)) }

// received takes a part of the body.
func (st *stream) received(f *http2.DataFrame, size int32) error {
	data := f.Data()
	st.got += int64(len(data))
	if st.declared >= 0 && (st.got > st.declared || f.StreamEnded() && st.got < st.declared) {
		st.conn.allow(nil, size)
		return http2.StreamError{StreamID: st.id, Code: http2.ErrCodeProtocol, Cause: errors.New("the body is not as long as declared")}
	}
	if spare := size - int32(len(data)); spare > 0 {
		st.conn.allow(st, spare)
	}
	if len(data) > 0 && !st.body.add(data) {
		st.conn.allow(nil, int32(len(data)))
	}
	if !f.StreamEnded() {
		return nil
	}
	st.body.end(io.EOF)
	return st.conn.start(st)
}

// trailers ends the body; end is what their frame says.
func (st *stream) trailers(b *block, end bool) error {
	switch {
	case st.body == nil || st.body.ended():
		return http2.StreamError{StreamID: st.id, Code: http2.ErrCodeStreamClosed}
	case !end || b.given != 0:
		return http2.StreamError{StreamID: st.id, Code: http2.ErrCodeProtocol}
	}
	if st.request != nil {
		for _, field := range b.fields {
			name := canonicalName(field.Name)
			if _, declared := st.request.Trailer[name]; declared {
				st.request.Trailer[name] = append(st.request.Trailer[name], field.Value)
			}
		}
	}
	st.body.end(io.EOF)
	return st.conn.start(st)
}

// abort ends the stream without an answer. The handler learns of it by its context, body and writer.
func (st *stream) abort(why error) {
	st.aborted.Store(true)
	c := st.conn
	c.mu.Lock()
	if st.err == nil {
		st.err = why
	}
	idle := c.dropLocked(st)
	c.room.Broadcast()
	c.mu.Unlock()
	st.stop()
	if st.body != nil {
		st.body.end(why)
	}
	if idle {
		c.server.state(c.tls, http.StateIdle)
	}
}

func (st *stream) isAborted() bool { return st.aborted.Load() }

// deadlineLocked is the earlier of the stream's deadlines, zero when it has none.
func (st *stream) deadlineLocked() time.Time {
	if st.readBy.IsZero() || !st.writeBy.IsZero() && st.writeBy.Before(st.readBy) {
		return st.writeBy
	}
	return st.readBy
}

// expire does what is due: a read deadline ends the body, a write deadline the stream.
func (st *stream) expire(now time.Time) {
	c := st.conn
	c.mu.Lock()
	read := !st.readBy.IsZero() && !st.readBy.After(now)
	write := !st.writeBy.IsZero() && !st.writeBy.After(now)
	if read {
		st.readBy = time.Time{}
	}
	if write {
		st.writeBy = time.Time{}
	}
	c.mu.Unlock()
	if read && st.body != nil {
		st.body.end(os.ErrDeadlineExceeded)
	}
	if write {
		c.reset(st.id, http2.ErrCodeInternal, os.ErrDeadlineExceeded)
		c.flush()
	}
}

// setDeadlines puts off or brings forward the stream's deadlines; zero takes one away, nil leaves it.
func (st *stream) setDeadlines(read, write *time.Time) {
	c := st.conn
	c.mu.Lock()
	if read != nil {
		st.readBy = *read
	}
	if write != nil {
		st.writeBy = *write
	}
	at := st.deadlineLocked()
	now := !at.IsZero() && !at.After(time.Now())
	if !at.IsZero() && !now {
		c.scheduleLocked(at)
	}
	c.mu.Unlock()
	if now {
		st.expire(time.Now())
	}
}

// run serves the request.
func (st *stream) run() {
	defer st.conn.close(st)
	defer st.stop()
	w := newWriter(st)
	defer st.recover()
	if st.isAborted() {
		return
	}
	if st.refusal != 0 {
		http.Error(w, http.StatusText(st.refusal), st.refusal)
	} else {
		if st.request.Method != http.MethodGet {
			ReserveStack()
		}
		st.conn.handler.ServeHTTP(w, st.request)
	}
	w.finish()
	if st.body != nil {
		st.leaveBody()
	}
}

// leaveBody ends a body that the handler has not read to its end: the client need not send the rest.
func (st *stream) leaveBody() {
	unread := !st.body.ended()
	_ = st.body.Close()
	if unread && !st.isAborted() {
		st.conn.reset(st.id, http2.ErrCodeNo, errBodyClosed)
		st.conn.flush()
	}
}

// recover resets the stream of a handler that panicked.
func (st *stream) recover() {
	v := recover()
	if v == nil {
		return
	}
	if v != http.ErrAbortHandler {
		stack := make([]byte, 64<<10)
		stack = stack[:runtime.Stack(stack, false)]
		st.conn.server.ErrorLog.Printf("http2: panic serving %v: %v\n%s", st.conn.remote, v, stack)
	}
	st.conn.reset(st.id, http2.ErrCodeInternal, fmt.Errorf("the handler panicked: %v", v))
	st.conn.flush()
}

// stackBytes is how deep the handler of a write goes.
const stackBytes = 12 << 10

// ReserveStack makes the goroutine's stack as large as a write needs at once, while there is next to nothing on it. Growing as it goes, by
// doubling, copies all that is there each time, which was a tenth of a write's processor time.
//
//go:noinline
func ReserveStack() byte {
	var room [stackBytes]byte
	return room[runtime.NumCPU()%stackBytes] // so that the room is not optimized away
}
