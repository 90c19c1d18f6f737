package h2

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
)

const (
	// Sizes of RFC 9113, section 6.5.2, until the client says otherwise, and the frame size that we take.
	defaultWindow = 65535
	frameBytes    = 16 << 10
	tableBytes    = 4096
	maxWindow     = 1<<31 - 1
	// lastOfAll as the last stream of a GOAWAY promises that every request that is on its way is answered.
	lastOfAll = 1<<31 - 1
	// lingerBytes bounds what is read of a client after its connection has failed.
	lingerBytes = 1 << 20
)

// conn is one connection.
type conn struct {
	server  *Server
	tls     *tls.Conn
	socket  *socket // nil for a connection of a foreign listener
	handler http.Handler
	ctx     context.Context
	state   tls.ConnectionState
	remote  string

	// Owned by the reading goroutine.
	in       *bufio.Reader
	framer   *http2.Framer
	block    *block
	exchange Exchange
	deferred []*stream // whose handlers start before the next wait for input
	received uint32    // newest stream
	window   inWindow  // for bodies
	failed   bool      // a connection error was answered

	writeBy time.Time // deadline of the socket; owned by who writes

	woken atomic.Bool // some feed may have something that no feed was asked for yet

	mu   sync.Mutex
	room sync.Cond // L is mu; signalled when something may be sent again, or never again
	due  sync.Cond // L is mu; signalled when a feed has something, or there is none any more
	// All below are guarded by mu.
	out       []byte          // frames to be written
	writing   bool            // somebody writes
	urged     bool            // and shall not leave anything pending
	turns     []chan struct{} // of bodies that wait for their turn to write: closed when it comes
	err       error           // why nothing can be written any more
	streams   map[uint32]*stream
	fed       []*stream // those with a feed
	turn      int       // index in fed of the one that was asked last
	feeding   bool      // writeFeeds runs
	crowded   bool      // many connections were woken with this one
	resting   bool      // in server.rests: feeds are not asked
	hungry    bool      // some feed's stream waits for the connection's window
	queue     []*stream // whose handlers wait for a place
	running   int       // handlers
	credit    int64     // bytes of bodies that the client takes
	initial   int64     // the same for a new stream
	frameSize int       // of the client
	goingAway bool
	timer     *time.Timer // next deadline of a stream, or the end of idleness
	timerAt   time.Time
	lastUsed  time.Time // when the last stream ended
}

func newConn(ctx context.Context, s *Server, tc *tls.Conn, h http.Handler) *conn {
	c := &conn{
		server: s, tls: tc, handler: h, ctx: ctx, state: tc.ConnectionState(), remote: tc.RemoteAddr().String(),
		streams: map[uint32]*stream{}, credit: defaultWindow, initial: defaultWindow, frameSize: frameBytes, lastUsed: time.Now(),
	}
	c.room.L, c.due.L = &c.mu, &c.mu
	c.window = inWindow{size: s.UploadPerConnection, left: s.UploadPerConnection}
	c.exchange = Exchange{conn: c, TLS: &c.state, Remote: c.remote}
	c.in = bufio.NewReader(tc)
	c.framer = http2.NewFramer(nil, c.in)
	c.framer.SetMaxReadFrameSize(frameBytes)
	c.framer.SetReuseFrames()
	c.block = newBlock(c.framer, s.MaxHeaderBytes)
	// The first frame of all: RFC 9113, section 3.4.
	c.out = appendSettings(c.out,
		http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: uint32(s.MaxStreams)},
		http2.Setting{ID: http2.SettingMaxHeaderListSize, Val: s.MaxHeaderBytes},
		http2.Setting{ID: http2.SettingInitialWindowSize, Val: uint32(s.UploadPerStream)})
	if more := s.UploadPerConnection - defaultWindow; more > 0 {
		c.out = appendUint32Frame(c.out, http2.FrameWindowUpdate, 0, uint32(more))
	}
	if so, ok := tc.NetConn().(*socket); ok {
		c.socket = so
		so.beforeRead = c.beforeRead
	}
	return c
}

// serve reads until the connection ends.
func (c *conn) serve() {
	defer c.end()
	if err := c.greet(); err != nil {
		return
	}
	c.mu.Lock()
	c.scheduleIdleLocked()
	c.mu.Unlock()
	for {
		if c.socket == nil {
			c.beforeRead()
		}
		if c.takeWindows() {
			continue
		}
		f, err := c.framer.ReadFrame()
		if err == nil {
			err = c.process(f)
		}
		if err != nil && !c.survives(f, err) {
			c.linger()
			return
		}
	}
}

// windowUpdate is the size of a WINDOW_UPDATE frame: RFC 9113, section 6.9.
const windowUpdate = frameHeader + 4

// takeWindows takes the WINDOW_UPDATE frames that come next, as far as they are sound and have come whole, all at once; false when there are
// none: whatever else comes is for the framer.
func (c *conn) takeWindows() bool {
	if _, err := c.in.Peek(frameHeader); err != nil {
		return false // which the framer will find again
	}
	b, _ := c.in.Peek(c.in.Buffered())
	n := 0
	c.mu.Lock()
	for ; len(b)-n >= windowUpdate; n += windowUpdate {
		f := b[n : n+windowUpdate]
		if binary.BigEndian.Uint32(f) != 4<<8|uint32(http2.FrameWindowUpdate) || !c.openLocked(binary.BigEndian.Uint32(f[5:])&maxWindow, binary.BigEndian.Uint32(f[9:])&maxWindow) {
			break
		}
	}
	if n > 0 {
		c.room.Broadcast()
	}
	c.mu.Unlock()
	_, _ = c.in.Discard(n)
	return n > 0
}

// openLocked opens a window, of a stream or of the connection (0), by so much; false, and nothing is done, where that is against the rules or the
// stream is gone.
func (c *conn) openLocked(id, more uint32) bool {
	if id == 0 {
		if more == 0 || c.credit+int64(more) > maxWindow {
			return false
		}
		c.credit += int64(more)
		c.openedLocked()
		return true
	}
	st := c.streams[id]
	if st == nil || more == 0 || st.credit+int64(more) > maxWindow {
		return false
	}
	st.credit += int64(more)
	st.openedLocked()
	return true
}

// linger lets the client read why the connection ends: closing it while input is unread would take that away.
func (c *conn) linger() {
	if !c.failed {
		return
	}
	_ = c.tls.SetReadDeadline(time.Now().Add(goAwayTimeout))
	_ = c.tls.CloseWrite()
	_, _ = io.CopyN(io.Discard, c.in, lingerBytes)
}

// greet exchanges the prefaces.
func (c *conn) greet() error {
	if c.socket == nil {
		c.flush()
	}
	_ = c.tls.SetReadDeadline(time.Now().Add(prefaceTimeout))
	got := make([]byte, len(http2.ClientPreface))
	if _, err := io.ReadFull(c.in, got); err != nil || string(got) != http2.ClientPreface {
		c.fatal(http2.ErrCodeProtocol)
		return errMalformed
	}
	f, err := c.framer.ReadFrame()
	if err != nil {
		c.survives(nil, err)
		return err
	}
	_ = c.tls.SetReadDeadline(time.Time{})
	s, ok := f.(*http2.SettingsFrame)
	if !ok || s.IsAck() {
		c.fatal(http2.ErrCodeProtocol)
		return errMalformed
	}
	if err := c.processSettings(s); err != nil && !c.survives(f, err) {
		return err
	}
	return nil
}

// beforeRead is what there is to do before waiting for the client.
func (c *conn) beforeRead() {
	for i, st := range c.deferred {
		if err := c.start(st); err != nil {
			c.fail(err)
		}
		c.deferred[i] = nil
	}
	c.deferred = c.deferred[:0]
	c.flush()
}

// end frees everything.
func (c *conn) end() {
	c.fail(errGone)
	c.mu.Lock()
	all := make([]*stream, 0, len(c.streams))
	for _, st := range c.streams {
		all = append(all, st)
	}
	c.queue = nil
	if c.timer != nil {
		c.timer.Stop()
	}
	c.mu.Unlock()
	for _, st := range all {
		st.abort(errGone)
	}
	_ = c.tls.Close()
}

// fail makes all writes fail from now on.
func (c *conn) fail(err error) {
	c.mu.Lock()
	if c.err == nil {
		c.err = err
	}
	c.out = nil
	c.room.Broadcast()
	c.due.Signal()
	c.mu.Unlock()
}

// fatal ends the connection because of what the client did.
func (c *conn) fatal(code http2.ErrCode) {
	c.failed = true
	c.mu.Lock()
	c.out = appendGoAway(c.out, c.received, code)
	c.mu.Unlock()
	c.flush()
}

// survives answers an error of reading; false when the connection is over.
func (c *conn) survives(f http2.Frame, err error) bool {
	var reset http2.StreamError
	var fatal http2.ConnectionError
	switch {
	case errors.As(err, &reset):
		c.received = max(c.received, reset.StreamID)
		c.reset(reset.StreamID, reset.Code, err)
		return true
	case errors.As(err, &fatal):
		c.fatal(http2.ErrCode(fatal))
	case errors.Is(err, http2.ErrFrameTooLarge):
		c.fatal(http2.ErrCodeFrameSize)
	}
	return false
}

// goAway says GOAWAY, once.
func (c *conn) goAway(write bool) {
	c.mu.Lock()
	if c.goingAway {
		c.mu.Unlock()
		return
	}
	c.goingAway, c.lastUsed = true, time.Now()
	c.scheduleIdleLocked()
	c.out = appendGoAway(c.out, lastOfAll, http2.ErrCodeNo)
	c.mu.Unlock()
	if write {
		c.flush()
	}
}

// process handles one frame. A returned error is for survives.
func (c *conn) process(f http2.Frame) error {
	switch f := f.(type) {
	case *http2.HeadersFrame:
		return c.processHeaders(f)
	case *http2.DataFrame:
		return c.processData(f)
	case *http2.SettingsFrame:
		return c.processSettings(f)
	case *http2.WindowUpdateFrame:
		return c.processWindow(f)
	case *http2.PingFrame:
		return c.processPing(f)
	case *http2.RSTStreamFrame:
		return c.processReset(f)
	case *http2.PushPromiseFrame:
		return http2.ConnectionError(http2.ErrCodeProtocol)
	case *http2.PriorityFrame:
		if f.StreamDep == f.StreamID {
			return http2.StreamError{StreamID: f.StreamID, Code: http2.ErrCodeProtocol}
		}
	}
	return nil // GOAWAY and what nobody knows: RFC 9113, section 5.5
}

func (c *conn) processSettings(f *http2.SettingsFrame) error {
	if f.IsAck() {
		return nil
	}
	if f.HasDuplicates() {
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := f.ForeachSetting(c.setLocked); err != nil {
		return err
	}
	c.out = appendFrame(c.out, 0, http2.FrameSettings, http2.FlagSettingsAck, 0)
	c.room.Broadcast()
	return c.checkPendingLocked()
}

func (c *conn) setLocked(s http2.Setting) error {
	if err := s.Valid(); err != nil {
		return err
	}
	switch s.ID {
	case http2.SettingMaxFrameSize:
		c.frameSize = min(int(s.Val), 64<<10)
	case http2.SettingInitialWindowSize:
		grown := int64(s.Val) - c.initial
		c.initial = int64(s.Val)
		for _, st := range c.streams {
			if st.credit += grown; st.credit > maxWindow {
				return http2.ConnectionError(http2.ErrCodeFlowControl)
			}
			st.openedLocked()
		}
	}
	return nil
}

// checkPendingLocked ends a connection whose client makes us answer (pings, settings, resets) and reads nothing.
func (c *conn) checkPendingLocked() error {
	if len(c.out) > 2*maxPending {
		return http2.ConnectionError(http2.ErrCodeEnhanceYourCalm)
	}
	return nil
}

func (c *conn) processWindow(f *http2.WindowUpdateFrame) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.openLocked(f.StreamID, f.Increment):
		c.room.Broadcast()
		return nil
	case f.StreamID == 0:
		return http2.ConnectionError(http2.ErrCodeFlowControl)
	case c.streams[f.StreamID] == nil:
		return c.unlessIdle(f.StreamID)
	}
	return http2.StreamError{StreamID: f.StreamID, Code: http2.ErrCodeFlowControl}
}

// unlessIdle refuses frames of a stream that the client has not opened yet.
func (c *conn) unlessIdle(id uint32) error {
	if id%2 == 0 || id > c.received {
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	return nil
}

func (c *conn) processPing(f *http2.PingFrame) error {
	if f.IsAck() {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.out = append(appendFrame(c.out, len(f.Data), http2.FramePing, http2.FlagPingAck, 0), f.Data[:]...)
	return c.checkPendingLocked()
}

func (c *conn) processReset(f *http2.RSTStreamFrame) error {
	c.mu.Lock()
	st := c.streams[f.StreamID]
	c.mu.Unlock()
	if st == nil {
		return c.unlessIdle(f.StreamID)
	}
	st.abort(http2.StreamError{StreamID: f.StreamID, Code: f.ErrCode})
	return nil
}

func (c *conn) processData(f *http2.DataFrame) error {
	size := int32(f.Length)
	if !c.window.take(size) {
		return http2.ConnectionError(http2.ErrCodeFlowControl)
	}
	c.mu.Lock()
	st := c.streams[f.StreamID]
	c.mu.Unlock()
	if st == nil || st.body == nil || st.body.ended() {
		c.allow(nil, size)
		if err := c.unlessIdle(f.StreamID); err != nil || st != nil && st.isAborted() {
			return err
		}
		return http2.StreamError{StreamID: f.StreamID, Code: http2.ErrCodeStreamClosed}
	}
	if !st.window.take(size) {
		c.allow(nil, size)
		return http2.StreamError{StreamID: f.StreamID, Code: http2.ErrCodeFlowControl}
	}
	return st.received(f, size)
}

// allow lets the client send n more bytes of bodies, on the stream too unless that is nil.
func (c *conn) allow(st *stream, n int32) {
	c.mu.Lock()
	before := len(c.out)
	if more := c.window.give(n); more > 0 {
		c.out = appendUint32Frame(c.out, http2.FrameWindowUpdate, 0, uint32(more))
	}
	if st != nil {
		if more := st.window.give(n); more > 0 && !st.body.ended() {
			c.out = appendUint32Frame(c.out, http2.FrameWindowUpdate, st.id, uint32(more))
		}
	}
	said := len(c.out) > before
	c.mu.Unlock()
	if said && st != nil {
		c.flush()
	}
}

// processHeaders opens a stream, or ends one whose body has trailers.
func (c *conn) processHeaders(f *http2.HeadersFrame) error {
	id, end, itself := f.StreamID, f.StreamEnded(), f.HasPriority() && f.Priority.StreamDep == f.StreamID
	b := c.block
	defer b.forget()
	if err := b.read(f); err != nil { // f is no more
		return err
	}
	if id%2 == 0 {
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	c.mu.Lock()
	st := c.streams[id]
	c.mu.Unlock()
	if st != nil {
		return st.trailers(b, end)
	}
	if id <= c.received {
		return http2.ConnectionError(http2.ErrCodeStreamClosed)
	}
	c.received = id
	if itself {
		return http2.StreamError{StreamID: id, Code: http2.ErrCodeProtocol}
	}
	if err := b.check(); err != nil {
		return http2.StreamError{StreamID: id, Code: http2.ErrCodeProtocol}
	}
	if end && !b.truncated && c.answerAtOnce(id, b) {
		return nil
	}
	return c.open(id, b, end)
}

// answerAtOnce offers a request without a body to Options.Fast.
func (c *conn) answerAtOnce(id uint32, b *block) bool {
	if c.server.Fast == nil {
		return false
	}
	e := &c.exchange
	e.id, e.Method, e.Path, e.Authority, e.Fields = id, b.method, b.path, b.authority, b.fields
	done := c.server.Fast(e)
	e.Fields = nil
	return done
}

// open makes a stream and lets its handler run; end: there is no body.
func (c *conn) open(id uint32, b *block, end bool) error {
	st := newStream(c, id)
	if !end {
		st.body = newBody(st.taken, nil)
		st.window = inWindow{size: c.server.UploadPerStream, left: c.server.UploadPerStream}
	}
	st.prepare(b)
	c.mu.Lock()
	if len(c.streams) >= c.server.MaxStreams {
		c.mu.Unlock()
		return http2.StreamError{StreamID: st.id, Code: http2.ErrCodeRefusedStream}
	}
	if len(c.streams) == 0 {
		defer c.server.state(c.tls, http.StateActive)
	}
	st.credit = c.initial
	c.streams[st.id] = st
	c.mu.Unlock()
	if st.body != nil && st.expects == 0 {
		c.deferred = append(c.deferred, st)
		return nil
	}
	return c.start(st)
}

// start runs the stream's handler, once, or queues it while too many run.
func (c *conn) start(st *stream) error {
	if st.started {
		return nil
	}
	st.started = true
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return nil
	}
	if c.running < c.server.MaxStreams {
		c.running++
		go st.run()
		return nil
	}
	if len(c.queue) >= queuedStreams*c.server.MaxStreams {
		return http2.ConnectionError(http2.ErrCodeEnhanceYourCalm)
	}
	c.queue = append(c.queue, st)
	return nil
}

// close takes a stream whose handler has returned out of the connection, and lets the next that waits run.
func (c *conn) close(st *stream) {
	c.mu.Lock()
	c.running--
	if len(c.queue) > 0 {
		next := c.queue[0]
		c.queue[0] = nil
		c.queue = c.queue[1:]
		c.running++
		go next.run()
	}
	idle := c.dropLocked(st)
	c.mu.Unlock()
	if idle {
		c.server.state(c.tls, http.StateIdle)
	}
}

// dropLocked forgets an open stream; it reports whether it was the last.
func (c *conn) dropLocked(st *stream) bool {
	if c.streams[st.id] != st {
		return false
	}
	delete(c.streams, st.id)
	if len(c.streams) > 0 {
		return false
	}
	c.lastUsed = time.Now()
	c.scheduleIdleLocked()
	return c.err == nil
}

// reset ends a stream from our side.
func (c *conn) reset(id uint32, code http2.ErrCode, why error) {
	c.mu.Lock()
	st := c.streams[id]
	c.out = appendUint32Frame(c.out, http2.FrameRSTStream, id, uint32(code))
	if err := c.checkPendingLocked(); err != nil && c.err == nil {
		c.err = err
	}
	c.mu.Unlock()
	if st != nil {
		st.abort(why)
	}
}

// idleEndLocked is when a connection without requests ends, zero: never. One that was told to go away gets time for requests that are on
// their way.
func (c *conn) idleEndLocked() time.Time {
	switch {
	case c.goingAway:
		return c.lastUsed.Add(goAwayTimeout)
	case c.server.IdleTimeout > 0:
		return c.lastUsed.Add(c.server.IdleTimeout)
	}
	return time.Time{}
}

func (c *conn) scheduleIdleLocked() {
	if end := c.idleEndLocked(); len(c.streams) == 0 && !end.IsZero() {
		c.scheduleLocked(end)
	}
}

// scheduleLocked has tick called at the given time or earlier.
func (c *conn) scheduleLocked(at time.Time) {
	if !c.timerAt.IsZero() && !at.Before(c.timerAt) || c.err != nil {
		return
	}
	c.timerAt = at
	if c.timer == nil {
		c.timer = time.AfterFunc(time.Until(at), c.tick)
		return
	}
	c.timer.Reset(time.Until(at))
}

// tick ends streams whose time is over and connections that were idle for too long, and schedules the next look. One timer serves a
// connection: most deadlines never come, and moving one costs nothing.
func (c *conn) tick() {
	now := time.Now()
	c.mu.Lock()
	c.timerAt = time.Time{}
	var late []*stream
	var next time.Time
	for _, st := range c.streams {
		if at := st.deadlineLocked(); !at.IsZero() && !at.After(now) {
			late = append(late, st)
		} else if !at.IsZero() && (next.IsZero() || at.Before(next)) {
			next = at
		}
	}
	idle := false
	if end := c.idleEndLocked(); len(c.streams) == 0 && !end.IsZero() {
		idle, next = !end.After(now), end
	}
	if !next.IsZero() && !idle {
		c.scheduleLocked(next)
	}
	c.mu.Unlock()
	for _, st := range late {
		st.expire(now)
	}
	if idle {
		c.goAway(true)
		c.fail(errGone)
		_ = c.tls.Close()
	}
}

// inWindow is how much of bodies a client may still send. take belongs to the reading goroutine, give is called under conn.mu;
// both touch the fields under its own lock.
type inWindow struct {
	mu   sync.Mutex
	size int32 // when nothing is under way
	left int32 // guarded by mu: what the client may send
	owed int32 // guarded by mu: what was read and the client does not know of yet
}

// take counts what the client sent; false when it was more than allowed.
func (w *inWindow) take(n int32) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.left -= n
	return w.left >= 0
}

// give counts what was read, and returns by how much to raise the client's window now: zero until it is worth a frame.
func (w *inWindow) give(n int32) int32 {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.owed += n
	if w.owed < w.size/4 {
		return 0
	}
	more := w.owed
	w.owed = 0
	w.left += more
	return more
}
