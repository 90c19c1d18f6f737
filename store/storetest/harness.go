package storetest

import (
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"knarr/store"
)

// patience bounds every wait of a test.
const patience = 20 * time.Second

// Crash is a way to stop.
type Crash int

const (
	// ProcessDeath loses what was not handed to the operating system.
	ProcessDeath Crash = iota
	// PowerLoss loses any part of what was not synced.
	PowerLoss
)

// Harness is one engine's storage, which outlives engines opened on it.
type Harness interface {
	// Open opens an engine on the storage.
	Open() (store.Engine, error)
	// Crash takes the storage's state as a crash at this very moment would leave it; the next Open finds that state. The engine opened
	// before goes on in a world of its own and is to be closed by the caller.
	Crash(how Crash, rng *rand.Rand)
}

// Traits are what the contract leaves to an engine. A Harness that has a method Traits() Traits names its engine's; else all are false.
type Traits struct {
	// OneRevision: all operations of a transaction have one revision.
	OneRevision bool
	// NothingLossy: Lossy tables are as safe as Durable ones, so that an unclean stop ends none of their watches.
	NothingLossy bool
	// OwnExpiry: after a restart it is the engine that deletes what expires, by a clock of its own.
	OwnExpiry bool
}

// step is the distance of two neighbours' revisions within one transaction.
func (tr Traits) step() int64 {
	if tr.OneRevision {
		return 0
	}
	return 1
}

// Factory makes a Harness with empty storage.
type Factory func(t testing.TB) Harness

// Tables of the suite.
const (
	Pods   = "/registry/pods/"
	Leases = "/registry/leases/"
)

// Codec is the suite's codec: JSON.
type Codec struct{}

// Encode implements store.Codec.
func (Codec) Encode(_ context.Context, _ string, obj runtime.Object) ([]byte, error) {
	if obj.(*metav1.PartialObjectMetadata).ResourceVersion != "" {
		return nil, errors.New("the store must clear the resourceVersion before encoding")
	}
	return json.Marshal(obj)
}

// Decode implements store.Codec.
func (Codec) Decode(_ context.Context, _ string, value []byte, _ int64) (runtime.Object, error) {
	obj := &metav1.PartialObjectMetadata{}
	return obj, json.Unmarshal(value, obj)
}

// Object makes an object with a content to recognize it by.
func Object(name, content string) *metav1.PartialObjectMetadata {
	return &metav1.PartialObjectMetadata{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{
			Name: name, Namespace: "default", UID: types.UID("uid-" + name),
			Labels: map[string]string{"content": content},
		},
	}
}

// Content returns what Object put in; "" for nil.
func Content(r *store.Record) string {
	if r == nil {
		return ""
	}
	return r.Object.(*metav1.PartialObjectMetadata).Labels["content"]
}

// Clock is a clock that moves when it is told to.
type Clock struct {
	mu     sync.Mutex
	now    time.Time
	timers []clockTimer
}

type clockTimer struct {
	at time.Time
	ch chan time.Time
}

// NewClock returns a clock that stands at some time.
func NewClock() *Clock { return &Clock{now: time.Unix(1_800_000_000, 0)} }

// Now implements store.Clock.
func (c *Clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

// After implements store.Clock.
func (c *Clock) After(d time.Duration) <-chan time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	ch := make(chan time.Time, 1)
	if d <= 0 {
		ch <- c.now
		return ch
	}
	c.timers = append(c.timers, clockTimer{c.now.Add(d), ch})
	return ch
}

// Advance moves the clock.
func (c *Clock) Advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
	var rest []clockTimer
	for _, t := range c.timers {
		if t.at.After(c.now) {
			rest = append(rest, t)
		} else {
			t.ch <- c.now
		}
	}
	c.timers = rest
}

// Seed returns KNARR_SEED or a fresh seed, and prints it.
func Seed(t testing.TB) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("KNARR_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("KNARR_SEED: %v", err)
		}
		seed = n
	}
	t.Logf("KNARR_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// env is an open store with the suite's two tables.
type env struct {
	t       testing.TB
	ctx     context.Context
	h       Harness
	traits  Traits
	clock   *Clock
	options store.Options
	window  int // events, 0: default

	s            *store.Store
	pods, leases *store.Table
}

func newEnv(t testing.TB, f Factory, change ...func(*env)) *env {
	ctx, cancel := context.WithTimeout(context.Background(), 10*patience)
	t.Cleanup(cancel)
	e := &env{t: t, ctx: ctx, h: f(t), clock: NewClock()}
	if h, ok := e.h.(interface{ Traits() Traits }); ok {
		e.traits = h.Traits()
	}
	for _, c := range change {
		c(e)
	}
	e.open()
	t.Cleanup(func() { e.s.Close() })
	return e
}

func (e *env) open() {
	e.t.Helper()
	engine, err := e.h.Open()
	must(e.t, err)
	o := e.options
	o.Engine, o.Clock, o.Debug = engine, e.clock, true
	e.s, err = store.Open(e.ctx, o)
	must(e.t, err)
	e.pods = e.table(Pods, store.Durable)
	e.leases = e.table(Leases, store.Lossy)
}

func (e *env) table(prefix string, class store.Class) *store.Table {
	e.t.Helper()
	t, err := e.s.OpenTable(e.ctx, store.TableOptions{Prefix: prefix, Codec: Codec{}, Class: class, WindowEvents: e.window})
	must(e.t, err)
	return t
}

// reopen stops cleanly and starts again.
func (e *env) reopen() {
	e.t.Helper()
	must(e.t, e.s.Close())
	e.open()
}

// crash stops uncleanly and starts again.
func (e *env) crash(how Crash, rng *rand.Rand) {
	e.t.Helper()
	old := e.s
	e.h.Crash(how, rng)
	old.Close()
	e.open()
}

// put writes an object unconditionally.
func (e *env) put(t *store.Table, name, content string) *store.Record {
	e.t.Helper()
	key := t.Prefix() + "default/" + name
	expect := int64(0)
	if r := t.Get(key); r != nil {
		expect = r.Revision
	}
	out, err := e.s.Txn(e.ctx, store.Op{Table: t, Key: key, Object: Object(name, content), Expect: expect})
	must(e.t, err)
	return out[0]
}

// del deletes an object that is there.
func (e *env) del(t *store.Table, name string) *store.Record {
	e.t.Helper()
	key := t.Prefix() + "default/" + name
	out, err := e.s.Txn(e.ctx, store.Op{Table: t, Key: key, Expect: t.Get(key).Revision})
	must(e.t, err)
	return out[0]
}

func (e *env) watch(t *store.Table, prefix string, from int64) *store.Watch {
	e.t.Helper()
	w, err := t.Watch(prefix, from)
	must(e.t, err)
	e.t.Cleanup(w.Stop)
	return w
}

// next reads exactly n events.
func (e *env) next(w *store.Watch, n int) []store.Event {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(e.ctx, patience)
	defer cancel()
	var out []store.Event
	for len(out) < n {
		evs, err := w.Next(ctx)
		if err != nil {
			e.t.Fatalf("after %d of %d events: %v", len(out), n, err)
		}
		out = append(out, evs...)
	}
	if len(out) != n {
		e.t.Fatalf("got %d events, want %d", len(out), n)
	}
	return out
}

func (e *env) noEvents(w *store.Watch) {
	e.t.Helper()
	evs, err := w.TryNext()
	must(e.t, err)
	if len(evs) != 0 {
		e.t.Fatalf("unexpected events: %s", describe(evs))
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func equal[T comparable](t testing.TB, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Fatalf("%s: got %v, want %v", what, got, want)
	}
}

func describe(evs []store.Event) string {
	out := ""
	for _, ev := range evs {
		out += ev.Type.String() + " " + ev.Record.Key + "@" + strconv.FormatInt(ev.Revision, 10) + "=" + Content(ev.Record) + "; "
	}
	return out
}
