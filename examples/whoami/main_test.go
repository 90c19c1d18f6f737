package main

import (
	"context"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestStopLosesNoRequest: requests that come after the signal are answered, and a slow one is finished.
func TestStopLosesNoRequest(t *testing.T) {
	t.Setenv("POD_NAME", "p1")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	address := l.Addr().String()
	require.NoError(t, l.Close())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- run(ctx, address) }()
	get := func(path string) (int, string) {
		resp, err := http.Get("http://" + address + path)
		if err != nil {
			return 0, err.Error()
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		return resp.StatusCode, string(b)
	}
	require.Eventually(t, func() bool { s, _ := get("/healthz"); return s == 200 }, 5*time.Second, 10*time.Millisecond)
	slow := make(chan string, 1)
	go func() { _, b := get("/slow?ms=2500"); slow <- b }()
	time.Sleep(100 * time.Millisecond) // the slow request is on its way
	cancel()
	require.Eventually(t, func() bool { s, _ := get("/healthz"); return s == 503 }, time.Second, 10*time.Millisecond)
	s, b := get("/")
	require.Equal(t, 200, s)
	require.Contains(t, b, "pod=p1 version=1")
	require.Contains(t, <-slow, "pod=p1")
	require.NoError(t, <-done)
	s, _ = get("/slow?ms=x")
	require.Zero(t, s, "it has ended")
}
