package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// testTimeout bounds waits of tests; it is only reached when a test fails.
const testTimeout = 20 * time.Second

func httpClient(h http.HandlerFunc) *http.Client {
	return &http.Client{Transport: newTransport(h, ServiceAccount("tester"))}
}

func TestTransportCarriesRequestAndIdentity(t *testing.T) {
	type seen struct {
		Method, URI, Body, Header, User string
		Groups                          []string
		Leak                            bool
	}
	type leak struct{}
	var got seen
	c := httpClient(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		u, _ := UserFrom(r.Context())
		got = seen{r.Method, r.RequestURI, string(b), r.Header.Get("X-A"), u.GetName(), u.GetGroups(), r.Context().Value(leak{}) != nil}
		r.Header.Del("X-A")
		w.Header().Set("X-B", "b")
		w.WriteHeader(http.StatusCreated)
		w.Header().Set("X-B", "too late")
		_, _ = io.WriteString(w, "made")
	})
	ctx := context.WithValue(WithUser(context.Background(), User("mallory")), leak{}, true)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, inProcessHost+"/api/v1/x?y=z", strings.NewReader("in"))
	require.NoError(t, err)
	req.Header.Set("X-A", "a")
	resp, err := c.Do(req)
	require.NoError(t, err)
	out, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	require.Equal(t, seen{"POST", "/api/v1/x?y=z", "in", "a", "system:serviceaccount:kube-system:tester",
		[]string{"system:serviceaccounts", "system:serviceaccounts:kube-system", "system:authenticated"}, false}, got)
	require.Equal(t, http.StatusCreated, resp.StatusCode)
	require.Equal(t, "b", resp.Header.Get("X-B"))
	require.Equal(t, "made", string(out))
	require.Equal(t, "a", req.Header.Get("X-A"), "the client's header is its own")
}

func TestTransportStreamsAndCancels(t *testing.T) {
	ended := make(chan error, 1)
	c := httpClient(func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		for i := 0; ; i++ {
			if _, err := fmt.Fprintf(w, "event %d\n", i); err != nil {
				ended <- err
				return
			}
		}
	})
	resp, err := c.Get(inProcessHost + "/watch")
	require.NoError(t, err)
	lines := bufio.NewScanner(resp.Body)
	for i := range 3 {
		require.True(t, lines.Scan())
		require.Equal(t, fmt.Sprintf("event %d", i), lines.Text())
	}
	require.NoError(t, resp.Body.Close())
	require.ErrorIs(t, receive(t, ended), errBodyClosed, "a handler that writes for ever is stopped by back-pressure and then by Close")
}

func TestTransportContextEndsHandlerAndBody(t *testing.T) {
	ended := make(chan error, 1)
	c := httpClient(func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		ended <- r.Context().Err()
	})
	ctx, cancel := context.WithCancel(context.Background())
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, inProcessHost+"/", nil)
	require.NoError(t, err)
	resp, err := c.Do(req)
	require.NoError(t, err)
	cancel()
	_, err = io.ReadAll(resp.Body)
	require.ErrorIs(t, err, context.Canceled)
	require.ErrorIs(t, receive(t, ended), context.Canceled)
	require.NoError(t, resp.Body.Close())

	_, err = c.Do(req)
	require.ErrorIs(t, err, context.Canceled, "a request that is over before it starts")
}

func TestTransportCancelBeforeHeader(t *testing.T) {
	entered := make(chan struct{})
	c := httpClient(func(w http.ResponseWriter, r *http.Request) {
		close(entered)
		<-r.Context().Done()
	})
	ctx, cancel := context.WithCancel(context.Background())
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, inProcessHost+"/", nil)
	require.NoError(t, err)
	go func() { <-entered; cancel() }()
	_, err = c.Do(req)
	require.ErrorIs(t, err, context.Canceled)
}

func TestTransportHandlerEnds(t *testing.T) {
	big := bytes.Repeat([]byte("0123456789abcdef"), maxBufferedBodyBytes/4)
	for name, tc := range map[string]struct {
		handler http.HandlerFunc
		status  int
		body    []byte
		err     error
	}{
		"nothing written":    {func(http.ResponseWriter, *http.Request) {}, 200, nil, nil},
		"status only":        {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(404) }, 404, nil, nil},
		"body over bound":    {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(big) }, 200, big, nil},
		"panic before":       {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, 0, nil, io.ErrUnexpectedEOF},
		"panic in the body":  {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("x")); panic(http.ErrAbortHandler) }, 200, []byte("x"), io.ErrUnexpectedEOF},
		"informational only": {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(100); w.WriteHeader(202) }, 202, nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			resp, err := httpClient(tc.handler).Get(inProcessHost + "/")
			if tc.status == 0 {
				require.ErrorIs(t, err, tc.err)
				return
			}
			require.NoError(t, err)
			require.Equal(t, tc.status, resp.StatusCode)
			got, err := io.ReadAll(resp.Body)
			require.True(t, errors.Is(err, tc.err) || err == nil && tc.err == nil, "%v", err)
			require.True(t, bytes.Equal(tc.body, got))
			require.NoError(t, resp.Body.Close())
		})
	}
}

func TestTransportRefusesUpgrade(t *testing.T) {
	req, err := http.NewRequest(http.MethodGet, inProcessHost+"/exec", nil)
	require.NoError(t, err)
	req.Header.Set("Upgrade", "websocket")
	_, err = httpClient(func(http.ResponseWriter, *http.Request) { t.Error("handler called") }).Do(req)
	require.ErrorIs(t, err, errUpgrade)
}

// A typed client on Config: protobuf out, protobuf or JSON in, watch as a stream.
func TestConfigWithTypedClient(t *testing.T) {
	var contentType, accept string
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		contentType, accept = r.Header.Get("Content-Type"), r.Header.Get("Accept")
		w.Header().Set("Content-Type", "application/json")
		pod := corev1.Pod{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}, ObjectMeta: metav1.ObjectMeta{Name: "a", Namespace: "n"}}
		if r.URL.Query().Get("watch") == "true" {
			_ = json.NewEncoder(w).Encode(map[string]any{"type": "ADDED", "object": pod})
			w.(http.Flusher).Flush()
			<-r.Context().Done()
			return
		}
		_ = json.NewEncoder(w).Encode(pod)
	})
	cs, err := kubernetes.NewForConfig(Config(handler, ServiceAccount("x")))
	require.NoError(t, err)
	for range 100 { // well over client-go's default burst: no client-side limit
		_, err = cs.CoreV1().Pods("n").Create(context.Background(), &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "a"}}, metav1.CreateOptions{})
		require.NoError(t, err)
	}
	require.Equal(t, "application/vnd.kubernetes.protobuf", contentType)
	require.Contains(t, accept, "application/vnd.kubernetes.protobuf")

	w, err := cs.CoreV1().Pods("n").Watch(context.Background(), metav1.ListOptions{})
	require.NoError(t, err)
	ev := receive(t, w.ResultChan())
	require.Equal(t, "a", ev.Object.(*corev1.Pod).Name)
	w.Stop()
	for range w.ResultChan() {
	}
}

// receive takes one value from ch or fails the test.
func receive[T any](t *testing.T, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(testTimeout):
		require.FailNow(t, "nothing received")
		panic("unreachable")
	}
}
