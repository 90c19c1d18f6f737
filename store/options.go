package store

import (
	"context"
	"time"

	"k8s.io/apimachinery/pkg/runtime"
)

// Codec turns one object into the bytes that an engine keeps, and back: upstream's storage encoding and encryption at rest.
// Both methods are called concurrently.
type Codec interface {
	// Encode gives the bytes to keep. obj has no resourceVersion. It must not keep or change obj.
	Encode(ctx context.Context, key string, obj runtime.Object) ([]byte, error)
	// Decode gives a fresh object that belongs to the caller; the store sets its resourceVersion to rev afterwards. It must not
	// keep value.
	Decode(ctx context.Context, key string, value []byte, rev int64) (runtime.Object, error)
}

// Clock is the part of k8s.io/utils/clock.Clock that the store uses; any clock.Clock is one.
type Clock interface {
	Now() time.Time
	After(d time.Duration) <-chan time.Time
}

// systemClock is the Clock of the machine.
type systemClock struct{}

func (systemClock) Now() time.Time                         { return time.Now() }
func (systemClock) After(d time.Duration) <-chan time.Time { return time.After(d) }

// Class says how safe an acknowledged write is.
type Class uint8

const (
	// Durable writes are on the disk before they are acknowledged.
	Durable Class = iota
	// Lossy writes have reached the operating system before they are acknowledged: the death of the process loses none, only
	// power loss or a crash of the system can. Leases and events are of this class.
	Lossy
)

// Bounds and their defaults.
const (
	// DefaultWindowEvents is the number of events per table that watches can fall behind.
	DefaultWindowEvents = 16384
	// DefaultWindowAge is how long an event stays in the window (while neither count nor bytes push it out earlier).
	DefaultWindowAge = 3 * time.Minute
	// DefaultWindowBytes bounds the encoded size of the objects that the window of one table keeps.
	DefaultWindowBytes = 32 << 20
	// DefaultPinAge is how long a pinned snapshot is kept after its first Pin, as upstream's compaction.
	DefaultPinAge = 5 * time.Minute
	// DefaultPinCount bounds the pinned snapshots of one table.
	DefaultPinCount = 256
	// DefaultPinBytes bounds the encoded size of the replaced objects that pinned snapshots of one table keep.
	DefaultPinBytes = 64 << 20
	// DefaultEncodingBytes bounds the encodings that all records of the store cache.
	DefaultEncodingBytes = 8 << 20

	// maxReplacedBytes bounds those of them that belong to versions of objects that were replaced or deleted.
	maxReplacedBytes = 2 << 20
	// maxEncodings bounds the kinds of encodings that one record caches; further kinds are made at each call.
	maxEncodings = 8
	// maxBatch bounds the events that one Watch.Next returns.
	maxBatch = 256
	// expiryGrain is the granularity of expiry: objects expire up to this much later than asked, together.
	expiryGrain = time.Second
	// expiryBatch bounds the deletions of one expiry transaction.
	expiryBatch = 128
	// expiryRetry is the pause after an expiry that the engine refused.
	expiryRetry = 10 * time.Second
	// pinGrains is into how many parts PinAge is cut: pins of one state within one part are one, with the time of the first.
	pinGrains = 10
	// trimGrain is the least time between two age-based trims of windows and pins.
	trimGrain = 30 * time.Second
)

// Options are the parts and bounds of a store. A bound of zero means its default.
type Options struct {
	// Engine keeps the data. Required; Store.Close closes it.
	Engine Engine
	// Clock drives expiry and ageing; nil is the system's clock.
	Clock Clock
	// Debug turns the mutation detector on: published objects are hashed, and a changed one panics with its key.
	Debug bool

	PinAge        time.Duration // kept time of a pinned snapshot
	PinCount      int           // pinned snapshots per table
	PinBytes      int64         // bytes of replaced objects that the pins of a table keep
	EncodingBytes int64         // bytes of cached encodings in the whole store
}

func (o *Options) setDefaults() {
	if o.Clock == nil {
		o.Clock = systemClock{}
	}
	o.PinAge = orDefault(o.PinAge, DefaultPinAge)
	o.PinCount = orDefault(o.PinCount, DefaultPinCount)
	o.PinBytes = orDefault(o.PinBytes, DefaultPinBytes)
	o.EncodingBytes = orDefault(o.EncodingBytes, DefaultEncodingBytes)
}

// TableOptions describe one table: everything under one key prefix. A bound of zero means its default.
type TableOptions struct {
	// Prefix of every key, such as "/registry/pods/": begins and ends with a slash; no table's prefix lies within another's.
	Prefix string
	// Codec of the table's values. Required.
	Codec Codec
	// Class of every write to the table.
	Class Class

	WindowEvents int           // events kept for watches
	WindowAge    time.Duration // age up to which they are kept
	WindowBytes  int64         // encoded bytes of the objects that they keep
}

func (o *TableOptions) setDefaults() {
	o.WindowEvents = orDefault(o.WindowEvents, DefaultWindowEvents)
	o.WindowAge = orDefault(o.WindowAge, DefaultWindowAge)
	o.WindowBytes = orDefault(o.WindowBytes, DefaultWindowBytes)
}

func orDefault[T int | int64 | time.Duration](v, def T) T {
	if v <= 0 {
		return def
	}
	return v
}
