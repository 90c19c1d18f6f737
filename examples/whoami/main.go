// Command whoami is a small web server that says which pod answers, so that one sees where a Service sends a request.
//
//	/         one line: pod, version, node and the caller's address
//	/healthz  200 while it takes requests, 503 from the moment it is asked to stop
//	/slow?ms=N  the same line after N milliseconds (at most a minute)
//
// It is asked to stop by SIGTERM. It then goes on answering for a moment, because every node's proxy must first hear that
// the pod leaves, and ends after its last request: a rollout loses none.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
)

// Bounds.
const (
	// drain is how long requests are still taken after SIGTERM.
	drain = 2 * time.Second
	// finish is how long the last requests may take then.
	finish        = 10 * time.Second
	maxSlow       = time.Minute
	headerTimeout = 5 * time.Second
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := run(ctx, ":"+env("PORT", "8080")); err != nil {
		log.Fatal(err)
	}
}

func env(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

// run serves on address until ctx ends and the last request is answered.
func run(ctx context.Context, address string) error {
	h := &handler{pod: env("POD_NAME", hostname()), version: env("VERSION", "1"), node: env("NODE_NAME", "unknown")}
	s := &http.Server{Addr: address, Handler: h.mux(), ReadHeaderTimeout: headerTimeout}
	failed := make(chan error, 1)
	go func() { failed <- s.ListenAndServe() }()
	log.Printf("%s version %s listens on %s", h.pod, h.version, address)
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	h.leaving.Store(true)
	log.Printf("asked to stop: taking requests for %v more", drain)
	time.Sleep(drain)
	end, cancel := context.WithTimeout(context.Background(), finish)
	defer cancel()
	if err := s.Shutdown(end); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	log.Printf("%d requests answered", h.answered.Load())
	return nil
}

func hostname() string {
	name, err := os.Hostname()
	if err != nil {
		return "unknown"
	}
	return name
}

type handler struct {
	pod, version, node string
	leaving            atomic.Bool
	answered           atomic.Int64
}

func (h *handler) mux() http.Handler {
	m := http.NewServeMux()
	m.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if h.leaving.Load() {
			http.Error(w, "leaving", http.StatusServiceUnavailable)
		}
	})
	m.HandleFunc("GET /slow", func(w http.ResponseWriter, r *http.Request) {
		ms, err := strconv.Atoi(r.URL.Query().Get("ms"))
		if err != nil || ms < 0 || time.Duration(ms)*time.Millisecond > maxSlow {
			http.Error(w, "ms must be 0 to 60000", http.StatusBadRequest)
			return
		}
		select {
		case <-time.After(time.Duration(ms) * time.Millisecond):
			h.say(w, r)
		case <-r.Context().Done():
		}
	})
	m.HandleFunc("GET /", h.say)
	return m
}

func (h *handler) say(w http.ResponseWriter, r *http.Request) {
	if h.leaving.Load() {
		w.Header().Set("Connection", "close") // the caller's next request goes to a pod that stays
	}
	h.answered.Add(1)
	fmt.Fprintf(w, "pod=%s version=%s node=%s from=%s\n", h.pod, h.version, h.node, r.RemoteAddr)
}
