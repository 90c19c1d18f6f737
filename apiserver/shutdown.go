package apiserver

import (
	"context"
	"net/http"
	"sync"

	apirequest "k8s.io/apiserver/pkg/endpoints/request"
)

// shutdown ends a server without dropping a request:
//
//  1. /readyz fails, no new connection is accepted, the open ones are told to go away (GOAWAY; HTTP/1.1: Connection: close)
//     once what they carry is answered;
//  2. watches end as they end at any time, and their clients watch on elsewhere;
//  3. what is under way is answered, for drainTimeout at most;
//  4. what is left ends: logs that are followed, exec, port-forward.
type shutdown struct {
	running tracker // requests that are not long-running

	watches, streams       context.Context
	endWatches, endStreams context.CancelFunc
}

func newShutdown() *shutdown {
	s := &shutdown{}
	s.watches, s.endWatches = context.WithCancel(context.Background())
	s.streams, s.endStreams = context.WithCancel(context.Background())
	return s
}

// wrap counts the bounded requests and bounds the others.
func (s *shutdown) wrap(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		info, ok := apirequest.RequestInfoFrom(req.Context())
		if !ok || !longRunning(req, info) {
			s.running.enter()
			defer s.running.leave()
			h.ServeHTTP(w, req)
			return
		}
		end := s.streams
		if info.Verb == "watch" {
			end = s.watches
		}
		ctx, cancel := context.WithCancel(req.Context())
		defer cancel()
		defer context.AfterFunc(end, cancel)()
		h.ServeHTTP(w, req.WithContext(ctx))
	})
}

// run does the steps. It returns when nothing is left or ctx ends.
func (s *shutdown) run(ctx context.Context, server *http.Server) error {
	server.SetKeepAlivesEnabled(false)
	s.endWatches()
	done := make(chan error, 1)
	go func() { done <- server.Shutdown(ctx) }()
	select {
	case <-s.running.idle():
	case <-ctx.Done():
	}
	s.endStreams()
	return <-done
}

// tracker counts what is under way and tells when nothing is. Unlike a WaitGroup, it lets more come while somebody waits.
type tracker struct {
	mu      sync.Mutex
	count   int             // guarded by mu
	waiting []chan struct{} // guarded by mu
}

func (t *tracker) enter() {
	t.mu.Lock()
	t.count++
	t.mu.Unlock()
}

func (t *tracker) leave() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.count--; t.count > 0 {
		return
	}
	for _, c := range t.waiting {
		close(c)
	}
	t.waiting = nil
}

// idle gives a channel that is closed as soon as nothing is under way.
func (t *tracker) idle() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	c := make(chan struct{})
	if t.count == 0 {
		close(c)
	} else {
		t.waiting = append(t.waiting, c)
	}
	return c
}
