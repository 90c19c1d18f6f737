package h2

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/http2"
)

// lines is a feed of what a test appends.
type lines struct {
	mu    sync.Mutex
	text  []string // guarded by mu
	ended bool     // guarded by mu: nothing follows
	done  chan struct{}
	among int          // how many are woken with the one that reads this
	asked atomic.Int64 // how often Next was called
	some  atomic.Bool  // there is text
}

func newLines(text ...string) *lines {
	l := &lines{text: text, among: 1, done: make(chan struct{})}
	l.some.Store(len(text) > 0)
	return l
}

func (l *lines) add(line string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text = append(l.text, line)
	l.some.Store(true)
}

// Pending implements Feed.
func (l *lines) Pending() bool { return l.some.Load() }

// Next implements Feed.
func (l *lines) Next(out []byte, limit int) ([]byte, bool) {
	l.asked.Add(1)
	l.mu.Lock()
	defer l.mu.Unlock()
	for begin := len(out); len(l.text) > 0; l.text = l.text[1:] {
		if len(out)-begin >= limit {
			return out, true
		}
		if l.text[0] == "" {
			if !l.ended {
				l.ended = true
				close(l.done)
			}
			continue
		}
		out = append(out, l.text[0]...)
	}
	l.some.Store(false)
	return out, false
}

// pour serves a feed until it ends, or the client is gone.
func pour(w http.ResponseWriter, r *http.Request, l *lines, stall time.Duration, started func(wake func())) error {
	feeder := w.(Feeder)
	waker, err := feeder.StartFeed(l, stall)
	if err != nil {
		return err
	}
	if started != nil {
		started(func() { waker.Wake(l.among) })
	}
	waker.Wake(l.among)
	select {
	case <-l.done:
	case <-r.Context().Done():
	}
	return feeder.StopFeed()
}

// TestFeeds has many streams of one connection fed at the same time: each client reads everything, in order, to the end.
func TestFeeds(t *testing.T) {
	const streams, count = 40, 300
	for _, foreign := range []bool{false, true} {
		var all sync.WaitGroup
		var streamed atomic.Int64
		s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			l := newLines("0\n")
			l.among = 1 + int(streamed.Add(1)%2)*feedCrowd // some have the connection rest, others not
			_ = pour(w, r, l, time.Minute, func(wake func()) {
				all.Go(func() {
					for i := 1; i < count; i++ {
						size := i % 50
						if i%60 == 0 {
							size = 200_000
						}
						l.add(fmt.Sprint(i, strings.Repeat(" ", size), "\n"))
						wake()
					}
					l.add("")
					wake()
				})
			})
		}), testOptions(), foreign)
		c := client(t)
		for range streams {
			all.Go(func() {
				resp, err := c.Get("https://" + s.address)
				if err != nil {
					t.Error(err)
					return
				}
				defer resp.Body.Close()
				r := bufio.NewReader(resp.Body)
				for i := range count {
					line, err := r.ReadString('\n')
					if err != nil || strings.TrimSpace(line) != fmt.Sprint(i) {
						t.Errorf("line %d: %.20q, %v", i, line, err)
						return
					}
				}
				if _, err := r.ReadByte(); err != io.EOF {
					t.Errorf("after the last line: %v", err)
				}
			})
		}
		all.Wait()
	}
}

// expectData reads DATA frames of a stream until the text is whole.
func (p *peerRig) expectData(t *testing.T, id uint32, text string) {
	t.Helper()
	got := ""
	for len(got) < len(text) {
		d, ok := p.next(t).(*http2.DataFrame)
		require.True(t, ok)
		require.Equal(t, id, d.StreamID)
		got += string(d.Data())
	}
	require.Equal(t, text, got)
}

// expectQuiet sends a PING and wants nothing but the answer to it.
func (p *peerRig) expectQuiet(t *testing.T) {
	t.Helper()
	require.NoError(t, p.WritePing(false, [8]byte{1}))
	f, ok := p.next(t).(*http2.PingFrame)
	require.True(t, ok && f.IsAck())
}

// TestFeedsRest has one stream told of many changes in a row, first alone and then with many connections: then it is asked for what is new once
// in a rest at most, and misses nothing.
func TestFeedsRest(t *testing.T) {
	const count = 400
	for _, among := range []int{1, feedCrowd} {
		l := newLines("0\n")
		l.among = among
		s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_ = pour(w, r, l, time.Minute, func(wake func()) {
				go func() {
					for i := 1; i < count; i++ {
						time.Sleep(100 * time.Microsecond)
						l.add(fmt.Sprint(i, "\n"))
						wake()
					}
					l.add("")
					wake()
				}()
			})
		}), testOptions(), false)
		begin := time.Now()
		resp, err := client(t).Get("https://" + s.address)
		require.NoError(t, err)
		defer resp.Body.Close()
		r := bufio.NewReader(resp.Body)
		for i := range count {
			line, err := r.ReadString('\n')
			require.NoError(t, err)
			require.Equal(t, fmt.Sprint(i, "\n"), line)
		}
		_, err = r.ReadByte()
		require.ErrorIs(t, err, io.EOF)
		rests := int64(time.Since(begin)/feedRest) + 3 // before the first, during the last, and of StopFeed
		if among == feedCrowd {
			require.LessOrEqual(t, l.asked.Load(), rests)
		}
		require.Eventually(t, func() bool {
			s.own.rests.mu.Lock()
			defer s.own.rests.mu.Unlock()
			return len(s.own.rests.conns) == 0
		}, testTimeout, time.Millisecond, "nobody rests for ever")
	}
}

// TestFeedsKeepToWindows gives a client no more than it takes: of a stream, of the connection, and of what is left at the end.
func TestFeedsKeepToWindows(t *testing.T) {
	const long = 70_000
	l := newLines()
	wakes, results := make(chan func(), 1), make(chan error, 1)
	s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		results <- pour(w, r, l, time.Minute, func(wake func()) { wakes <- wake })
	}), testOptions(), false)
	p := dial(t, s, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 10})
	p.open(t, 1, true, p.get("/"))
	p.expectStatus(t, 1, "200")
	wake := <-wakes
	l.add("0123456789abcde")
	wake()
	p.expectData(t, 1, "0123456789")
	l.add("f")
	wake()
	p.expectQuiet(t)
	require.NoError(t, p.WriteWindowUpdate(1, 3))
	p.expectData(t, 1, "abc")
	p.expectQuiet(t)
	require.NoError(t, p.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 13}))
	p.expectData(t, 1, "def")
	require.NoError(t, p.WriteWindowUpdate(1, 1<<20))
	l.add(strings.Repeat("x", long))
	wake()
	p.expectData(t, 1, strings.Repeat("x", 65535-16))
	p.expectQuiet(t)
	require.NoError(t, p.WriteWindowUpdate(0, 4))
	p.expectData(t, 1, "xxxx")
	l.add("last")
	l.add("")
	require.NoError(t, p.WriteWindowUpdate(0, long-65535+16-4-1))
	p.expectData(t, 1, strings.Repeat("x", long-65535+16-4-1))
	p.expectQuiet(t)
	require.NoError(t, p.WriteWindowUpdate(0, 100))
	p.expectData(t, 1, "xlast")
	end, ok := p.next(t).(*http2.DataFrame)
	require.True(t, ok && end.StreamEnded() && len(end.Data()) == 0)
	require.NoError(t, <-results)
}

// TestWindowsAtOnce opens windows by frames that come several in a record, cut anywhere, and among others.
func TestWindowsAtOnce(t *testing.T) {
	l := newLines(strings.Repeat("x", 100))
	s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _ = pour(w, r, l, time.Minute, nil) }), testOptions(), false)
	p := dial(t, s, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1})
	p.open(t, 1, true, p.get("/"))
	p.expectStatus(t, 1, "200")
	p.expectData(t, 1, "x")
	var frames bytes.Buffer
	f := http2.NewFramer(&frames, nil)
	for _, more := range []uint32{1, 2, 3, 4} {
		require.NoError(t, f.WriteWindowUpdate(1, more))
		require.NoError(t, f.WriteWindowUpdate(0, more))
		require.NoError(t, f.WritePing(false, [8]byte{byte(more)}))
	}
	for b := frames.Bytes(); len(b) > 0; {
		n := min(len(b), 17)
		_, err := p.conn.Write(b[:n])
		require.NoError(t, err)
		b = b[n:]
	}
	got, pings := 0, 0
	for got < 10 || pings < 4 {
		switch f := p.next(t).(type) {
		case *http2.DataFrame:
			got += len(f.Data())
		case *http2.PingFrame:
			pings++
		}
	}
	require.Equal(t, 10, got)
	p.expectQuiet(t)
	p.AllowIllegalWrites = true
	require.NoError(t, p.WriteWindowUpdate(1, 0))
	p.expectReset(t, 1, http2.ErrCodeProtocol)
}

// TestStalledFeed resets the stream of a client that takes in nothing of it, and no other.
func TestStalledFeed(t *testing.T) {
	results := make(chan error, 1)
	s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		stall := 50 * time.Millisecond
		if r.URL.Path == "/never" {
			stall = 0
		}
		results <- pour(w, r, newLines("0123456789"), stall, nil)
	}), testOptions(), false)
	p := dial(t, s, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 3})
	p.open(t, 1, true, p.get("/never"))
	p.expectStatus(t, 1, "200")
	p.expectData(t, 1, "012")
	p.open(t, 3, true, p.get("/"))
	p.expectStatus(t, 3, "200")
	p.expectData(t, 3, "012")
	p.expectReset(t, 3, http2.ErrCodeInternal)
	<-results
	require.NoError(t, p.WriteWindowUpdate(1, 100))
	p.expectData(t, 1, "3456789")
	require.NoError(t, p.WriteRSTStream(1, http2.ErrCodeCancel))
	<-results
}

// TestFeedEndsWithRest hands what a feed has given to a client that takes it later.
func TestFeedEndsWithRest(t *testing.T) {
	results := make(chan error, 1)
	s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		results <- pour(w, r, newLines("0123456789", ""), time.Minute, nil)
	}), testOptions(), false)
	p := dial(t, s, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 3})
	p.open(t, 1, true, p.get("/"))
	p.expectStatus(t, 1, "200")
	p.expectData(t, 1, "012")
	p.expectQuiet(t)
	require.NoError(t, p.WriteWindowUpdate(1, 100))
	p.expectData(t, 1, "3456789")
	end, ok := p.next(t).(*http2.DataFrame)
	require.True(t, ok && end.StreamEnded())
	require.NoError(t, <-results)
}

// BenchmarkFeeds tells 100 streams of 10 connections of one thing; an operation is one stream's part of it.
func BenchmarkFeeds(b *testing.B) {
	const connections, streams, size = 10, 10, 500
	type fed struct {
		*lines
		wake func()
	}
	var mu sync.Mutex
	var all []fed
	s := serve(b, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		l := newLines("begin" + strings.Repeat("x", size-5))
		_ = pour(w, r, l, time.Minute, func(wake func()) {
			mu.Lock()
			defer mu.Unlock()
			all = append(all, fed{l, wake})
		})
	}), testOptions(), false)
	var taken sync.WaitGroup
	for range connections {
		c := client(b)
		c.Timeout = 0
		for range streams {
			resp, err := c.Get("https://" + s.address)
			require.NoError(b, err)
			defer resp.Body.Close()
			_, err = io.CopyN(io.Discard, resp.Body, size)
			require.NoError(b, err)
			go func() {
				buffer := make([]byte, size)
				for {
					if _, err := io.ReadFull(resp.Body, buffer); err != nil {
						return
					}
					taken.Done()
				}
			}()
		}
	}
	text := strings.Repeat("y", size)
	b.ReportAllocs()
	b.ResetTimer()
	for i := 0; i < b.N; i += len(all) {
		taken.Add(len(all))
		for _, f := range all {
			f.add(text)
			f.wake()
		}
		taken.Wait()
	}
	b.StopTimer()
	for _, f := range all {
		f.add("")
		f.wake()
	}
}
