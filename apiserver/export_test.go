package apiserver

import (
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
