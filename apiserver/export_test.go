package apiserver

import (
	"net/http"
	"sync/atomic"

	"knarr/apiserver/h2"
)

// CountShortcuts counts, from the next Serve on, the requests that no filter has seen.
func CountShortcuts(s *Server) *atomic.Int64 {
	var n atomic.Int64
	next := s.shortcut
	s.shortcut = func(e *h2.Exchange) bool {
		done := next(e)
		if done {
			n.Add(1)
		}
		return done
	}
	return &n
}

// CountLongWays counts the requests that go through the filters.
func CountLongWays(s *Server) *atomic.Int64 {
	var n atomic.Int64
	f := s.handler.(*fastWrites)
	next := f.next
	f.next = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		n.Add(1)
		next.ServeHTTP(w, req)
	})
	return &n
}
