package service

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"knarr/network/netns"
)

// healthTimeout bounds one request of a balancer.
const healthTimeout = 5 * time.Second

// healthServers answer balancers outside that ask on a healthCheckNodePort whether this node has endpoints of a service: 200 when it has, 503 when not.
// Only Run's goroutine calls the methods; requests come concurrently.
type healthServers struct {
	opt     Options
	log     *slog.Logger
	servers map[uint16]*healthServer
	wg      sync.WaitGroup
}

type healthServer struct {
	http *http.Server

	mu    sync.Mutex
	check healthCheck
}

func newHealthServers(opt Options, log *slog.Logger) *healthServers {
	return &healthServers{opt: opt, log: log, servers: map[uint16]*healthServer{}}
}

// sync starts, updates and stops servers so that they are those of the plans.
func (h *healthServers) sync(ctx context.Context, plans map[source]*plan) {
	wanted := map[uint16]healthCheck{}
	for _, p := range plans {
		if p.health != nil {
			wanted[p.health.port] = *p.health
		}
	}
	for port, s := range h.servers {
		if _, ok := wanted[port]; !ok {
			_ = s.http.Close()
			delete(h.servers, port)
		}
	}
	for port, check := range wanted {
		s := h.servers[port]
		if s == nil {
			if s = h.start(ctx, port); s == nil {
				continue
			}
		}
		s.mu.Lock()
		s.check = check
		s.mu.Unlock()
	}
}

// start listens on the node's addresses. A port that cannot be had is logged; the next pass tries again.
func (h *healthServers) start(ctx context.Context, port uint16) *healthServer {
	s := &healthServer{}
	s.http = &http.Server{Handler: s, ReadHeaderTimeout: healthTimeout, WriteTimeout: healthTimeout}
	started := false
	for _, ip := range h.opt.NodeIPs {
		var l net.Listener
		err := netns.Do(h.opt.NetNS, func() (err error) {
			l, err = (&net.ListenConfig{}).Listen(ctx, "tcp", netip.AddrPortFrom(ip, port).String())
			return err
		})
		if err != nil {
			h.log.Error("health check port cannot be served", "address", ip, "port", port, "err", err)
			continue
		}
		started = true
		h.wg.Go(func() { _ = s.http.Serve(l) })
	}
	if !started {
		return nil
	}
	h.servers[port] = s
	return s
}

func (h *healthServers) close() {
	for _, s := range h.servers {
		_ = s.http.Close()
	}
	h.wg.Wait()
}

// ServeHTTP answers as kube-proxy does; balancers read the status only.
func (s *healthServer) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	s.mu.Lock()
	check := s.check
	s.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Load-Balancing-Endpoint-Weight", fmt.Sprint(check.local))
	if check.local == 0 {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_ = json.NewEncoder(w).Encode(map[string]any{
		"service":             map[string]string{"namespace": check.name.Namespace, "name": check.name.Name},
		"localEndpoints":      check.local,
		"serviceProxyHealthy": true,
	})
}
