package apiserver_test

import (
	"io"
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"

	"knarr/apiserver"
)

// TestTunnels: a tunnel's handler gets the connection and learns who called, not whom a caller pretends to be; no deadline
// ends it, the end of the server does.
func TestTunnels(t *testing.T) {
	ended := make(chan struct{})
	s := serve(t, func(c *apiserver.Config) {
		c.Tunnels = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			u, _ := apirequest.UserFrom(req.Context())
			if req.Header.Get("Upgrade") == "" {
				io.WriteString(w, u.GetName())
				return
			}
			_, bounded := req.Context().Deadline()
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil || bounded {
				http.Error(w, "no tunnel", http.StatusInternalServerError)
				return
			}
			defer conn.Close()
			io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n"+u.GetName())
			<-req.Context().Done()
			close(ended)
		})
	})
	client := newClient(t, false)
	for token, want := range map[string]answer{
		"":          {status: http.StatusOK, body: "system:anonymous"},
		"bad":       {status: http.StatusUnauthorized},
		nobodyToken: {status: http.StatusOK, body: "nobody"},
		adminToken:  {status: http.StatusOK, body: "admin"},
	} {
		got := s.ask(t, client, request{path: apiserver.TunnelPath, token: token, header: map[string]string{"Impersonate-User": "system:node:n1"}})
		require.Equal(t, want.status, got.status, got.body)
		if want.body != "" {
			require.Equal(t, want.body, got.body)
		}
	}
	got := s.ask(t, client, request{path: apiserver.TunnelPath + "/x", token: nobodyToken})
	require.Equal(t, http.StatusForbidden, got.status, "only this path")

	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, s.url+apiserver.TunnelPath, nil)
	require.NoError(t, err)
	req.Header = http.Header{"Authorization": {"Bearer " + adminToken}, "Connection": {"Upgrade"}, "Upgrade": {"x"}}
	resp, err := client.Do(req)
	require.NoError(t, err)
	require.Equal(t, http.StatusSwitchingProtocols, resp.StatusCode)
	defer resp.Body.Close()
	name := make([]byte, len("admin"))
	_, err = io.ReadFull(resp.Body, name)
	require.NoError(t, err)
	require.Equal(t, "admin", string(name))
	s.end()
	<-ended
}
