package h2

import (
	"context"
	"crypto/tls"
	"net"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/time/rate"
)

// TestTurns: one handshake at a time computes; the next goes on when it has answered, or is gone, and who greets slowly holds no turn.
func TestTurns(t *testing.T) {
	certs := httptest.NewUnstartedServer(nil)
	certs.StartTLS()
	certificate := certs.TLS.Certificates[0]
	certs.Close()
	computing, goOn := make(chan struct{}), make(chan struct{})
	config := &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		computing <- struct{}{}
		<-goOn
		return &certificate, nil
	}}
	takeTurns(config, newTurns(1, 0, func() bool { return false }))
	type pair struct {
		server *socket
		done   chan error
	}
	begin := func(greets bool) pair {
		near, far := net.Pipe()
		t.Cleanup(func() { near.Close(); far.Close() })
		p := pair{newSocket(near), make(chan error, 1)}
		go func() { p.done <- tls.Server(p.server, config).HandshakeContext(t.Context()) }()
		if greets {
			go func() { _ = tls.Client(far, &tls.Config{InsecureSkipVerify: true}).HandshakeContext(t.Context()) }()
		}
		return p
	}
	computes := func(want bool) {
		t.Helper()
		wait := 5 * time.Second
		if !want {
			wait = 50 * time.Millisecond
		}
		select {
		case <-computing:
			require.True(t, want, "out of turn")
		case <-time.After(wait):
			require.False(t, want, "no turn")
		}
	}
	begin(false)
	first := begin(true)
	computes(true)
	second := begin(true)
	computes(false)
	goOn <- struct{}{}
	require.NoError(t, <-first.done)
	computes(true)
	third := begin(true)
	computes(false)
	require.NoError(t, second.server.Close())
	computes(true)
	goOn <- struct{}{} // of one of both
	goOn <- struct{}{}
	require.Error(t, <-second.done)
	require.NoError(t, <-third.done)
}

// TestIsNear: a peer on this machine has the loopback's addresses, or the server's own.
func TestIsNear(t *testing.T) {
	for _, c := range []struct {
		far, near string
		want      bool
	}{
		{"127.0.0.1", "127.0.0.1", true},
		{"::1", "::1", true},
		{"127.0.0.5", "127.0.0.1", true},
		{"192.0.2.1", "192.0.2.1", true},
		{"192.0.2.2", "192.0.2.1", false},
		{"2001:db8::1", "2001:db8::2", false},
	} {
		require.Equal(t, c.want, isNear(ends{near: c.near, far: c.far}), c)
	}
	near, _ := net.Pipe()
	require.False(t, isNear(near))
}

// ends is a connection between two addresses.
type ends struct {
	net.Conn
	near, far string
}

func (e ends) LocalAddr() net.Addr  { return &net.TCPAddr{IP: net.ParseIP(e.near)} }
func (e ends) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.ParseIP(e.far)} }

// TestTurnsWhileBusy: the first that comes computes at once, the next only after its time, or when there is less to do.
func TestTurnsWhileBusy(t *testing.T) {
	var busy atomic.Bool
	busy.Store(true)
	turns := newTurns(1, rate.Every(100*time.Millisecond), busy.Load)
	took := func() time.Duration {
		near, _ := net.Pipe()
		s, begin := newSocket(near), time.Now()
		require.NoError(t, s.beginTurn(t.Context(), turns))
		require.NoError(t, s.Close())
		return time.Since(begin)
	}
	require.Less(t, took(), 50*time.Millisecond)
	require.Greater(t, took(), 50*time.Millisecond)
	busy.Store(false)
	require.Less(t, took(), 50*time.Millisecond)
	busy.Store(true)
	turns.waiting.Add(crowd)
	require.Less(t, took(), 50*time.Millisecond, "one of many")
	turns.waiting.Add(-crowd)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	near, _ := net.Pipe()
	gone := newSocket(near)
	require.ErrorIs(t, gone.beginTurn(ctx, turns), context.Canceled)
	require.NoError(t, gone.Close())
	require.Empty(t, turns.taken)
}
