package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	corecache "github.com/coredns/coredns/plugin/cache"
	"github.com/coredns/coredns/plugin/forward"
	"github.com/coredns/coredns/plugin/pkg/proxy"
	"github.com/coredns/coredns/plugin/pkg/transport"
	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"k8s.io/client-go/tools/cache"

	"knarr/network"
	"knarr/network/netns"
)

// Server is a node's DNS server. Make it with New, then start the informers, then Run.
type Server struct {
	opt      Options
	log      *slog.Logger
	records  *records
	checkers []cache.DoneChecker
	synced   atomic.Bool
	serving  atomic.Bool
}

// New registers with the informers. It listens nowhere: Run does.
func New(opt Options) (*Server, error) {
	if err := opt.validate(); err != nil {
		return nil, err
	}
	if opt.Zone == "" {
		opt.Zone = DefaultZone
	}
	if opt.Log == nil {
		opt.Log = slog.Default()
	}
	s := &Server{opt: opt, log: opt.Log.With("part", "dns")}
	f := opt.Informers
	services, namespaces := f.Core().V1().Services(), f.Core().V1().Namespaces()
	parts := f.Discovery().V1().EndpointSlices().Informer()
	err := errors.Join(
		network.AddIndex(services.Informer(), servicesByIP, indexServiceIPs),
		network.AddIndex(parts, slicesByIP, indexSliceIPs),
		network.AddSlicesByService(parts),
	)
	if err != nil {
		return nil, fmt.Errorf("dns: register with the informers: %w", err)
	}
	s.records = &records{services: services.Lister(), namespaces: namespaces.Lister(), byIP: services.Informer().GetIndexer(), slices: parts.GetIndexer()}
	s.checkers = []cache.DoneChecker{services.Informer().HasSyncedChecker(), namespaces.Informer().HasSyncedChecker(), parts.HasSyncedChecker()}
	return s, nil
}

// Synced says whether it listens and its caches are filled.
func (s *Server) Synced() bool { return s.serving.Load() && s.synced.Load() }

// Run answers until ctx ends. It returns an error at once when it cannot listen. Until the caches are filled it answers SERVFAIL for
// the cluster's names, and forwards the others.
func (s *Server) Run(ctx context.Context) error {
	if err := s.bringUp(); err != nil {
		return err
	}
	chain, stop, err := s.chain()
	if err != nil {
		return err
	}
	defer stop()
	var servers []*dnsserver.Server
	var socks []sockets
	for _, ip := range slices.Concat(s.opt.Addresses, s.opt.AlsoListen) {
		l, err := s.listen(ctx, ip)
		if err != nil {
			for _, l := range socks {
				l.close()
			}
			return err
		}
		config := &dnsserver.Config{Zone: ".", Port: strconv.Itoa(port), Transport: transport.DNS}
		config.AddPlugin(func(plugin.Handler) plugin.Handler { return chain })
		srv, err := dnsserver.NewServer(transport.DNS+"://"+netip.AddrPortFrom(ip, port).String(), []*dnsserver.Config{config})
		if err != nil {
			l.close()
			return fmt.Errorf("dns: %w", err)
		}
		servers, socks = append(servers, srv), append(socks, l)
	}
	return s.serve(ctx, servers, socks)
}

// serve runs the servers until ctx ends or one of them fails.
func (s *Server) serve(ctx context.Context, servers []*dnsserver.Server, socks []sockets) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for i, srv := range servers {
		wg.Go(func() { cancel(ended(srv.Serve(socks[i].tcp))) })
		wg.Go(func() { cancel(ended(srv.ServePacket(patient{socks[i].udp}))) })
	}
	s.serving.Store(true)
	wg.Go(func() { s.synced.Store(cache.WaitFor(ctx, "", s.checkers...)) })
	<-ctx.Done()
	s.serving.Store(false)
	for i, srv := range servers {
		_ = srv.Stop() // only says that a client was slow
		socks[i].close()
	}
	wg.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// ended is the error of a server that ended by itself.
func ended(err error) error {
	if err == nil || errors.Is(err, net.ErrClosed) {
		return context.Canceled
	}
	return fmt.Errorf("dns: %w", err)
}

// sockets are the two sockets of one address.
type sockets struct {
	tcp net.Listener
	udp net.PacketConn
}

func (s sockets) close() {
	_ = s.tcp.Close()
	_ = s.udp.Close()
}

// patient is a socket of packets whose reads wait for as long as it takes. The library would have each give up after two seconds and begin
// again, on a socket on which nobody may ask anything for hours.
type patient struct{ net.PacketConn }

// SetReadDeadline implements net.PacketConn. A deadline that has passed already still ends a read: so does the library stop.
func (p patient) SetReadDeadline(t time.Time) error {
	if time.Until(t) > 0 {
		return nil
	}
	return p.PacketConn.SetReadDeadline(t)
}

// listen opens the sockets of one address, in the node's namespace; the address may come up later.
func (s *Server) listen(ctx context.Context, ip netip.Addr) (out sockets, err error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		controlErr := c.Control(func(fd uintptr) {
			if ip.Is4() {
				err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1)
			} else {
				err = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_FREEBIND, 1)
			}
		})
		return errors.Join(controlErr, err)
	}}
	addr := netip.AddrPortFrom(ip, port).String()
	err = netns.Do(s.opt.NetNS, func() (err error) {
		if out.tcp, err = lc.Listen(ctx, "tcp", addr); err != nil {
			return err
		}
		if out.udp, err = lc.ListenPacket(ctx, "udp", addr); err != nil {
			out.tcp.Close()
		}
		return err
	})
	if err != nil {
		return out, fmt.Errorf("dns: listen (where another program has port 53 of all addresses, make it listen on its own only; where another cluster on this machine has this one, "+
			"give one of them ranges of its own with --service-cidr, --cluster-dns, --pod-cidr and --node-cidr): %w", err)
	}
	return out, nil
}

// chain builds what a question passes: the cluster's names, then the cache, then the upstream servers. stop ends their connections.
func (s *Server) chain() (h plugin.Handler, stop func(), err error) {
	zone := strings.ToLower(dns.Fqdn(s.opt.Zone))
	c := &cluster{zone: zone, ranges: s.opt.Ranges, servers: s.opt.Addresses, records: s.records, synced: s.synced.Load, next: plugin.HandlerFunc(nowhere)}
	upstreams, err := s.upstreams()
	if err != nil {
		return nil, nil, err
	}
	if len(upstreams) == 0 {
		s.log.Info("no upstream DNS server: only the cluster's names are answered")
		return c, func() {}, nil
	}
	f := forward.New()
	for _, addr := range upstreams {
		p := proxy.NewProxy("forward", addr, transport.DNS)
		p.SetExpire(upstreamTTL)
		f.SetProxy(p)
	}
	remember := corecache.New()
	remember.Next = f
	c.next = remember
	return c, func() { _ = f.OnShutdown() }, nil
}

// systemdResolv is where systemd-resolved writes the servers that it asks itself, behind the 127.0.0.53 of /etc/resolv.conf.
const systemdResolv = "/run/systemd/resolve/resolv.conf"

// upstreams lists the servers to ask for other names, without ourselves.
func (s *Server) upstreams() ([]string, error) {
	list := s.opt.Upstreams
	if list == nil {
		file, fallback := s.opt.ResolvConf, ""
		if file == "" {
			file, fallback = "/etc/resolv.conf", systemdResolv
		}
		var err error
		if list, err = servers(file); err != nil {
			return nil, err
		}
		if behind, err := servers(fallback); err == nil && len(behind) > 0 && !slices.ContainsFunc(list, reachable) {
			list = behind
		}
	}
	var out []string
	for _, server := range list {
		at, err := netip.ParseAddrPort(server)
		if err != nil {
			return nil, fmt.Errorf("dns: upstream server %q: %w", server, err)
		}
		if at.Addr().IsLoopback() && s.opt.InsteadOfLoopback.IsValid() {
			at = netip.AddrPortFrom(s.opt.InsteadOfLoopback, port)
		}
		if s.isOwn(at.Addr()) {
			s.log.Warn("the upstream DNS server is this server itself; it is left out", "server", server)
			continue
		}
		out = append(out, at.String())
	}
	return out, nil
}

// reachable says whether a server can be asked from any network namespace of the machine.
func reachable(server string) bool {
	at, err := netip.ParseAddrPort(server)
	return err == nil && !at.Addr().IsLoopback()
}

// servers reads the servers of a resolv.conf; a missing file has none.
func servers(file string) (list []string, err error) {
	conf, err := dns.ClientConfigFromFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("dns: read %s: %w", file, err)
	}
	for _, server := range conf.Servers {
		list = append(list, net.JoinHostPort(server, conf.Port))
	}
	return list, nil
}

func (s *Server) isOwn(ip netip.Addr) bool {
	return slices.Contains(s.opt.Addresses, ip) || slices.Contains(s.opt.AlsoListen, ip)
}

// bringUp gives the loopback link the service addresses.
func (s *Server) bringUp() error {
	return onLoopback(s.opt.NetNS, func(h *netlink.Handle, lo netlink.Link) error {
		for _, ip := range s.opt.Addresses {
			if err := h.AddrReplace(lo, hostAddress(ip)); err != nil {
				return fmt.Errorf("dns: give the node %s: %w", ip, err)
			}
		}
		return nil
	})
}

// Purge takes the service addresses from the loopback link, also those of an earlier process. opt needs Addresses and NetNS only.
func Purge(opt Options) error {
	return onLoopback(opt.NetNS, func(h *netlink.Handle, lo netlink.Link) error {
		var errs []error
		for _, ip := range opt.Addresses {
			if err := h.AddrDel(lo, hostAddress(ip)); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
				errs = append(errs, fmt.Errorf("dns: take %s away: %w", ip, err))
			}
		}
		return errors.Join(errs...)
	})
}

func onLoopback(nsPath string, fn func(*netlink.Handle, netlink.Link) error) error {
	ns, err := netns.Open(nsPath)
	if err != nil {
		return err
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("dns: open a route socket: %w", err)
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("dns: find the loopback link: %w", err)
	}
	return fn(h, lo)
}

func hostAddress(ip netip.Addr) *netlink.Addr {
	a := &netlink.Addr{IPNet: &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(ip.BitLen(), ip.BitLen())}}
	if ip.Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	return a
}
