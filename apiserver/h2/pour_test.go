package h2

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/http2"
)

// pattern is n bytes of which no two parts are alike.
func pattern(n int) []byte {
	out := make([]byte, 0, n+10)
	for i := 0; len(out) < n; i++ {
		out = strconv.AppendInt(append(out, ' '), int64(i), 10)
	}
	return out[:n]
}

// sourceOf gives data; step is told before each piece.
func sourceOf(data []byte, step func()) Source {
	return func(out []byte, limit int) ([]byte, bool) {
		step()
		n := min(limit, len(data))
		out = append(out, data[:n]...)
		data = data[n:]
		return out, len(data) > 0
	}
}

func nothing() {}

// TestPours has bodies of many sizes, feeds and small answers share connections: each is whole.
func TestPours(t *testing.T) {
	sizes := []int{0, 1, 100, recordBytes - frameHeader, recordBytes, recordBytes + 1, batchBytes, batchRecords * recordBytes, 300_000, 2_000_000}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, err := strconv.Atoi(r.URL.Query().Get("n"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		data := pattern(n)
		switch r.URL.Path {
		case "/feed":
			l := newLines(string(data), "")
			_ = pour(w, r, l, time.Minute, nil)
		case "/write":
			_, _ = w.Write(data)
		case "/pour":
			w.Header().Set("Content-Type", "text/plain")
			sent, err := w.(Pourer).Pour(sourceOf(data, nothing))
			if err != nil || sent != int64(n) && r.Method != http.MethodHead {
				t.Errorf("%d of %d bytes: %v", sent, n, err)
			}
		case "/around": // what was written before comes before
			_, _ = io.WriteString(w, "before")
			_, _ = w.(Pourer).Pour(sourceOf(data, nothing))
			_, _ = io.WriteString(w, "after")
		}
	})
	for _, foreign := range []bool{false, true} {
		s := serve(t, handler, testOptions(), foreign)
		var all sync.WaitGroup
		for range 2 {
			c := client(t)
			for i := range 60 {
				n := sizes[i%len(sizes)]
				path := []string{"/pour", "/around", "/feed", "/write", "/pour"}[rand.N(5)]
				all.Go(func() {
					resp, err := c.Get(fmt.Sprint("https://", s.address, path, "?n=", n))
					if err != nil {
						t.Error(err)
						return
					}
					defer resp.Body.Close()
					want := pattern(n)
					if path == "/around" {
						want = []byte("before" + string(want) + "after")
					}
					if got, err := io.ReadAll(resp.Body); err != nil || !bytes.Equal(want, got) {
						t.Errorf("%s of %d: %d bytes, %v", path, n, len(got), err)
					}
				})
			}
			all.Go(func() {
				resp, err := c.Head(fmt.Sprint("https://", s.address, "/pour?n=10"))
				if err != nil || resp.Header.Get("Content-Type") != "text/plain" {
					t.Error(resp, err)
				}
			})
		}
		all.Wait()
	}
}

// TestPoursKeepToWindows gives a client no more than it takes, in frames no larger than it takes.
func TestPoursKeepToWindows(t *testing.T) {
	data := pattern(200_000)
	s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.(Pourer).Pour(sourceOf(data, nothing))
	}), testOptions(), false)
	p := dial(t, s, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 10})
	p.open(t, 1, true, p.get("/"))
	p.expectStatus(t, 1, "200")
	p.expectData(t, 1, string(data[:10]))
	p.expectQuiet(t)
	require.NoError(t, p.WriteWindowUpdate(1, 1<<20))
	p.expectData(t, 1, string(data[10:65535])) // of the connection
	p.expectQuiet(t)
	require.NoError(t, p.WriteWindowUpdate(0, 1<<20))
	for got := 65535; got < len(data); {
		d, ok := p.next(t).(*http2.DataFrame)
		require.True(t, ok)
		require.LessOrEqual(t, len(d.Data()), frameBytes)
		require.Equal(t, string(data[got:got+len(d.Data())]), string(d.Data()))
		got += len(d.Data())
	}
	end, ok := p.next(t).(*http2.DataFrame)
	require.True(t, ok && end.StreamEnded() && len(end.Data()) == 0)
}

// TestPourOfNobody ends with its client, while another of the same connection goes on.
func TestPourOfNobody(t *testing.T) {
	failed, begun := make(chan error, 1), make(chan struct{}, 1)
	s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/small" {
			_, _ = io.WriteString(w, "small")
			return
		}
		_, err := w.(Pourer).Pour(func(out []byte, limit int) ([]byte, bool) {
			select {
			case begun <- struct{}{}:
			default:
			}
			return append(out, make([]byte, limit)...), true
		})
		failed <- err
	}), testOptions(), false)
	p := dial(t, s, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1000})
	p.open(t, 1, true, p.get("/"))
	<-begun
	p.expectStatus(t, 1, "200")
	p.expectData(t, 1, strings.Repeat("\x00", 1000))
	require.NoError(t, p.WriteRSTStream(1, http2.ErrCodeCancel))
	require.Error(t, <-failed)
	p.open(t, 3, true, p.get("/small"))
	p.expectStatus(t, 3, "200")
	p.expectData(t, 3, "small")
}

// TestPourLeavesNothing has answers end while a body is made whose handler stays: they do not wait for it.
func TestPourLeavesNothing(t *testing.T) {
	begun, answered, ended := make(chan struct{}), make(chan struct{}), make(chan struct{})
	s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/small" {
			_, _ = io.WriteString(w, "small")
			return
		}
		first := true
		_, _ = w.(Pourer).Pour(sourceOf([]byte("tail"), func() {
			if first {
				first = false
				close(begun)
				<-answered
			}
		}))
		<-ended
	}), testOptions(), false)
	p := dial(t, s)
	require.NoError(t, p.WriteWindowUpdate(0, 1<<20))
	p.open(t, 1, true, p.get("/"))
	<-begun
	p.open(t, 3, true, p.get("/small"))
	require.Eventually(t, func() bool {
		s.own.mu.Lock()
		defer s.own.mu.Unlock()
		for c := range s.own.conns {
			c.mu.Lock()
			defer c.mu.Unlock()
			return c.urged
		}
		return false
	}, testTimeout, time.Millisecond)
	close(answered)
	for small := false; !small; {
		if d, ok := p.next(t).(*http2.DataFrame); ok && d.StreamID == 3 {
			small = string(d.Data()) == "small"
		}
	}
	close(ended)
}

// BenchmarkLargeBodies sends 5 MB of small pieces to a client, by two requests at a time of one connection.
func BenchmarkLargeBodies(b *testing.B) {
	const count, size = 5000, 1100
	data := bytes.Repeat([]byte{'x'}, size)
	for name, h := range map[string]func(w http.ResponseWriter){
		"write": func(w http.ResponseWriter) {
			for range count {
				_, _ = w.Write(data)
			}
		},
		"pour": func(w http.ResponseWriter) {
			left, rest := count-1, data
			_, _ = w.(Pourer).Pour(func(out []byte, limit int) ([]byte, bool) {
				for end := len(out) + limit; ; {
					n := min(len(rest), end-len(out))
					out, rest = append(out, rest[:n]...), rest[n:]
					switch {
					case len(rest) > 0:
						return out, true
					case left == 0:
						return out, false
					}
					left, rest = left-1, data
				}
			})
		},
	} {
		b.Run(name, func(b *testing.B) {
			s := serve(b, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { h(w) }), testOptions(), false)
			c := client(b)
			b.SetBytes(count * size)
			b.ReportAllocs()
			b.SetParallelism(1)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					resp, err := c.Get("https://" + s.address)
					if err != nil {
						b.Error(err)
						return
					}
					n, err := io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
					if err != nil || n != count*size {
						b.Error(n, err)
					}
				}
			})
		})
	}
}
