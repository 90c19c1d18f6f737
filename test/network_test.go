package test

import (
	"fmt"
	"math/bits"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"knarr/internal/rig/machine"
	"knarr/network/netns"
)

// capture records where packets go that arrive in the world.
type capture struct {
	fd   int
	done chan struct{}

	mu sync.Mutex
	to map[netip.Addr]int // destination address -> packets; guarded by mu
}

// startCapture listens on all links of the world.
func startCapture(t *testing.T) *capture {
	t.Helper()
	c := &capture{done: make(chan struct{}), to: map[netip.Addr]int{}}
	require.NoError(t, netns.Do(machine.World(), func() (err error) {
		proto := bits.ReverseBytes16(unix.ETH_P_IP)
		c.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM, int(proto))
		return err
	}))
	require.NoError(t, unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}))
	stop := make(chan struct{})
	go c.read(stop)
	t.Cleanup(func() { close(stop); <-c.done; unix.Close(c.fd) })
	return c
}

func (c *capture) read(stop chan struct{}) {
	defer close(c.done)
	buf := make([]byte, 2048)
	for {
		select {
		case <-stop:
			return
		default:
		}
		n, _, err := unix.Recvfrom(c.fd, buf, 0)
		if err != nil || n < 20 {
			continue // the timeout lets stop be seen
		}
		to, _ := netip.AddrFromSlice(buf[16:20])
		c.mu.Lock()
		c.to[to]++
		c.mu.Unlock()
	}
}

// packets counts those to addresses in a range.
func (c *capture) packets(in string) int {
	p := netip.MustParsePrefix(in)
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for a, k := range c.to {
		if p.Contains(a) {
			n += k
		}
	}
	return n
}

// TestUnknownAddressesAreRejected: a packet to a service or pod that is not there is answered on the node with an error,
// quickly, and none leaves the machine.
func TestUnknownAddressesAreRejected(t *testing.T) {
	c := theCluster(t)
	ns := namespace(t, c)
	for i := range nodes {
		must(t, c, "run", fmt.Sprintf("p%d", i), "-n", ns, "--image=busybox:1",
			fmt.Sprintf(`--overrides={"spec":{"nodeName":"%s-%d","terminationGracePeriodSeconds":0}}`, c.Name, i), "--", "sleep", "3600")
	}
	mustBeReady(t, c, ns)
	seen := startCapture(t)
	unknown := []string{"10.43.77.77", "10.43.255.254", "10.42.0.251", "10.42.1.251", "10.42.200.5"}
	for _, ip := range unknown {
		begin := time.Now()
		_, err := net.DialTimeout("tcp", ip+":80", 5*time.Second)
		require.Error(t, err)
		require.NotContains(t, err.Error(), "timeout", "from the machine to %s", ip)
		require.Less(t, time.Since(begin), 3*time.Second)
		for i := range nodes {
			_, err := c.Kubectl(t.Context(), "exec", "-n", ns, fmt.Sprintf("p%d", i), "--", "timeout", "5", "wget", "-q", "-O", "-", "http://"+ip+"/")
			require.Error(t, err)
			require.Regexp(t, "refused|unreachable|prohibited|No route", err.Error(), "from the pod on node %d to %s", i, ip)
		}
	}
	// The capture works: a packet for the world does arrive, from the machine and from a pod.
	conn, err := net.Dial("udp", "203.0.113.9:9")
	require.NoError(t, err)
	_, err = conn.Write([]byte("hello"))
	require.NoError(t, err)
	require.NoError(t, conn.Close())
	c.Kubectl(t.Context(), "exec", "-n", ns, "p1", "--", "timeout", "1", "wget", "-q", "-O", "-", "http://203.0.113.10/") // nobody answers
	eventually(t, 5*time.Second, "the world hears the machine and the pod", func() (bool, string) {
		return seen.packets("203.0.113.9/32") > 0 && seen.packets("203.0.113.10/32") > 0, fmt.Sprint(seen.to)
	})
	require.Zero(t, seen.packets("10.42.0.0/16"), "packets to pods left the machine")
	require.Zero(t, seen.packets("10.43.0.0/16"), "packets to services left the machine")
	require.Zero(t, seen.packets("10.41.0.0/16"), "packets to nodes left the machine")
}

// TestServiceFollowsReadiness: an endpoint that is not ready gets no requests, one that becomes ready does.
func TestServiceFollowsReadiness(t *testing.T) {
	c := theCluster(t)
	ns := namespace(t, c)
	_, err := c.KubectlStdin(t.Context(), strings.NewReader(`
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: web
    image: busybox:1
    command: [sh, -c, "mkdir -p /www; echo served > /www/index.html; touch /tmp/ready; exec httpd -f -p 8080 -h /www"]
    readinessProbe: {exec: {command: [test, -e, /tmp/ready]}, periodSeconds: 1, failureThreshold: 1}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
`), "apply", "-n", ns, "-f", "-")
	require.NoError(t, err)
	must(t, c, "wait", "pod/web", "-n", ns, "--for=condition=Ready", "--timeout=60s")
	ip := must(t, c, "get", "svc", "web", "-n", ns, "-o", "jsonpath={.spec.clusterIP}")
	answers := func() (bool, string) {
		conn, err := net.DialTimeout("tcp", ip+":80", 2*time.Second)
		if err == nil {
			conn.Close()
		}
		return err == nil, fmt.Sprint(err)
	}
	eventually(t, 20*time.Second, "the service answers", answers)
	must(t, c, "exec", "-n", ns, "web", "--", "rm", "/tmp/ready")
	eventually(t, 20*time.Second, "the service rejects", func() (bool, string) { ok, s := answers(); return !ok && !strings.Contains(s, "timeout"), s })
	must(t, c, "exec", "-n", ns, "web", "--", "touch", "/tmp/ready")
	eventually(t, 20*time.Second, "the service answers again", answers)
}
