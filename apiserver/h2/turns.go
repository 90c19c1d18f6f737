package h2

import (
	"context"
	"crypto/tls"
	"runtime"
)

// TakeTurns has the handshakes of a server, whose connections are those of Listen, compute by turns: from a client's greeting to the server's answer, which is most of what one
// takes, only as many at a time as half of the processors: requests and clients on this machine have the rest. Of a crowd that comes at once the first are through soon, and need not wait until all others are half through: a client
// of Go that sends 32 requests on no connection yet makes 32, and sends all on the first that is there. Who is slow to greet or to go on keeps nobody waiting.
func TakeTurns(config *tls.Config) { takeTurns(config, (runtime.GOMAXPROCS(0)+1)/2) }

func takeTurns(config *tls.Config, atOnce int) {
	turns := make(chan struct{}, atOnce)
	before := config.GetConfigForClient
	config.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if s, ok := hello.Conn.(*socket); ok {
			if err := s.beginTurn(hello.Context(), turns); err != nil {
				return nil, err
			}
		}
		if before == nil {
			return nil, nil
		}
		return before(hello)
	}
}

// beginTurn waits for a turn, which ends with the next write, or the connection.
func (s *socket) beginTurn(ctx context.Context, turns chan struct{}) error {
	select {
	case turns <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.turn = turns
	if s.closed {
		s.endTurnLocked()
	}
	return nil
}

func (s *socket) endTurnLocked() {
	if s.turn != nil {
		<-s.turn
		s.turn = nil
	}
}

// Close implements net.Conn.
func (s *socket) Close() error {
	err := s.Conn.Close() // first: a write that waits lets mu go
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.endTurnLocked()
	return err
}
