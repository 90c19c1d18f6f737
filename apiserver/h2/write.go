package h2

import (
	"encoding/binary"
	"sync"
	"time"

	"golang.org/x/net/http2"
)

// batchBytes is how much of an answer gathers before it is written; a batch that others fill too gets larger.
const batchBytes = 64 << 10

// Buffers for what is written at once, of two sizes: a connection has some only while it writes, and a large one only where it needs it. The
// pools hold arrays, as slices would have to be boxed each time.
var batches, largeBatches = sync.Pool{New: func() any { return new([smallBatch]byte) }}, sync.Pool{New: func() any { return new([largeBatch]byte) }}

const (
	// smallBatch has room for a record of TLS and what a feed goes beyond its piece.
	smallBatch = 24 << 10
	// largeBatch has room for all that handlers may add, and a frame more.
	largeBatch = maxBodies + 2*frameBytes
)

// takeBatch gives an empty buffer.
func takeBatch() []byte { return batches.Get().(*[smallBatch]byte)[:0] }

// withRoom gives a buffer with the same content and room for n bytes more, as far as that is in its hands.
func withRoom(b []byte, n int) []byte {
	if cap(b)-len(b) >= n || len(b)+n > largeBatch {
		return b
	}
	large := append(largeBatches.Get().(*[largeBatch]byte)[:0], b...)
	giveBatch(b)
	return large
}

// giveBatch gives a buffer back for others to use; those that grew by themselves are left to the collector.
func giveBatch(b []byte) {
	switch cap(b) {
	case largeBatch:
		largeBatches.Put((*[largeBatch]byte)(b[:largeBatch]))
	case smallBatch:
		batches.Put((*[smallBatch]byte)(b[:smallBatch]))
	}
}

// frameHeader is the size of a frame's header: RFC 9113, section 4.1.
const frameHeader = 9

// appendFrame appends a frame's header.
func appendFrame(out []byte, size int, kind http2.FrameType, flags http2.Flags, stream uint32) []byte {
	return append(out, byte(size>>16), byte(size>>8), byte(size), byte(kind), byte(flags),
		byte(stream>>24), byte(stream>>16), byte(stream>>8), byte(stream))
}

// appendUint32Frame appends a frame whose payload is one number.
func appendUint32Frame(out []byte, kind http2.FrameType, stream, v uint32) []byte {
	return binary.BigEndian.AppendUint32(appendFrame(out, 4, kind, 0, stream), v)
}

func appendGoAway(out []byte, last uint32, code http2.ErrCode) []byte {
	out = appendFrame(out, 8, http2.FrameGoAway, 0, 0)
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(out, last), uint32(code))
}

func appendSettings(out []byte, settings ...http2.Setting) []byte {
	out = appendFrame(out, 6*len(settings), http2.FrameSettings, 0, 0)
	for _, s := range settings {
		out = binary.BigEndian.AppendUint16(out, uint16(s.ID))
		out = binary.BigEndian.AppendUint32(out, s.Val)
	}
	return out
}

// appendHeaders appends a header block in as many frames as it needs.
func appendHeaders(out []byte, stream uint32, block []byte, end bool, frameSize int) []byte {
	kind, flags := http2.FrameHeaders, http2.Flags(0)
	if end {
		flags = http2.FlagHeadersEndStream
	}
	for {
		n := min(len(block), frameSize)
		if n == len(block) {
			flags |= http2.FlagHeadersEndHeaders
		}
		out = append(appendFrame(out, n, kind, flags, stream), block[:n]...)
		if block = block[n:]; len(block) == 0 {
			return out
		}
		kind, flags = http2.FrameContinuation, 0
	}
}

// appendData appends one DATA frame.
func appendData(out []byte, stream uint32, data []byte, end bool) []byte {
	flags := http2.Flags(0)
	if end {
		flags = http2.FlagDataEndStream
	}
	return append(appendFrame(out, len(data), http2.FrameData, flags, stream), data...)
}

// flush writes what is pending, unless somebody does already, who takes it along.
func (c *conn) flush() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.flushLocked()
}

func (c *conn) flushLocked() {
	if c.writing || len(c.out) == 0 && !c.hasFeedsLocked() || c.err != nil {
		c.urged = c.urged || c.writing && len(c.out) > 0
		return
	}
	c.writing = true
	c.writeLocked(writeRounds)
}

// writeLocked writes until nothing is pending and no feed has anything. Where a body waits for its turn, whoever sends that takes the rest along. After
// some rounds it hands the rest to a goroutine, as its caller has other things to do.
func (c *conn) writeLocked(rounds int) {
	var scratch []byte
	for {
		if c.passLocked() {
			giveBatch(scratch)
			return
		}
		if scratch = c.gatherLocked(scratch); len(c.out) == 0 || c.err != nil {
			break
		}
		if rounds == 0 {
			giveBatch(scratch)
			go func() {
				c.mu.Lock()
				defer c.mu.Unlock()
				c.writeLocked(-1)
			}()
			return
		}
		rounds--
		pending := c.out
		c.out = takeBatch()
		c.putLocked(pending)
	}
	giveBatch(scratch)
	giveBatch(c.out)
	c.out, c.writing, c.urged = nil, false, false
}

// putLocked writes a batch, without the lock, and lets those go on who waited for room.
func (c *conn) putLocked(b []byte) {
	c.mu.Unlock()
	err := c.write(b)
	giveBatch(b)
	c.mu.Lock()
	if err != nil && c.err == nil {
		c.err = err
		_ = c.tls.Close() // the reading goroutine shall notice
	}
	c.room.Broadcast()
}

// write puts bytes on the wire: one TLS write, and one system call where the socket can gather.
func (c *conn) write(p []byte) error {
	c.putOff()
	if c.socket == nil {
		_, err := c.tls.Write(p)
		return err
	}
	c.socket.hold()
	_, err := c.tls.Write(p)
	if e := c.socket.release(); err == nil {
		err = e
	}
	return err
}

// putOff gives the client WriteTimeout from now on, and up to an eighth more: setting a deadline moves a timer, which need not be done for
// each write.
func (c *conn) putOff() {
	now, spare := time.Now(), c.server.WriteTimeout/8
	if c.writeBy.Sub(now) < c.server.WriteTimeout {
		c.writeBy = now.Add(c.server.WriteTimeout + spare)
		_ = c.tls.SetWriteDeadline(c.writeBy)
	}
}

// sendHeaders sends a header block, with end as the whole answer.
func (c *conn) sendHeaders(st *stream, block []byte, end bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if st.err != nil || c.err != nil {
		return
	}
	c.beginLocked()
	c.out = appendHeaders(c.out, st.id, block, end, c.frameSize)
	st.endedSending = end
	c.flushLocked()
}

// beginLocked gives what is pending a buffer to be in.
func (c *conn) beginLocked() {
	if cap(c.out) == 0 {
		c.out = takeBatch()
	}
}

// send appends header block (nil: sent already) and data to what is pending, as the client's windows allow, waiting where they do not.
// It writes when told to, or when enough has gathered.
func (c *conn) send(st *stream, block, data []byte, end, flush bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := st.failureLocked(); err != nil {
		return err
	}
	if block != nil {
		c.beginLocked()
		c.out = appendHeaders(c.out, st.id, block, end && len(data) == 0, c.frameSize)
		end = end && len(data) > 0
	}
	for len(data) > 0 || end {
		n, err := c.waitLocked(st, len(data))
		if err != nil {
			return err
		}
		c.beginLocked()
		c.out = appendData(withRoom(c.out, n+frameHeader), st.id, data[:n], end && n == len(data))
		c.credit -= int64(n)
		st.credit -= int64(n)
		end = end && n < len(data)
		data = data[n:]
		if len(c.out) >= batchBytes {
			c.flushLocked()
		}
	}
	if flush {
		c.flushLocked()
	}
	return nil
}

// waitLocked waits until some of n bytes may be sent and says how many. Nothing (n is 0) may always be sent.
func (c *conn) waitLocked(st *stream, n int) (int, error) {
	for {
		if err := st.failureLocked(); err != nil {
			return 0, err
		}
		may := min(int64(n), st.credit, c.credit, int64(c.frameSize))
		if n == 0 || may > 0 && len(c.out) < maxBodies {
			return int(may), nil
		}
		if len(c.out) > 0 && !c.writing {
			c.flushLocked() // lets go of the lock meanwhile: look again
			continue
		}
		c.room.Wait()
	}
}

// failureLocked is why the stream can send no more.
func (st *stream) failureLocked() error {
	if st.err != nil {
		return st.err
	}
	return st.conn.err
}
