package tunnel

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/authentication/user"
)

const megabyte = 1 << 20

// TestManyConnectionsAtOnce: each gets its own bytes, in order and all of them.
func TestManyConnectionsAtOnce(t *testing.T) {
	w := newWorld(t, closed)
	pod := w.far(echo)
	var wg sync.WaitGroup
	for i := range 48 {
		wg.Go(func() {
			c, err := w.hub.DialContext(t.Context(), "tcp", pod)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			want := pattern(i, megabyte)
			go func() {
				c.Write(want)
				c.(*conn).CloseWrite()
			}()
			got, err := io.ReadAll(c)
			if err != nil || !bytes.Equal(want, got) {
				t.Errorf("connection %d: %d of %d bytes, or others: %v", i, len(got), len(want), err)
			}
		})
	}
	wg.Wait()
}

// TestEnds: how connections end is seen at the other end.
func TestEnds(t *testing.T) {
	w := newWorld(t, closed)
	w.far(echo)
	heard := make(chan int, 1)
	count := func(c *net.TCPConn) int64 { n, _ := io.Copy(io.Discard, c); return n }
	for name, tc := range map[string]struct {
		pod    func(*net.TCPConn)
		server func(*testing.T, net.Conn)
	}{
		"the server ends its direction and still hears the answer": {
			func(c *net.TCPConn) { c.Write(pattern(int(count(c)), 8)) },
			func(t *testing.T, c net.Conn) {
				_, err := c.Write(pattern(1, megabyte))
				require.NoError(t, err)
				require.NoError(t, c.(*conn).CloseWrite())
				got, err := io.ReadAll(c)
				require.NoError(t, err)
				require.Equal(t, string(pattern(megabyte, 8)), string(got))
			},
		},
		"what was written before a close arrives": {
			func(c *net.TCPConn) { heard <- int(count(c)) },
			func(t *testing.T, c net.Conn) {
				_, err := c.Write(pattern(1, megabyte))
				require.NoError(t, err)
				require.NoError(t, c.Close())
				require.Equal(t, megabyte, <-heard)
				_, err = c.Read(make([]byte, 1))
				require.ErrorIs(t, err, net.ErrClosed)
				_, err = c.Write([]byte("x"))
				require.ErrorIs(t, err, net.ErrClosed)
			},
		},
		"a close ends a pod that only talks": {
			func(c *net.TCPConn) {
				n := 0
				for {
					if _, err := c.Write(pattern(1, 1<<10)); err != nil {
						break
					}
					n++
				}
				heard <- n
			},
			func(t *testing.T, c net.Conn) {
				_, err := io.ReadFull(c, make([]byte, megabyte))
				require.NoError(t, err)
				require.NoError(t, c.Close())
				<-heard
			},
		},
		"all that the pod said arrives, then its end": {
			func(c *net.TCPConn) { c.Write(pattern(1, megabyte)) },
			func(t *testing.T, c net.Conn) {
				got, err := io.ReadAll(c)
				require.NoError(t, err)
				require.Len(t, got, megabyte)
			},
		},
		"a pod that breaks off is an error, not an end": {
			func(c *net.TCPConn) { c.Read(make([]byte, 1)); c.SetLinger(0) },
			func(t *testing.T, c net.Conn) {
				_, err := c.Write([]byte("x"))
				require.NoError(t, err)
				_, err = io.ReadAll(c)
				require.Error(t, err)
				var op *net.OpError
				require.ErrorAs(t, err, &op)
				require.Equal(t, "read", op.Op)
			},
		},
		"a deadline that passed does not end the connection": {
			echo,
			func(t *testing.T, c net.Conn) {
				require.NoError(t, c.SetReadDeadline(time.Now().Add(20*time.Millisecond)))
				_, err := c.Read(make([]byte, 1))
				require.ErrorIs(t, err, os.ErrDeadlineExceeded)
				require.NoError(t, c.SetDeadline(time.Now().Add(patience)))
				says(t, c, "still here")
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			tc.server(t, dial(t, w.hub, listen(t, podIP+":0", tc.pod)))
		})
	}
}

// TestAReaderThatStandsStill: what waits for it is bounded, and the other connections go on.
func TestAReaderThatStandsStill(t *testing.T) {
	w := newWorld(t, closed)
	release := make(chan struct{})
	stuck := w.far(func(c *net.TCPConn) { <-release })
	defer close(release)
	lively := listen(t, podIP+":0", echo)
	var wg sync.WaitGroup
	defer wg.Wait()
	for range 8 {
		c := dial(t, w.hub, stuck)
		require.NoError(t, c.SetWriteDeadline(time.Now().Add(300*time.Millisecond)))
		wg.Go(func() {
			n, err := c.Write(pattern(1, 64*megabyte))
			if !errors.Is(err, os.ErrDeadlineExceeded) || n > 16*megabyte {
				t.Errorf("%d bytes taken, %v", n, err)
			}
		})
	}
	time.Sleep(100 * time.Millisecond) // the windows of those that stand still are full by now; a shorter wait only tests less
	c := dial(t, w.hub, lively)
	for range 20 {
		says(t, c, string(pattern(2, 64<<10)))
	}
}

// TestConnectionsAreBounded: one more than a tunnel carries is refused, and one that ended makes room.
func TestConnectionsAreBounded(t *testing.T) {
	w := newWorld(t, closed)
	pod := w.far(echo)
	var last net.Conn
	for range maxConnections {
		last = dial(t, w.hub, pod)
		says(t, last, "x")
	}
	_, err := w.hub.DialContext(t.Context(), "tcp", pod)
	require.ErrorContains(t, err, "carries 256 connections already")
	require.NoError(t, last.Close())
	require.Eventually(t, func() bool {
		c, err := w.hub.DialContext(t.Context(), "tcp", pod)
		if err == nil {
			c.Close()
		}
		return err == nil
	}, patience, 10*time.Millisecond)
}

// TestForeignTargets: each end refuses what does not belong to the node, also where the other end would allow it.
func TestForeignTargets(t *testing.T) {
	w := newWorld(t, closed)
	w.far(echo)
	w.hub.mu.Lock()
	tunnel := w.hub.tunnels[nodeName][0]
	w.hub.mu.Unlock()
	for _, foreign := range []string{"127.0.0.1:22", "127.0.0.2:10250", "127.77.2.9:80", "127.77.1.1:80", "169.254.169.254:80", "[::1]:10250"} {
		t.Run("the node refuses "+foreign, func(t *testing.T) {
			_, err := tunnel.dial(t.Context(), netip.MustParseAddrPort(foreign))
			refusal := (*Refusal)(nil)
			require.ErrorAs(t, err, &refusal)
			require.Equal(t, http.StatusForbidden, refusal.Status)
			require.ErrorContains(t, err, "its tunnel leads to its own API and its pods only")
		})
	}
	for _, foreign := range []string{"127.0.0.1:22", "far:22", "127.77.1.1:80"} {
		t.Run("the server sends no "+foreign, func(t *testing.T) {
			_, err := w.hub.DialContext(t.Context(), "tcp", foreign)
			require.ErrorContains(t, err, `node "far" cannot be reached directly, and tunnels lead only to a node's API and pods`)
		})
	}
	_, err := w.hub.DialContext(t.Context(), "tcp", podIP+":1")
	require.ErrorContains(t, err, "dial 127.77.1.9:1 through the tunnel of node \"far\": ")
	require.ErrorContains(t, err, "connection refused")
}

// TestWhoMayOffer: who has a node's certificate, and asks for an upgrade.
func TestWhoMayOffer(t *testing.T) {
	w := newWorld(t, closed)
	for name, tc := range map[string]struct {
		user, group, upgrade, method string
		status                       int
		says                         string
	}{
		"a node":                      {"system:node:n1", user.NodesGroup, Protocol, http.MethodGet, http.StatusSwitchingProtocols, ""},
		"an administrator":            {"admin", user.SystemPrivilegedGroup, Protocol, http.MethodGet, http.StatusForbidden, "a tunnel is offered by a node"},
		"a node's name alone":         {"system:node:n1", "users", Protocol, http.MethodGet, http.StatusForbidden, "a tunnel is offered by a node"},
		"a node without a name":       {"system:node:", user.NodesGroup, Protocol, http.MethodGet, http.StatusForbidden, "a tunnel is offered by a node"},
		"nobody":                      {"", "", Protocol, http.MethodGet, http.StatusForbidden, "a tunnel is offered by a node"},
		"a node that asks for a page": {"system:node:n1", user.NodesGroup, "", http.MethodGet, http.StatusUpgradeRequired, Protocol},
		"a node of another protocol":  {"system:node:n1", user.NodesGroup, "websocket", http.MethodGet, http.StatusUpgradeRequired, Protocol},
	} {
		t.Run(name, func(t *testing.T) {
			config := w.client(tc.user, tc.group)
			if tc.user == "" {
				config.Certificates = nil
			}
			transport := &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}
			defer transport.CloseIdleConnections()
			req, err := http.NewRequestWithContext(t.Context(), tc.method, "https://"+w.address+testPath, nil)
			require.NoError(t, err)
			if tc.upgrade != "" {
				req.Header.Set("Connection", "Upgrade")
				req.Header.Set("Upgrade", tc.upgrade)
			}
			answer, err := transport.RoundTrip(req)
			require.NoError(t, err)
			defer answer.Body.Close()
			require.Equal(t, tc.status, answer.StatusCode)
			if tc.says != "" {
				text, err := io.ReadAll(answer.Body)
				require.NoError(t, err)
				require.Contains(t, string(text), tc.says)
			}
		})
	}
}

// TestWays: direct where that works, else through the tunnel, without a wait once that is known.
func TestWays(t *testing.T) {
	for name, tc := range map[string]struct {
		direct   way
		address  string // the node's
		noRoutes bool
		toNode   bool
		through  bool
		dials    []int32       // direct dials begun after each connection
		atLeast  time.Duration // the first
	}{
		"direct works":                       {direct: open, address: nodeIP, dials: []int32{1, 2}},
		"direct works, to the node itself":   {direct: open, address: nodeIP, toNode: true, dials: []int32{1, 2}},
		"direct is refused":                  {direct: closed, address: nodeIP, through: true, dials: []int32{1, 1}},
		"direct is swallowed":                {direct: swallowed, address: nodeIP, through: true, dials: []int32{1, 1}, atLeast: headStart},
		"address translation lies between":   {direct: swallowed, address: "192.0.2.7", through: true, dials: []int32{0, 0}},
		"no routes to pods":                  {direct: open, address: nodeIP, noRoutes: true, through: true, dials: []int32{0, 0}},
		"no routes to pods, but to the node": {direct: open, address: nodeIP, noRoutes: true, toNode: true, dials: []int32{1, 2}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, tc.direct)
			w.hub.o.PodRoutes = !tc.noRoutes
			if tc.atLeast == 0 {
				w.hub.headStart = patience // a busy machine changes nothing
			}
			api := listen(t, nodeIP+":0", echo)
			to := listen(t, podIP+":0", echo)
			if tc.toNode {
				to = api
			}
			w.register(nodeName, tc.address, nodeRange.String(), portOf(t, api))
			w.run(w.agent(portOf(t, api)))
			w.hub.await(t, 1)
			for i, dials := range tc.dials {
				begin := time.Now()
				c := dial(t, w.hub, to)
				took := time.Since(begin)
				says(t, c, "hello")
				_, through := c.(*conn)
				require.Equal(t, tc.through, through)
				require.Equal(t, dials, w.direct.Load())
				if i == 0 {
					require.GreaterOrEqual(t, took, tc.atLeast)
				}
			}
		})
	}
}

// TestATunnelThatComesMeanwhile: a dial that has no way yet takes a tunnel that comes.
func TestATunnelThatComesMeanwhile(t *testing.T) {
	w := newWorld(t, swallowed)
	w.register(nodeName, nodeIP, nodeRange.String(), 10250)
	pod := listen(t, podIP+":0", echo)
	dialled := make(chan error, 1)
	go func() {
		c, err := w.hub.DialContext(t.Context(), "tcp", pod)
		if err == nil {
			c.Close()
		}
		dialled <- err
	}()
	require.Eventually(t, func() bool { return w.direct.Load() == 1 }, patience, time.Millisecond)
	w.run(w.agent(10250))
	require.NoError(t, <-dialled)
}

// TestWithoutATunnel: the error says what is missing, and a dial ends when its caller gives up.
func TestWithoutATunnel(t *testing.T) {
	w := newWorld(t, closed)
	w.register(nodeName, nodeIP, nodeRange.String(), 10250)
	for _, address := range []string{"far:10250", nodeIP + ":10250", podIP + ":80"} {
		_, err := w.hub.DialContext(t.Context(), "tcp", address)
		require.ErrorContains(t, err, `node "far" cannot be reached directly, and its agent keeps no tunnel to this server`)
		require.ErrorIs(t, err, syscall.EHOSTUNREACH)
	}
	_, err := w.hub.DialContext(t.Context(), "tcp", "203.0.113.1:80")
	require.ErrorIs(t, err, syscall.EHOSTUNREACH, "no node's: dialled as ever")
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	slow := newWorld(t, swallowed)
	slow.register(nodeName, nodeIP, nodeRange.String(), 10250)
	_, err = slow.hub.DialContext(ctx, "tcp", podIP+":80")
	require.ErrorIs(t, err, context.DeadlineExceeded)
}

// TestWhoseAnAddressIs: what names nobody, or more than one, is no target.
func TestWhoseAnAddressIs(t *testing.T) {
	w := newWorld(t, open)
	w.register("a", "192.0.2.1", "127.77.1.0/24", 10250)
	w.register("b", "192.0.2.1", "127.77.2.0/24", 10250) // behind another firewall
	w.register("c", "192.0.2.3", "127.77.2.0/24", 10250) // claims another's range
	w.register("d", "192.0.2.4", "0.0.0.0/0", 10250)     // claims everything
	w.register("f", "192.0.2.1", "127.77.6.0/24", 10251) // beside a, on one machine
	w.register("e", "e.example", "127.77.5.0/26", 10250)
	require.NoError(t, w.pods.Add(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: "ns"}, Spec: corev1.PodSpec{
		NodeName: "c", HostNetwork: true, Containers: []corev1.Container{{Ports: []corev1.ContainerPort{{ContainerPort: 9443}}}}}}))
	for address, want := range map[string]string{
		"a:10250":                  "a 192.0.2.1:10250 node permitted",
		"b:10250":                  "b 192.0.2.1:10250 node permitted",
		"192.0.2.1:10250":          "",
		"192.0.2.1:10251":          "f 192.0.2.1:10251 node permitted",
		"192.0.2.1:9443":           "",
		"192.0.2.3:10250":          "c 192.0.2.3:10250 node permitted",
		"[::ffff:192.0.2.3]:10250": "c 192.0.2.3:10250 node permitted",
		"192.0.2.3:9443":           "c 192.0.2.3:9443 node permitted",
		"192.0.2.3:22":             "c 192.0.2.3:22 node",
		"192.0.2.4:9443":           "d 192.0.2.4:9443 node",
		"127.77.1.7:8080":          "a 127.77.1.7:8080 pod permitted",
		"127.77.1.1:8080":          "a 127.77.1.1:8080 pod",
		"127.77.2.7:8080":          "",
		"127.77.5.7:8080":          "e 127.77.5.7:8080 pod permitted",
		"127.77.5.70:8080":         "",
		"203.0.113.1:443":          "",
		"[2001:db8::1]:443":        "",
		"e:10250":                  "",
		"nobody:443":               "",
		"192.0.2.1":                "",
		"192.0.2.1:http":           "",
	} {
		got := ""
		if to, ok := w.hub.locate(address); ok {
			got = to.node.Name + " " + to.addr.String() + map[kind]string{toNode: " node", toPod: " pod"}[to.kind]
			if to.permitted {
				got += " permitted"
			}
		}
		require.Equal(t, want, got, address)
	}
}

// wire forwards connections to the server until it is cut: then bytes vanish, and nobody is told.
type wire struct {
	address string
	cut     atomic.Bool
}

func newWire(t *testing.T, to string) *wire {
	w := &wire{}
	forward := func(dst, src net.Conn) {
		defer dst.Close()
		buf := make([]byte, 32<<10)
		for {
			n, err := src.Read(buf)
			if err != nil {
				return
			}
			if !w.cut.Load() {
				if _, err := dst.Write(buf[:n]); err != nil {
					return
				}
			}
		}
	}
	w.address = listen(t, "127.0.0.1:0", func(c *net.TCPConn) {
		if w.cut.Load() {
			return
		}
		s, err := net.Dial("tcp", to)
		if err != nil {
			return
		}
		var wg sync.WaitGroup
		wg.Go(func() { forward(s, c) })
		forward(c, s)
		wg.Wait()
	})
	return w
}

// TestADeadPeer: both ends find out by themselves, and connections that were open break.
func TestADeadPeer(t *testing.T) {
	w := newWorld(t, closed)
	w.hub.vitals = vitals{silence: 100 * time.Millisecond, answer: 2 * time.Second}
	wire := newWire(t, w.address)
	w.register(nodeName, nodeIP, nodeRange.String(), 10250)
	a := w.agent(10250)
	a.o.Server = wire.address
	a.vitals = vitals{silence: 400 * time.Millisecond, answer: 2 * time.Second}
	w.run(a)
	w.hub.await(t, 1)
	c := dial(t, w.hub, listen(t, podIP+":0", echo))
	says(t, c, "hello")
	time.Sleep(600 * time.Millisecond) // longer than both silences: an idle tunnel lives
	says(t, c, "hello again")
	wire.cut.Store(true)
	_, err := c.Read(make([]byte, 1))
	require.Error(t, err)
	require.NotErrorIs(t, err, os.ErrDeadlineExceeded)
	w.hub.await(t, 0)
	wire.cut.Store(false)
	w.hub.await(t, 1)
	says(t, dial(t, w.hub, listen(t, podIP+":0", echo)), "back")
}

// TestAServerThatComesBack: the agent returns by itself.
func TestAServerThatComesBack(t *testing.T) {
	w := newWorld(t, closed)
	pod := w.far(echo)
	c := dial(t, w.hub, pod)
	says(t, c, "hello")
	w.stop()
	_, err := c.Read(make([]byte, 1))
	require.Error(t, err)
	w.hub.await(t, 0)
	_, err = w.hub.DialContext(t.Context(), "tcp", pod)
	require.ErrorContains(t, err, "keeps no tunnel")
	w.serve(w.address)
	w.hub.await(t, 1)
	says(t, dial(t, w.hub, pod), "hello")
}

// TestSeveralServers: a tunnel to each while they are known, and no more than a few of one node to one server.
func TestSeveralServers(t *testing.T) {
	first, second := newWorld(t, closed), newWorld(t, closed)
	second.authority = first.authority // servers of one cluster
	second.stop()
	second.serve("127.0.0.1:0")
	known := make(chan []string, 1)
	list := []string{first.address}
	changed := make(chan struct{})
	a := first.agent(10250)
	a.o.Changed = changed
	a.o.Servers = func() []string {
		select {
		case list = <-known:
		default:
		}
		return list
	}
	first.run(a)
	first.hub.await(t, 1)
	second.hub.await(t, 0)
	known <- []string{first.address, second.address}
	changed <- struct{}{}
	second.hub.await(t, 1)
	first.hub.await(t, 1)
	known <- []string{first.address}
	changed <- struct{}{}
	second.hub.await(t, 0)
	for range tunnelsPerNode + 1 {
		first.run(first.agent(10250))
	}
	first.hub.await(t, tunnelsPerNode)
}
