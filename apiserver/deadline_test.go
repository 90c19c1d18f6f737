package apiserver

import (
	"context"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

type deadlineTestKey struct{}

// TestDeadlined holds the lazy context to what context.WithDeadline does, asked with and without waiting first.
func TestDeadlined(t *testing.T) {
	for _, waits := range []bool{false, true} {
		for _, c := range []struct {
			name   string
			parent time.Duration // until the parent's own deadline; zero: none
			cancel bool          // the parent
			after  time.Duration
			want   error
		}{
			{"runs", 0, false, 9 * time.Second, nil},
			{"is late", 0, false, 10 * time.Second, context.DeadlineExceeded},
			{"parent is cancelled", 0, true, time.Second, context.Canceled},
			{"parent is late", 5 * time.Second, false, 6 * time.Second, context.DeadlineExceeded},
			{"parent has more time", time.Minute, false, 9 * time.Second, nil},
			{"is late before its parent", time.Minute, false, 11 * time.Second, context.DeadlineExceeded},
		} {
			t.Run(c.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { tryDeadlined(t, waits, c.parent, c.cancel, c.after, c.want) })
			})
		}
	}
}

func tryDeadlined(t *testing.T, waits bool, patience time.Duration, cancelParent bool, after time.Duration, want error) {
	parent, cancel := context.WithCancel(context.WithValue(t.Context(), deadlineTestKey{}, "v"))
	defer cancel()
	if patience > 0 {
		var stop context.CancelFunc
		parent, stop = context.WithTimeout(parent, patience)
		defer stop()
	}
	at := time.Now().Add(10 * time.Second)
	usual, stop := context.WithDeadline(parent, at)
	defer stop()
	lazy := newDeadlined(parent, at)
	defer lazy.stop()
	var child context.Context = lazy
	if waits {
		var stop context.CancelFunc
		child, stop = context.WithCancel(lazy) // which asks for Done
		defer stop()
		require.NotNil(t, lazy.timed.Load())
	}
	if cancelParent {
		cancel()
	}
	time.Sleep(after)
	synctest.Wait()
	for _, ctx := range []context.Context{lazy, child} {
		require.Equal(t, want, ctx.Err())
		require.Equal(t, usual.Err(), ctx.Err())
		require.Equal(t, "v", ctx.Value(deadlineTestKey{}))
		then, ok := ctx.Deadline()
		usually, _ := usual.Deadline()
		require.True(t, ok)
		require.Equal(t, usually, then)
		select {
		case <-ctx.Done():
			require.Error(t, want)
		default:
			require.NoError(t, want)
		}
	}
	lazy.stop()
	if want == nil {
		want = context.Canceled
	}
	require.Equal(t, want, lazy.Err(), "somebody has asked for Done: a stop is seen")
}

// timedWriter is a response writer of others that has deadlines.
type timedWriter struct {
	http.ResponseWriter
	read, write time.Time
}

func (w *timedWriter) SetReadDeadline(at time.Time) error  { w.read = at; return nil }
func (w *timedWriter) SetWriteDeadline(at time.Time) error { w.write = at; return nil }

// around is a writer around another.
type around struct{ http.ResponseWriter }

func (a around) Unwrap() http.ResponseWriter { return a.ResponseWriter }

func TestDeadlinesOfWrappedWriters(t *testing.T) {
	var w timedWriter
	read, write := time.Unix(1, 0), time.Unix(2, 0)
	setDeadlines(around{&w}, read, write)
	require.Equal(t, read, w.read)
	require.Equal(t, write, w.write)
}
