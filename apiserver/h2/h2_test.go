package h2

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// testTimeout bounds what a test waits for.
const testTimeout = 20 * time.Second

func testOptions() Options {
	return Options{
		MaxStreams: 100, MaxHeaderBytes: 64 << 10, UploadPerStream: 256 << 10, UploadPerConnection: 25 << 20,
		IdleTimeout: time.Minute, WriteTimeout: time.Minute, ErrorLog: log.New(io.Discard, "", 0),
	}
}

// rig is a server of this package on loopback.
type rig struct {
	*http.Server
	own     *Server
	address string
	served  chan error
}

// serve starts a server; foreign leaves its listener as net made it.
func serve(t testing.TB, h http.Handler, o Options, foreign bool) *rig {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	certs := httptest.NewUnstartedServer(nil)
	certs.StartTLS()
	certificate := certs.TLS.Certificates
	certs.Close()
	r := &rig{address: l.Addr().String(), served: make(chan error, 1), Server: &http.Server{
		Handler: h, TLSConfig: &tls.Config{Certificates: certificate, NextProtos: []string{"h2", "http/1.1"}}, ErrorLog: o.ErrorLog,
	}}
	r.own = Attach(r.Server, o)
	if !foreign {
		l = Listen(l)
	}
	go func() { r.served <- r.ServeTLS(l, "", "") }()
	t.Cleanup(func() {
		r.Close()
		require.ErrorIs(t, <-r.served, http.ErrServerClosed)
	})
	return r
}

// client speaks HTTP/2 on one connection at a time.
func client(t testing.TB) *http.Client {
	tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: testTimeout}
}

// echo answers what it is sent, and shows what a handler can do.
func echo() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Length", strconv.FormatInt(r.ContentLength, 10))
		_, _ = io.Copy(w, r.Body)
		if len(r.Trailer) > 0 {
			fmt.Fprint(w, "|", r.Trailer.Get("X-End"))
		}
	})
	mux.HandleFunc("/size/{n}", func(w http.ResponseWriter, r *http.Request) {
		n, _ := strconv.Atoi(r.PathValue("n"))
		_, _ = w.Write(bytes.Repeat([]byte("x"), n))
	})
	mux.HandleFunc("/declared", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "5")
		_, _ = io.WriteString(w, "hello")
		_, err := io.WriteString(w, "!")
		if !errors.Is(err, http.ErrContentLength) {
			panic(err)
		}
	})
	mux.HandleFunc("/short", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "5")
		_, _ = io.WriteString(w, "hel")
	})
	mux.HandleFunc("/status/{n}", func(w http.ResponseWriter, r *http.Request) {
		n, _ := strconv.Atoi(r.PathValue("n"))
		w.WriteHeader(n)
	})
	mux.HandleFunc("/panic", func(http.ResponseWriter, *http.Request) { panic("on purpose") })
	mux.HandleFunc("/abort", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	mux.HandleFunc("/trailers", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Trailer", "X-One")
		_, _ = io.WriteString(w, "body")
		w.Header().Set("X-One", "1")
		w.Header().Set(http.TrailerPrefix+"X-Two", "2")
	})
	mux.HandleFunc("/ignore", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ignored") })
	return mux
}

func TestRequests(t *testing.T) {
	large := strings.Repeat("0123456789", 300_000)
	for _, foreign := range []bool{false, true} {
		s := serve(t, echo(), testOptions(), foreign)
		c := client(t)
		for _, tc := range []struct {
			name, method, path, body string
			status                   int
			want, length             string
			failure                  bool
		}{
			{name: "empty", method: "GET", path: "/size/0", status: 200, length: "0"},
			{name: "small", method: "GET", path: "/size/10", status: 200, want: strings.Repeat("x", 10), length: "10"},
			{name: "one buffer", method: "GET", path: "/size/8192", status: 200, want: strings.Repeat("x", 8192), length: "8192"},
			{name: "more than a frame", method: "GET", path: "/size/100000", status: 200, want: strings.Repeat("x", 100_000)},
			{name: "more than a window", method: "GET", path: "/size/9000000", status: 200, want: strings.Repeat("x", 9_000_000)},
			{name: "declared", method: "GET", path: "/declared", status: 200, want: "hello", length: "5"},
			{name: "shorter than declared", method: "GET", path: "/short", failure: true},
			{name: "head", method: "HEAD", path: "/size/100", status: 200},
			{name: "no content", method: "GET", path: "/status/204", status: 204},
			{name: "not modified", method: "GET", path: "/status/304", status: 304},
			{name: "teapot", method: "GET", path: "/status/418", status: 418, length: "0"},
			{name: "not found", method: "GET", path: "/nothing", status: 404, want: "404 page not found\n", length: "19"},
			{name: "post", method: "POST", path: "/echo", body: "hello", status: 200, want: "hello", length: "5"},
			{name: "post of much", method: "POST", path: "/echo", body: large, status: 200, want: large},
			{name: "post of nothing", method: "POST", path: "/echo", status: 200, length: "0"},
			{name: "a body that nobody reads", method: "POST", path: "/ignore", body: large[:200_000], status: 200, want: "ignored", length: "7"},
			{name: "panic", method: "GET", path: "/panic", failure: true},
			{name: "abort", method: "GET", path: "/abort", failure: true},
			{name: "after a panic", method: "GET", path: "/size/1", status: 200, want: "x", length: "1"},
		} {
			t.Run(fmt.Sprint(tc.name, foreign), func(t *testing.T) {
				req, err := http.NewRequest(tc.method, "https://"+s.address+tc.path, strings.NewReader(tc.body))
				require.NoError(t, err)
				resp, err := c.Do(req)
				var got []byte
				if err == nil {
					require.Equal(t, 2, resp.ProtoMajor)
					got, err = io.ReadAll(resp.Body)
					resp.Body.Close()
				}
				if tc.failure {
					require.Error(t, err)
					return
				}
				require.NoError(t, err)
				require.Equal(t, tc.status, resp.StatusCode)
				require.Equal(t, tc.want, string(got))
				require.NotEmpty(t, resp.Header.Get("Date"))
				if tc.length != "" {
					require.Equal(t, tc.length, resp.Header.Get("Content-Length"))
				}
				if tc.path == "/echo" {
					require.Equal(t, strconv.Itoa(len(tc.body)), resp.Header.Get("X-Length"))
				}
			})
		}
	}
}

func TestTrailers(t *testing.T) {
	s := serve(t, echo(), testOptions(), false)
	c := client(t)
	resp, err := c.Get("https://" + s.address + "/trailers")
	require.NoError(t, err)
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.Equal(t, "body", string(got))
	require.Equal(t, "1", resp.Trailer.Get("X-One"))
	require.Equal(t, "2", resp.Trailer.Get("X-Two"))

	req, err := http.NewRequest("POST", "https://"+s.address+"/echo", io.MultiReader(strings.NewReader("body")))
	require.NoError(t, err)
	req.Trailer = http.Header{"X-End": {"end"}}
	resp, err = c.Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	got, err = io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.Equal(t, "body|end", string(got))
	require.Equal(t, "-1", resp.Header.Get("X-Length"))
}

func TestExpectContinue(t *testing.T) {
	s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/refuse" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		_, _ = io.Copy(w, r.Body)
	}), testOptions(), false)
	c := client(t)
	c.Transport.(*http.Transport).ExpectContinueTimeout = testTimeout
	for path, want := range map[string]int{"/": 200, "/refuse": 403} {
		req, err := http.NewRequest("POST", "https://"+s.address+path, strings.NewReader("hello"))
		require.NoError(t, err)
		req.Header.Set("Expect", "100-continue")
		resp, err := c.Do(req)
		require.NoError(t, err)
		resp.Body.Close()
		require.Equal(t, want, resp.StatusCode)
	}
}

// TestFast holds that a fast answer is whole, and that what Fast leaves goes to the handler.
func TestFast(t *testing.T) {
	body := bytes.Repeat([]byte("y"), 40_000)
	o := testOptions()
	block := AppendField(AppendField(AppendStatus(nil, 200), "content-length", strconv.Itoa(len(body))), "x-fast", "yes")
	o.Fast = func(e *Exchange) bool {
		e.Peer = e.Remote
		return e.Method == "GET" && e.Path == "/fast" && e.TLS != nil && e.Answer(block, time.Now(), nil, body[:100], body[100:30_000], body[30_000:], nil)
	}
	mux := http.NewServeMux()
	mux.Handle("/", echo())
	mux.HandleFunc("/fast", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(body) }) // when too much waits to be sent
	s := serve(t, mux, o, false)
	c := client(t)
	var wg sync.WaitGroup
	var fast atomic.Int64
	for range 50 {
		wg.Go(func() {
			for i := range 6 {
				path, want := "/fast", string(body)
				if i%3 == 0 {
					path, want = "/size/7", "xxxxxxx"
				}
				resp, err := c.Get("https://" + s.address + path)
				if err != nil {
					t.Error(err)
					return
				}
				got, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				if resp.Header.Get("X-Fast") == "yes" {
					fast.Add(1)
				}
				if err != nil || string(got) != want {
					t.Errorf("%s: %d bytes, %v", path, len(got), err)
				}
			}
		})
	}
	wg.Wait()
	require.Greater(t, fast.Load(), int64(50))
}

func TestFlushAndCancel(t *testing.T) {
	ended := make(chan error, 1)
	s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		fmt.Fprint(w, "one")
		w.(http.Flusher).Flush()
		//lint:ignore SA1019 upstream's wrappers ask for it
		gone := w.(http.CloseNotifier).CloseNotify()
		<-r.Context().Done()
		<-gone
		_, err := io.WriteString(w, strings.Repeat("z", 2*bufferBytes))
		ended <- err
	}), testOptions(), false)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", "https://"+s.address, nil)
	require.NoError(t, err)
	resp, err := client(t).Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	got := make([]byte, 3)
	_, err = io.ReadFull(resp.Body, got)
	require.NoError(t, err)
	require.Equal(t, "one", string(got))
	cancel()
	require.Error(t, <-ended)
}

func TestDeadlines(t *testing.T) {
	results := make(chan error, 1)
	s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		control := http.NewResponseController(w)
		switch r.URL.Path {
		case "/read":
			_ = control.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			_, err := io.ReadAll(r.Body)
			results <- err
			w.WriteHeader(http.StatusRequestTimeout)
		case "/write":
			_ = control.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
			<-r.Context().Done()
			_, err := io.WriteString(w, strings.Repeat("z", 2*bufferBytes))
			results <- err
		case "/past":
			_ = control.SetWriteDeadline(time.Unix(1, 0))
			_, err := io.WriteString(w, strings.Repeat("z", 2*bufferBytes))
			results <- err
		}
	}), testOptions(), false)
	c := client(t)
	body, feed := io.Pipe()
	defer feed.Close()
	req, err := http.NewRequest("POST", "https://"+s.address+"/read", body)
	require.NoError(t, err)
	resp, err := c.Do(req)
	require.NoError(t, err)
	resp.Body.Close()
	require.Equal(t, http.StatusRequestTimeout, resp.StatusCode)
	require.ErrorIs(t, <-results, os.ErrDeadlineExceeded)
	for _, path := range []string{"/write", "/past"} {
		_, err = c.Get("https://" + s.address + path)
		require.ErrorContains(t, err, "INTERNAL_ERROR")
		require.ErrorIs(t, <-results, os.ErrDeadlineExceeded)
	}
}

// TestShutdownDropsNothing stops a server under load: each request is answered, or was never taken and goes to the next server.
func TestShutdownDropsNothing(t *testing.T) {
	slow := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		time.Sleep(time.Millisecond)
		fmt.Fprint(w, "ok")
	})
	s := serve(t, slow, testOptions(), false)
	c := client(t)
	var stopping atomic.Bool
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			for {
				before := stopping.Load()
				resp, err := c.Get("https://" + s.address)
				if err == nil {
					_, err = io.ReadAll(resp.Body)
					resp.Body.Close()
				}
				switch {
				case err == nil:
				case before || errors.Is(err, net.ErrClosed) || strings.Contains(err.Error(), "connection refused"):
					return // a new connection to a server that listens no more
				default:
					t.Errorf("a request was lost: %v", err)
					return
				}
				if before {
					return
				}
			}
		})
	}
	time.Sleep(100 * time.Millisecond)
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	stopping.Store(true)
	require.NoError(t, s.Shutdown(ctx))
	wg.Wait()
}

func TestIdleConnectionsEnd(t *testing.T) {
	o := testOptions()
	o.IdleTimeout = 50 * time.Millisecond
	s := serve(t, echo(), o, false)
	p := dial(t, s)
	p.expectGoAway(t, 0)
}
