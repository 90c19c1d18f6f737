package h2

import (
	"context"
	"crypto/tls"
	"net"
	"runtime"
	"sync/atomic"

	"golang.org/x/time/rate"
)

const (
	// pacedTurns is how many handshakes a second, for each that may compute at a time, there are at most of clients on this machine, and of all while the server is busy with requests: a
	// sixth of one processor.
	pacedTurns = 125
	// crowd is how many may wait before there is no pace any more, so that none waits for so long that its client gives up: half a second of turns.
	crowd = 64
)

// TakeTurns has the handshakes of a server, whose connections are those of Listen, compute by turns: from a client's greeting to the server's answer, which is most of what one
// takes, only as many at a time as half of the processors, and those of clients on this machine, which compute on the same ones, or all while busy says so, only at a pace: requests have the rest.
// Of a crowd that comes at once the first are through soon, and need not wait until all others are: a client of Go that sends 32 requests on no connection yet makes 32, and sends
// all on the first that is there. Who comes alone, or with many, need not wait, and who is slow to greet or to go on keeps nobody waiting.
func TakeTurns(config *tls.Config, busy func() bool) {
	takeTurns(config, newTurns((runtime.GOMAXPROCS(0)+1)/2, pacedTurns, busy))
}

// turns are what handshakes wait for.
type turns struct {
	taken chan struct{} // holds one for each that computes
	busy  func() bool
	pace  *rate.Limiter
	// waiting is how many want one.
	waiting atomic.Int64
}

func newTurns(atOnce int, perSecond rate.Limit, busy func() bool) *turns {
	return &turns{taken: make(chan struct{}, atOnce), busy: busy, pace: rate.NewLimiter(perSecond*rate.Limit(atOnce), atOnce)}
}

func takeTurns(config *tls.Config, turns *turns) {
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
func (s *socket) beginTurn(ctx context.Context, turns *turns) error {
	turns.waiting.Add(1)
	defer turns.waiting.Add(-1)
	select {
	case turns.taken <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	s.mu.Lock()
	s.turn = turns.taken
	if s.closed {
		s.endTurnLocked()
	}
	s.mu.Unlock()
	if turns.waiting.Load() <= crowd && (isNear(s.Conn) || turns.busy()) {
		return turns.pace.Wait(ctx)
	}
	return nil
}

// isNear reports whether a connection's peer is on this machine.
func isNear(c net.Conn) bool {
	far, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return false
	}
	near, ok := c.LocalAddr().(*net.TCPAddr)
	return far.IP.IsLoopback() || ok && far.IP.Equal(near.IP)
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
