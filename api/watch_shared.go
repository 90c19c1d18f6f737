package api

import "sync/atomic"

const (
	// sharedChanges is how many of the newest changes are kept as encoded: watches that lag behind by more encode anew.
	sharedChanges = 16
	// sharedBytes is up to which size: of larger ones, copying costs as much as encoding.
	sharedBytes = 8 << 10
)

// Encoder encodes changes.
type Encoder interface {
	// AppendChange appends what tells a client of the change.
	AppendChange(out []byte, c Change) ([]byte, error)
}

// sharedEncodings are the newest changes as all watches of one prefix send them, by the position before each.
type sharedEncodings [sharedChanges]atomic.Pointer[sharedEncoding]

// sharedEncoding is one change. It takes a watch from one position to another.
type sharedEncoding struct {
	from, to uint64
	revision int64
	data     []byte
}

func (s *sharedEncodings) at(position uint64) *sharedEncoding {
	if e := s[position%sharedChanges].Load(); e != nil && e.from == position {
		return e
	}
	return nil
}

// put remembers a change, unless a newer one has its place.
func (s *sharedEncodings) put(from, to uint64, revision int64, data []byte) {
	place := &s[from%sharedChanges]
	if old := place.Load(); len(data) > sharedBytes || old != nil && old.from >= from {
		return
	}
	place.Store(&sharedEncoding{from, to, revision, append([]byte(nil), data...)})
}

// Share has AppendNext take what another watch has encoded, where this one wants all of its prefix: of all watches with the same encoding, which
// must be comparable and tell all that changes are encoded by. To be called before the first change is taken.
func (c *Changes) Share(encoding any) {
	if c.sel.Exact || !c.sel.empty() {
		return
	}
	c.shared, _ = c.watch.Shared(encoding, func() any { return new(sharedEncodings) }).(*sharedEncodings)
}

// AppendNext appends the next change, encoded; ok is false when there is none now. Errors: those of Next and of the encoder.
func (c *Changes) AppendNext(out []byte, encoder Encoder) (_ []byte, ok bool, err error) {
	if !c.Pending() {
		return out, false, nil
	}
	if c.shared == nil {
		change, ok, err := c.next(changesAtOnce)
		if !ok || err != nil {
			return out, false, err
		}
		out, err = encoder.AppendChange(out, change)
		return out, true, err
	}
	from := c.watch.Position()
	if known := c.shared.at(from); known != nil {
		c.watch.Skip(known.to, known.revision)
		c.revision = known.revision
		return append(out, known.data...), true, nil
	}
	change, ok, err := c.next(1)
	if !ok || err != nil {
		return out, false, err
	}
	begin := len(out)
	if out, err = encoder.AppendChange(out, change); err == nil {
		c.shared.put(from, c.watch.Position(), change.Revision, out[begin:])
	}
	return out, true, err
}
