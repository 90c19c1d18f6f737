package h2

import (
	"errors"
	"slices"
	"time"
)

// pieceBytes is how much a feed is asked for at a time, so that none keeps the others of its connection waiting.
const pieceBytes = 16 << 10

// Feed makes the rest of an answer's body whenever the connection can take more of it: for answers that go on for long and send little at a
// time, as watches do. Whoever writes to the connection asks all its feeds that have something, so what they have leaves in one TLS record
// and one system call, and no goroutine is woken for each. What a client does not take in is not made.
type Feed interface {
	// Pending reports whether Next may have something. It must be quick and take no lock: it is called while the connection's is held. Calls do not
	// overlap with each other's, nor with Next's.
	Pending() bool
	// Next appends to out what there is to send, at least one byte where there is any, and stops soon after limit bytes; more says that it
	// stopped there. It must not wait. Calls follow one another, from changing goroutines that hold no lock of the connection.
	Next(out []byte, limit int) (data []byte, more bool)
}

// Feeder is what the response writers of this package implement besides http.ResponseWriter.
type Feeder interface {
	// StartFeed hands the body over to f. Until StopFeed nobody may write. Wake of the waker says that f may have something to send: anybody may
	// call it, at any time, the first time too; it does not wait. All feeds of a connection have the same waker: one call is enough for all of
	// them. A client that takes in nothing for stall, while there is something for it, has its stream reset; zero: never.
	StartFeed(f Feed, stall time.Duration) (waker Waker, err error)
	// StopFeed takes the body back: f is not asked any more when it returns, and what f has given is on its way.
	StopFeed() error
}

// Waker has what feeds have written. It may be compared and be a key of maps.
type Waker interface {
	// Wake is told how many wakers, itself one of them, the same is said to: where these are many, what follows within a few milliseconds
	// leaves together.
	Wake(among int)
}

// feeding is the state of a stream with a feed. Guarded by conn.mu.
type feeding struct {
	feed    Feed          // nil: the handler writes
	rest    []byte        // of what the feed gave: what the client's windows had no room for
	starved bool          // has a rest and waits for the client to open a window
	asking  bool          // Next is running
	stall   time.Duration // how long the client may take in nothing
}

// StartFeed implements Feeder.
func (w *writer) StartFeed(f Feed, stall time.Duration) (Waker, error) {
	if w.ended || w.isHead {
		return nil, errors.New("h2: this answer has no body to feed")
	}
	if err := w.FlushError(); err != nil {
		return nil, err
	}
	st := w.stream
	st.conn.mu.Lock()
	defer st.conn.mu.Unlock()
	st.feeding = feeding{feed: f, stall: stall}
	st.conn.fedLocked(st)
	return st.conn, nil
}

// StopFeed implements Feeder.
func (w *writer) StopFeed() error {
	st, c := w.stream, w.stream.conn
	c.mu.Lock()
	st.feed = nil
	i := slices.Index(c.fed, st)
	c.fed = slices.Delete(c.fed, i, i+1)
	if len(c.fed) == 0 {
		c.due.Signal()
	}
	for st.asking {
		c.room.Wait()
	}
	rest := st.rest
	st.rest = nil
	c.mu.Unlock()
	if len(rest) == 0 {
		return nil
	}
	stalled, never := time.Now().Add(st.stall), time.Time{}
	st.setDeadlines(nil, &stalled)
	defer st.setDeadlines(nil, &never)
	return c.send(st, nil, rest, false, true)
}

// fedLocked adds a feed and has a goroutine for the writing of the first: one that stays, as a new one for each write would have to
// grow its stack each time.
func (c *conn) fedLocked(st *stream) {
	c.fed = append(c.fed, st)
	if !c.feeding {
		c.feeding = true
		go c.writeFeeds()
	}
}

// writeFeeds writes what feeds have while nobody else writes, until the connection has no feed any more.
func (c *conn) writeFeeds() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.fed) > 0 && c.err == nil {
		if c.writing || !c.hasFeedsLocked() {
			c.due.Wait()
			continue
		}
		c.writing = true
		c.writeLocked(-1)
	}
	c.feeding = false
}

// Wake implements Waker. Who finds that others have called meanwhile leaves it to them: whoever writes looks at all feeds after it has taken
// notice of a call.
func (c *conn) Wake(among int) {
	if c.woken.Load() || c.woken.Swap(true) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.crowded = among >= feedCrowd
	c.offerLocked()
}

// offerLocked has feeds asked, if any are to be and nobody writes, who would do it.
func (c *conn) offerLocked() {
	if !c.writing && c.hasFeedsLocked() {
		c.due.Signal()
	}
}

// openedLocked goes on with a stream whose client has opened a window.
func (st *stream) openedLocked() {
	if st.starved && st.credit > 0 && st.conn.credit > 0 {
		st.starved = false
		st.conn.woken.Store(true)
	}
}

// openedLocked does so for all streams, after the connection's window was opened.
func (c *conn) openedLocked() {
	if !c.hungry {
		return
	}
	c.hungry = false
	for _, st := range c.streams {
		st.openedLocked()
	}
}

// hasFeedsLocked reports whether feeds are to be asked.
func (c *conn) hasFeedsLocked() bool {
	return c.woken.Load() && !c.resting && len(c.fed) > 0 && c.err == nil
}

// gatherLocked asks feeds until a batch is full or nothing is left, and then perhaps not for a while. Only the goroutine that writes may call it; it
// lets go of the lock meanwhile. scratch is for what a feed gives; it is returned, grown perhaps, for the next time.
func (c *conn) gatherLocked(scratch []byte) []byte {
	asked := false
	for c.hasFeedsLocked() && len(c.out) < batchBytes {
		asked = true
		c.woken.Store(false)
		for n := len(c.fed); n > 0 && len(c.fed) > 0; n-- {
			if len(c.out) >= batchBytes {
				c.woken.Store(true) // not all were asked
				break
			}
			c.turn = (c.turn + 1) % len(c.fed)
			if st := c.fed[c.turn]; !st.starved && st.err == nil && (len(st.rest) > 0 || st.feed.Pending()) {
				scratch = c.askLocked(st, scratch)
			}
		}
	}
	if asked && c.crowded && !c.woken.Load() {
		c.server.rests.add(c)
	}
	return scratch
}

// askLocked sends what a stream has left over, or else what its feed has.
func (c *conn) askLocked(st *stream, scratch []byte) []byte {
	data, more := st.rest, true
	if len(data) == 0 {
		scratch, more = c.nextLocked(st, scratch)
		data = scratch
	}
	if st.err != nil || c.err != nil {
		st.rest = nil
		return scratch
	}
	left := c.dataLocked(st, data)
	switch {
	case len(left) == 0:
		st.rest = nil
	case len(st.rest) > 0:
		st.rest = left
	default:
		st.rest = append([]byte(nil), left...)
	}
	if len(left) > 0 && (st.credit <= 0 || c.credit <= 0) {
		st.starved = true
		c.hungry = c.hungry || c.credit <= 0
		st.stallLocked()
	} else if len(left) > 0 || more {
		c.woken.Store(true)
	}
	return scratch
}

// nextLocked asks a stream's feed, without the lock. Of a client that takes nothing now it learns only whether there is something.
func (c *conn) nextLocked(st *stream, scratch []byte) ([]byte, bool) {
	limit := pieceBytes
	if st.credit <= 0 || c.credit <= 0 {
		limit = 1
	}
	if scratch == nil {
		scratch = takeBatch()
	}
	feed := st.feed
	st.asking = true
	c.mu.Unlock()
	data, more := feed.Next(scratch[:0], limit)
	c.mu.Lock()
	st.asking = false
	if st.feed == nil {
		c.room.Broadcast() // StopFeed waits, and sends what is left of this
	}
	return data, more
}

// dataLocked appends DATA frames as the windows and the bound of what is pending allow, and returns what is left of data.
func (c *conn) dataLocked(st *stream, data []byte) []byte {
	n := int(max(0, min(int64(len(data)), st.credit, c.credit, int64(maxBodies-len(c.out)))))
	if n == 0 {
		return data
	}
	st.credit -= int64(n)
	c.credit -= int64(n)
	st.writeBy = time.Time{} // it takes in something
	c.beginLocked()
	for left := n; left > 0; {
		part := min(left, c.frameSize)
		c.out = appendData(withRoom(c.out, part+frameHeader), st.id, data[:part], false)
		data, left = data[part:], left-part
	}
	return data
}

// stallLocked begins to count the time in which the client takes in nothing.
func (st *stream) stallLocked() {
	if st.writeBy.IsZero() && st.feed != nil && st.stall > 0 {
		st.writeBy = time.Now().Add(st.stall)
		st.conn.scheduleLocked(st.writeBy)
	}
}

var _ Feeder = (*writer)(nil)
