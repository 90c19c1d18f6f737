// Package nettest builds network topologies out of real namespaces for tests, sends real packets through them, and watches what passes.
//
// Nothing is made in the namespace of the test process: a topology has an "outside" and a "machine" namespace of its own, pinned in the test's
// temporary directory, and everything else hangs below the machine. All of it goes with the test.
package nettest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"knarr/network/netns"
)

// ioTimeout bounds each connection attempt and answer of a test.
const ioTimeout = 2 * time.Second

// dropTimeout is how long a packet is waited for that must not come.
const dropTimeout = 300 * time.Millisecond

// NewNS makes a namespace with its loopback link up; it is deleted with the test. It returns its path.
func NewNS(t testing.TB, name string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("network namespaces need root")
	}
	path := filepath.Join(t.TempDir(), name)
	require.NoError(t, netns.Create(path, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	}))
	t.Cleanup(func() { require.NoError(t, netns.Delete(path)) })
	return path
}

// Connect joins two namespaces by a veth pair; a and b are the addresses of the ends with their prefix lengths.
func Connect(t testing.TB, nsA, linkA, a, nsB, linkB, b string) {
	t.Helper()
	hb, err := netns.Open(nsB)
	require.NoError(t, err)
	defer hb.Close()
	In(t, nsA, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = linkA
		veth := netlink.NewVeth(attrs)
		veth.PeerName, veth.PeerNamespace = linkB, netlink.NsFd(int(hb))
		if err := netlink.LinkAdd(veth); err != nil {
			return err
		}
		return address(linkA, a)
	})
	In(t, nsB, func() error { return address(linkB, b) })
}

func address(link, cidr string) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(cidr)
	if err != nil {
		return err
	}
	if addr.IP.To4() == nil {
		addr.Flags = unix.IFA_F_NODAD
	}
	if err := netlink.AddrAdd(l, addr); err != nil {
		return err
	}
	return netlink.LinkSetUp(l)
}

// Route adds a route through a gateway inside ns; dst "default" is the default route.
func Route(t testing.TB, ns, dst, via string) {
	t.Helper()
	if dst == "default" {
		dst = "0.0.0.0/0"
	}
	In(t, ns, func() error {
		_, d, err := net.ParseCIDR(dst)
		if err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{Dst: d, Gw: net.ParseIP(via)})
	})
}

// In runs fn inside ns and fails the test with its error.
func In(t testing.TB, ns string, fn func() error) {
	t.Helper()
	require.NoError(t, netns.Do(ns, fn))
}

// Serve answers "<name> <address of the client>\n" to each line that TCP connections and UDP datagrams bring on port, on all addresses of ns, until the
// test ends or stop is called.
func Serve(t testing.TB, ns, name string, port int) (stop func()) {
	t.Helper()
	var tcp net.Listener
	var udp net.PacketConn
	In(t, ns, func() (err error) {
		if tcp, err = net.Listen("tcp", fmt.Sprintf(":%d", port)); err != nil {
			return err
		}
		udp, err = net.ListenPacket("udp", fmt.Sprintf(":%d", port))
		return err
	})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := tcp.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { answer(c, name) })
		}
	})
	wg.Go(func() {
		buf := make([]byte, 2048)
		for {
			_, from, err := udp.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = udp.WriteTo(fmt.Appendf(nil, "%s %s\n", name, host(from)), from)
		}
	})
	stop = sync.OnceFunc(func() { tcp.Close(); udp.Close(); wg.Wait() })
	t.Cleanup(stop)
	return stop
}

func answer(c net.Conn, name string) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(ioTimeout))
	lines := bufio.NewScanner(c)
	for lines.Scan() {
		fmt.Fprintf(c, "%s %s\n", name, host(c.RemoteAddr()))
	}
}

func host(a net.Addr) string {
	h, _, _ := net.SplitHostPort(a.String())
	if ip, err := netip.ParseAddr(h); err == nil {
		return ip.Unmap().String()
	}
	return h
}

// Answer is who answered a question, and from which address it saw it come.
type Answer struct{ Name, Client string }

// Ask sends one line from inside ns over a new connection or socket ("tcp", "udp") and returns the answer.
func Ask(ns, proto, addr string) (Answer, error) {
	c, err := Dial(ns, proto, addr)
	if err != nil {
		return Answer{}, err
	}
	defer c.Close()
	return AskOn(c)
}

// Dial connects from inside ns.
func Dial(ns, proto, addr string) (net.Conn, error) { return dial(ns, proto, addr, ioTimeout) }

func dial(ns, proto, addr string, limit time.Duration) (net.Conn, error) {
	var c net.Conn
	err := netns.Do(ns, func() (err error) {
		c, err = (&net.Dialer{Timeout: limit}).Dial(proto, addr)
		return err
	})
	return c, err
}

// MustDrop fails the test when a TCP connection to addr is made, or refused, within dropTimeout.
func MustDrop(t testing.TB, ns, addr string) {
	t.Helper()
	c, err := dial(ns, "tcp", addr, dropTimeout)
	if err == nil {
		c.Close()
	}
	var late net.Error
	require.ErrorAs(t, err, &late, "%s must be dropped", addr)
	require.True(t, late.Timeout(), "%s must be dropped: %v", addr, err)
}

// AskOn asks on a connection that is open.
func AskOn(c net.Conn) (Answer, error) {
	_ = c.SetDeadline(time.Now().Add(ioTimeout))
	if _, err := c.Write([]byte("who\n")); err != nil {
		return Answer{}, err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return Answer{}, err
	}
	name, client, _ := strings.Cut(strings.TrimSpace(line), " ")
	return Answer{name, client}, nil
}

// MustAsk is Ask that fails the test.
func MustAsk(t testing.TB, ns, proto, addr string) Answer {
	t.Helper()
	a, err := Ask(ns, proto, addr)
	require.NoError(t, err, "%s %s", proto, addr)
	return a
}

// Names asks n times over new connections and counts who answered.
func Names(t testing.TB, ns, proto, addr string, n int) map[string]int {
	t.Helper()
	got := map[string]int{}
	for range n {
		got[MustAsk(t, ns, proto, addr).Name]++
	}
	return got
}

// Eventually waits until check returns nil; it fails the test with the last error after limit.
func Eventually(t testing.TB, limit time.Duration, check func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			require.NoError(t, err)
		case <-tick.C:
		}
	}
}

// Capture records packets on one link.
type Capture struct {
	f     *os.File
	match func(dst netip.Addr) bool
	seen  atomic.Int64
	hits  atomic.Int64
	done  chan struct{}
}

// Watch counts the IP packets on link of ns, in both directions, whose destination matches.
func Watch(t testing.TB, ns, link string, match func(dst netip.Addr) bool) *Capture {
	t.Helper()
	c := &Capture{match: match, done: make(chan struct{})}
	In(t, ns, func() error {
		l, err := netlink.LinkByName(link)
		if err != nil {
			return err
		}
		all := uint16(unix.ETH_P_ALL)
		proto := all<<8 | all>>8
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, int(proto))
		if err != nil {
			return err
		}
		c.f = os.NewFile(uintptr(fd), "capture")
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: proto, Ifindex: l.Attrs().Index})
	})
	go c.read()
	t.Cleanup(func() { c.Stop() })
	return c
}

// read counts until the deadline that Stop sets, and then what is still queued: the kernel queues a packet here before it sends it.
func (c *Capture) read() {
	defer close(c.done)
	buf := make([]byte, 65536)
	for {
		n, err := c.f.Read(buf)
		switch {
		case err == nil:
			c.count(buf[:n])
		case errors.Is(err, os.ErrDeadlineExceeded):
			c.drain(buf)
			return
		case errors.Is(err, os.ErrClosed):
			return
		}
	}
}

func (c *Capture) drain(buf []byte) {
	raw, err := c.f.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		for {
			n, err := unix.Read(int(fd), buf)
			if err != nil {
				return
			}
			c.count(buf[:n])
		}
	})
}

func (c *Capture) count(packet []byte) {
	dst, ok := destination(packet)
	if !ok {
		return
	}
	c.seen.Add(1)
	if c.match(dst) {
		c.hits.Add(1)
	}
}

func destination(p []byte) (netip.Addr, bool) {
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		return netip.AddrFrom4([4]byte(p[16:20])), true
	case len(p) >= 40 && p[0]>>4 == 6:
		return netip.AddrFrom16([16]byte(p[24:40])), true
	}
	return netip.Addr{}, false
}

// Stop ends the capture and returns how many IP packets matched and how many there were in all.
func (c *Capture) Stop() (hits, seen int64) {
	_ = c.f.SetReadDeadline(time.Now())
	<-c.done
	_ = c.f.Close()
	return c.hits.Load(), c.seen.Load()
}
