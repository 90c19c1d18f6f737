package h2

import (
	"crypto/tls"
	"net"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
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
	takeTurns(config, 1)
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
