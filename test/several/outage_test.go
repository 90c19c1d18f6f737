package several

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"k8s.io/client-go/rest"
)

// renewDeadline is how long a leader that cannot renew its lease goes on, and some for the machine.
const renewDeadline = 20 * time.Second

// get asks a server for a path, as its administrator.
func (s *server) get(t *testing.T, path string) (int, string) {
	t.Helper()
	client, err := rest.HTTPClientFor(s.config)
	require.NoError(t, err)
	defer client.CloseIdleConnections()
	answer, err := client.Get(s.config.Host + path)
	require.NoError(t, err)
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	require.NoError(t, err)
	return answer.StatusCode, string(body)
}

// leaders counts the servers that take themselves for the leader of a part.
func leaders(t *testing.T, servers []*server, part string) int {
	t.Helper()
	n := 0
	for _, s := range servers {
		code, metrics := s.get(t, "/metrics")
		require.Equal(t, http.StatusOK, code)
		if strings.Contains(metrics, fmt.Sprintf("leader_election_master_status{name=%q} 1\n", "kube-system/"+part)) {
			n++
		}
	}
	return n
}

// TestEtcdDiesAndComesBack: while the etcd is dead the servers say so under upstream's names, and nobody leads after the lease could not be
// renewed; when it is back, they go on by themselves.
func TestEtcdDiesAndComesBack(t *testing.T) {
	e, servers := startTwo(t)
	node := playNode(t, servers[0])
	rollOut(t, servers[0], "before", node)
	parts := []string{"kube-controller-manager", "kube-scheduler"}
	for _, part := range parts {
		eventually(t, "one server leads "+part, func() (bool, string) {
			n := leaders(t, servers, part)
			return n == 1, fmt.Sprint(n)
		})
	}

	require.NoError(t, e.Cmd.Process.Kill())
	_ = e.Stop()
	died := time.Now()
	for _, part := range parts {
		eventually(t, "nobody leads "+part, func() (bool, string) {
			n := leaders(t, servers, part)
			return n == 0, fmt.Sprint(n)
		})
	}
	require.Less(t, time.Since(died), renewDeadline)
	code, body := servers[0].get(t, "/readyz/etcd")
	require.Equal(t, http.StatusInternalServerError, code, body)
	require.True(t, strings.HasPrefix(body, "internal server error: "), body)
	for _, check := range []string{"readyz", "livez"} {
		code, body = servers[0].get(t, "/"+check)
		require.Equal(t, http.StatusInternalServerError, code, body)
		require.Contains(t, body, "[+]ping ok\n")
		require.Contains(t, body, "[-]etcd failed: reason withheld\n")
		require.Contains(t, body, check+" check failed\n")
	}

	e.serve(t, strings.TrimPrefix(e.URL, "http://"))
	for _, s := range servers {
		eventually(t, "the server is ready again", func() (bool, string) {
			code, body := s.get(t, "/readyz")
			return code == http.StatusOK && body == "ok", body
		})
		code, body := s.get(t, "/readyz/etcd")
		require.Equal(t, http.StatusOK, code, body)
	}
	for _, part := range parts {
		eventually(t, "one server leads "+part+" again", func() (bool, string) {
			n := leaders(t, servers, part)
			return n == 1, fmt.Sprint(n)
		})
	}
	rollOut(t, servers[1], "after", node)
	for _, s := range servers {
		select {
		case <-s.exited:
			t.Fatal("a server ended")
		default:
		}
	}
}
