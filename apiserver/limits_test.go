package apiserver

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"k8s.io/apiserver/pkg/endpoints/filters"
)

// limited serves h behind the connection limits, in both versions of HTTP.
func limited(t *testing.T, limits connectionLimits, h func(ended chan<- error) http.HandlerFunc, test func(t *testing.T, url string, c *http.Client, ended <-chan error)) {
	for _, version := range []int{1, 2} {
		t.Run(fmt.Sprint("HTTP/", version), func(t *testing.T) {
			t.Parallel()
			ended := make(chan error, 1)
			inner := withConnectionDeadlines(h(ended), limits, func(*http.Request) bool { return false })
			server := httptest.NewUnstartedServer(filters.WithRequestInfo(inner, requestInfoResolver()))
			server.EnableHTTP2 = version == 2
			server.StartTLS()
			defer server.Close()
			test(t, server.URL, server.Client(), ended)
		})
	}
}

// patience bounds how long the server may take to notice a client that should be gone after milliseconds.
const patience = 20 * time.Second

// TestWatchesOfStalledClientsEnd lets clients stop reading, and read slowly.
func TestWatchesOfStalledClientsEnd(t *testing.T) {
	t.Parallel()
	h := func(ended chan<- error) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			chunk := bytes.Repeat([]byte("x"), 64<<10)
			for {
				if _, err := w.Write(chunk); err != nil {
					ended <- err
					return
				}
				w.(http.Flusher).Flush()
			}
		}
	}
	limited(t, connectionLimits{bounded: patience, stalled: 100 * time.Millisecond}, h, func(t *testing.T, url string, c *http.Client, ended <-chan error) {
		resp, err := c.Get(url + "/api/v1/pods?watch=1")
		require.NoError(t, err)
		defer resp.Body.Close()
		_, err = io.CopyN(io.Discard, resp.Body, 4<<20)
		require.NoError(t, err, "a client that reads goes on")
		select {
		case err := <-ended:
			require.Error(t, err)
		case <-time.After(patience):
			t.Fatal("a watch whose client reads nothing goes on for ever")
		}
	})
}

// TestBoundedRequestsEnd lets clients neither send their body nor read the answer.
func TestBoundedRequestsEnd(t *testing.T) {
	t.Parallel()
	h := func(ended chan<- error) http.HandlerFunc {
		return func(w http.ResponseWriter, req *http.Request) {
			if req.Method == http.MethodPost {
				_, err := io.ReadAll(req.Body)
				ended <- err
				return
			}
			var err error
			for chunk := bytes.Repeat([]byte("x"), 64<<10); err == nil; {
				_, err = w.Write(chunk)
			}
			ended <- err
		}
	}
	limited(t, connectionLimits{bounded: 100 * time.Millisecond, stalled: patience}, h, func(t *testing.T, url string, c *http.Client, ended <-chan error) {
		expect := func(what string) {
			select {
			case err := <-ended:
				require.Error(t, err, what)
			case <-time.After(patience):
				t.Fatal(what)
			}
		}
		resp, err := c.Get(url + "/api/v1/pods")
		require.NoError(t, err)
		defer resp.Body.Close()
		expect("an answer that nobody reads")
		hold, release := io.Pipe()
		defer release.Close()
		go func() {
			if resp, err := c.Post(url+"/api/v1/pods", "application/json", hold); err == nil {
				_ = resp.Body.Close()
			}
		}()
		expect("a body that nobody sends")
	})
}
