package apiserver_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"knarr/apiserver"
)

// plainClient is one HTTP/2 connection of a client that costs little itself: it opens all windows at the beginning and looks at no more
// than it must.
type plainClient struct {
	*http2.Framer
	conn *tls.Conn
	next uint32 // number of the next stream
}

func dialPlain(t testing.TB, s *served) *plainClient {
	t.Helper()
	const all = 1<<31 - 1
	conn, err := tls.Dial("tcp", strings.TrimPrefix(s.url, "https://"), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	p := &plainClient{http2.NewFramer(conn, conn), conn, 1}
	p.SetReuseFrames()
	_, err = io.WriteString(conn, http2.ClientPreface)
	require.NoError(t, err)
	require.NoError(t, p.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: all}))
	require.NoError(t, p.WriteWindowUpdate(0, all-65535))
	return p
}

// get sends a request as the administrator.
func (p *plainClient) get(t testing.TB, path, accept string) {
	t.Helper()
	var block bytes.Buffer
	encode := hpack.NewEncoder(&block)
	for _, f := range [][2]string{{":method", "GET"}, {":scheme", "https"}, {":authority", "h"}, {":path", path},
		{"accept", accept}, {"authorization", "Bearer " + adminToken}} {
		require.NoError(t, encode.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}))
	}
	require.NoError(t, p.WriteHeaders(http2.HeadersFrameParam{StreamID: p.next, BlockFragment: block.Bytes(), EndStream: true, EndHeaders: true}))
	p.next += 2
}

// whole reads one answer to its end, gives the server as much room again and returns its size.
func (p *plainClient) whole(t testing.TB) (size int) {
	t.Helper()
	for {
		f, err := p.ReadFrame()
		require.NoError(t, err)
		if d, ok := f.(*http2.DataFrame); ok {
			if size += len(d.Data()); d.StreamEnded() {
				if size > 0 {
					require.NoError(t, p.WriteWindowUpdate(0, uint32(size)))
				}
				return size
			}
		}
	}
}

// audience are many watches of the ConfigMaps of a namespace, ten on a connection, as the informers of one client.
type audience struct {
	*served
	path    string // of the ConfigMap that changes
	size    int
	changes int
	seen    atomic.Int64
	want    atomic.Int64
	all     chan struct{} // told when as many events were seen as wanted
}

func gatherAudience(t testing.TB, s *served, watches int) *audience {
	t.Helper()
	const perConnection = 10
	ctx := context.Background()
	ns, err := s.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "audience-"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	m, err := s.CoreV1().ConfigMaps(ns.Name).Create(ctx, configMap("told", nil), metav1.CreateOptions{})
	require.NoError(t, err)
	a := &audience{served: s, path: "/api/v1/namespaces/" + ns.Name + "/configmaps", size: watches, all: make(chan struct{}, 1)}
	a.want.Store(int64(watches))
	for range watches / perConnection {
		p := dialPlain(t, s)
		for range perConnection {
			p.get(t, a.path+"?watch=1&resourceVersion="+m.ResourceVersion, runtime.ContentTypeJSON)
		}
		go a.read(p)
	}
	a.path += "/told"
	a.change(t) // who sees it watches
	return a
}

// read counts the events of a connection until it ends.
func (a *audience) read(p *plainClient) {
	for {
		f, err := p.ReadFrame()
		if err != nil {
			return
		}
		if d, ok := f.(*http2.DataFrame); ok {
			if n := int64(bytes.Count(d.Data(), []byte{'\n'})); n > 0 && a.seen.Add(n) == a.want.Load() {
				a.all <- struct{}{}
			}
		}
	}
}

// change changes the object and waits until everybody has seen it.
func (a *audience) change(t testing.TB) {
	a.changes++
	a.want.Store(int64(a.changes * a.size))
	send(t, a.cluster, http.MethodPatch, a.path, string(types.MergePatchType), fmt.Appendf(nil, `{"data":{"other":"%d"}}`, a.changes))
	<-a.all
}

// BenchmarkWatchers changes an object that many watch, through TLS and HTTP/2; an operation is one event of one watcher, the client's part
// and the change's share in it.
func BenchmarkWatchers(b *testing.B) {
	s := serveOn(b, func(*apiserver.Config) {}, func(*apiserver.Server) {}, false)
	for _, watches := range []int{100, 1000} {
		b.Run(fmt.Sprint(watches), func(b *testing.B) {
			a := gatherAudience(b, s, watches)
			b.ReportAllocs()
			b.ResetTimer()
			for i := 0; i < b.N; i += watches {
				a.change(b)
			}
		})
	}
}

// BenchmarkServedList lists 5,000 Pods and a tenth of them, through TLS and HTTP/2, the client's part in it.
func BenchmarkServedList(b *testing.B) {
	const pods = 5000
	s := serveOn(b, func(*apiserver.Config) {}, func(*apiserver.Server) {}, false)
	ctx := context.Background()
	_, err := s.CoreV1().ServiceAccounts("default").Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "bench"}}, metav1.CreateOptions{})
	require.NoError(b, err)
	for i := range pods {
		pod := benchPod(fmt.Sprintf("p%d", i))
		pod.Labels["shard"] = fmt.Sprint(i % 10)
		send(b, s.cluster, http.MethodPost, "/api/v1/namespaces/default/pods", runtime.ContentTypeProtobuf, encodeProto(b, pod))
	}
	for _, accept := range []string{runtime.ContentTypeProtobuf, runtime.ContentTypeJSON} {
		for _, query := range []string{"resourceVersion=0", "labelSelector=shard%3D3"} {
			b.Run(accept+" "+query, func(b *testing.B) {
				p := dialPlain(b, s)
				b.ReportAllocs()
				for b.Loop() {
					p.get(b, "/api/v1/namespaces/default/pods?"+query, accept)
					b.SetBytes(int64(p.whole(b)))
				}
			})
		}
	}
}
