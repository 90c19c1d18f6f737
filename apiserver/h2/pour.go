package h2

import (
	"errors"

	"golang.org/x/net/http2"
)

const (
	// recordBytes is how much one TLS record encrypts at most: RFC 8446, section 5.1. recordOverhead is what it adds to that.
	recordBytes, recordOverhead = 16 << 10, 5 + 1 + 16
	// batchRecords is how many records of a large body are written at once.
	batchRecords = 8
	// turnBatches is how many batches of one body follow one another while others wait for their turn.
	turnBatches = 4
	// leastPart is the smallest frame that is made so that the next ones begin with a record.
	leastPart = 2 << 10
)

// A Source makes a body: it appends the next limit bytes to out, and fewer only when nothing follows; more says that something may. It must not wait.
type Source func(out []byte, limit int) (data []byte, more bool)

// Pourer is what the response writers of this package implement besides http.ResponseWriter.
type Pourer interface {
	// Pour sends a large body from where it is made: each byte is copied once until it is encrypted, and while the body is
	// sent, by turns with others of its connection, no goroutine is woken for it. It comes after what was written before; its end may wait for more, as that of
	// any answer, for a flush or the handler's return. The answer must have its Content-Type, and no Content-Length. It returns the number of bytes.
	// Errors: the client, its connection or the request's time is gone.
	Pour(s Source) (int64, error)
}

// Pour implements Pourer.
func (w *writer) Pour(s Source) (int64, error) {
	if w.ended || w.declared >= 0 {
		return 0, errors.New("h2: this answer takes no body of unknown size")
	}
	if w.status == 0 {
		w.WriteHeader(200)
	}
	if w.isHead || !w.bodyAllowed() {
		return 0, nil
	}
	if err := w.drain(false); err != nil {
		return 0, err
	}
	n, err := w.stream.conn.pour(w.stream, s)
	w.written += n
	return n, err
}

// pour sends what a source makes, as the client's windows allow.
func (c *conn) pour(st *stream, s Source) (sent int64, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for more := true; more; {
		// It has no turn while it waits for the client.
		if _, err := c.waitLocked(st, 1); err != nil {
			return sent, err
		}
		c.turnLocked()
		var n int64
		n, more = c.pourLocked(st, s)
		sent += n
		if !more && c.mayRestLocked() {
			c.writing = false
		} else {
			c.writeLocked(writeRounds)
		}
	}
	return sent, st.failureLocked()
}

// mayRestLocked reports whether what is pending may wait for the end of an answer.
func (c *conn) mayRestLocked() bool {
	return !c.urged && len(c.turns) == 0 && !c.hasFeedsLocked()
}

// turnLocked waits until this goroutine is the one that writes.
func (c *conn) turnLocked() {
	if !c.writing {
		c.writing = true
		return
	}
	turn := make(chan struct{})
	c.turns = append(c.turns, turn)
	c.mu.Unlock()
	<-turn
	c.mu.Lock()
}

// passLocked lets the next that waits for its turn write; false when there is none.
func (c *conn) passLocked() bool {
	if len(c.turns) == 0 {
		return false
	}
	close(c.turns[0])
	n := copy(c.turns, c.turns[1:])
	c.turns[n] = nil
	c.turns = c.turns[:n]
	return true
}

// pourLocked writes batches of a source, with what others have, until it has no more, the client's windows are full or it is another's turn. Of
// its end it leaves pending what may rest.
func (c *conn) pourLocked(st *stream, s Source) (sent int64, more bool) {
	var scratch []byte
	defer func() { giveBatch(scratch) }()
	for round := 0; round < turnBatches || len(c.turns) == 0; round++ {
		scratch = c.gatherLocked(scratch)
		may := min(st.credit, c.credit, batchRecords*recordBytes)
		if may <= 0 || st.failureLocked() != nil {
			return sent, true
		}
		st.credit -= may
		c.credit -= may
		b, urged := batch{out: c.out, stream: st.id, frame: c.frameSize}, c.urged
		c.out, c.urged = takeBatch(), false
		c.mu.Unlock()
		more := b.fill(s, int(may))
		c.mu.Lock()
		st.credit += may - int64(b.filled)
		c.credit += may - int64(b.filled)
		sent += int64(b.filled)
		if !more && !urged && len(b.out) < batchBytes && c.mayRestLocked() {
			late := c.out
			c.out = append(withRoom(b.out, len(late)), late...)
			giveBatch(late)
			return sent, false
		}
		if c.putLocked(b.out); !more {
			return sent, false
		}
	}
	return sent, true
}

// batch is what is written at once.
type batch struct {
	out    []byte
	stream uint32
	frame  int // largest of the client
	filled int // bytes of the body
}

// fill appends frames of what the source makes, may bytes at most, up to the end of a record; more says that the source has more.
func (b *batch) fill(s Source, may int) (more bool) {
	const whole = batchRecords * recordBytes
	b.out = withRoom(b.out, max(0, whole-len(b.out)))
	for more = true; more && may > 0 && len(b.out) < whole; {
		part := recordBytes - len(b.out)%recordBytes - frameHeader
		if part < leastPart {
			part += recordBytes
		}
		part = min(part, b.frame, may)
		begin := len(b.out)
		b.out, more = s(appendFrame(b.out, part, http2.FrameData, 0, b.stream), part)
		n := len(b.out) - begin - frameHeader
		if n < part {
			_ = appendFrame(b.out[:begin], n, http2.FrameData, 0, b.stream)
		}
		may -= n
		b.filled += n
	}
	return more
}

var _ Pourer = (*writer)(nil)
