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
	f := s.handler.(*bypass)
	next := f.next
	f.next = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		n.Add(1)
		next.ServeHTTP(w, req)
	})
	return &n
}

// ServesCustom says whether our own paths serve a custom resource in a version.
func ServesCustom(s *Server, group, version, resource string) bool {
	return s.custom.served.remembered(group, version, resource) != nil
}

// KnowsDefinition says whether upstream's handler serves by a generation of a definition, or knows of its end where that is 0.
func KnowsDefinition(s *Server, name string, generation int64) bool {
	crd, err := s.custom.served.lister.Get(name)
	if err != nil {
		return generation == 0
	}
	info, ok := infoOf(s.custom.served.upstream, crd.UID)
	return ok && crd.Generation == generation && info.isOf(crd)
}

// CountCustomLongWays counts the requests that upstream's handler of custom resources gets.
func CountCustomLongWays(s *Server) *atomic.Int64 {
	var n atomic.Int64
	next := s.custom.handler
	s.custom.handler = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		n.Add(1)
		next.ServeHTTP(w, req)
	})
	return &n
}
