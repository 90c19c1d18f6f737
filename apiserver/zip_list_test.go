package apiserver_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// askFrom is fetchFrom, which has to succeed.
func askFrom(t testing.TB, c *cluster, path, accept, encoding, remote string) *httptest.ResponseRecorder {
	t.Helper()
	w := fetchFrom(c, path, accept, encoding, remote)
	require.Equal(t, http.StatusOK, w.Code, w.Body)
	return w
}

// unzipped gives the body as it is without compression, and whether it was compressed.
func unzipped(t testing.TB, w *httptest.ResponseRecorder) (body []byte, zipped bool) {
	t.Helper()
	if w.Header().Get("Content-Encoding") == "" {
		require.Empty(t, w.Header().Get("Vary"))
		return w.Body.Bytes(), false
	}
	require.Equal(t, "gzip", w.Header().Get("Content-Encoding"))
	require.Equal(t, "Accept-Encoding", w.Header().Get("Vary"))
	z, err := gzip.NewReader(w.Body)
	require.NoError(t, err)
	z.Multistream(false)
	body, err = io.ReadAll(z)
	require.NoError(t, err)
	return body, true
}

// TestZippedLists asks for lists while their objects change: what comes compressed is what comes as it is.
func TestZippedLists(t *testing.T) {
	c := startCluster(t, vfs.NewMem(), nil)
	defer c.stop()
	ctx := context.Background()
	seeds := [2]uint64{rand.Uint64(), rand.Uint64()}
	t.Log("seeds", seeds)
	r := rand.New(rand.NewPCG(seeds[0], seeds[1]))
	maps := c.CoreV1().ConfigMaps("default")
	change := func() {
		m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("m-", r.IntN(900)), Labels: map[string]string{"half": fmt.Sprint(r.IntN(2))}},
			Data: map[string]string{"k": strings.Repeat(fmt.Sprint(r.IntN(10)), r.IntN(800))}}
		_, err := maps.Create(ctx, m, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) {
			if r.IntN(2) == 0 {
				err = maps.Delete(ctx, m.Name, metav1.DeleteOptions{})
			} else {
				_, err = maps.Update(ctx, m, metav1.UpdateOptions{})
			}
		}
		require.NoError(t, err)
	}
	for range 1500 {
		change()
	}
	zips := 0
	for range 6 {
		for _, path := range []string{"/api/v1/configmaps", "/api/v1/namespaces/default/configmaps?labelSelector=half%3D1", "/api/v1/configmaps?limit=500",
			"/api/v1/configmaps?fieldSelector=metadata.namespace%3Ddefault"} {
			for _, accept := range []string{runtime.ContentTypeJSON, runtime.ContentTypeProtobuf} {
				plain, zipped := unzipped(t, askFrom(t, c, path, accept, "", "192.0.2.1:1"))
				require.False(t, zipped)
				for encoding, remote := range map[string]string{"gzip": "192.0.2.1:1", "br, gzip": "127.0.0.1:1"} {
					got, zipped := unzipped(t, askFrom(t, c, path, accept, encoding, remote))
					require.True(t, bytes.Equal(plain, got), "%s %s", path, accept)
					if zipped {
						zips++
					} else {
						require.Less(t, len(got), 128<<10)
					}
				}
				_, zipped = unzipped(t, askFrom(t, c, path, accept, "gzip;q=0", "192.0.2.1:1"))
				require.False(t, zipped)
			}
		}
		for range 20 {
			change()
		}
	}
	require.NotZero(t, zips)
}

// BenchmarkZippedList lists 5,000 ConfigMaps that do not change.
func BenchmarkZippedList(b *testing.B) {
	c, path := benchNamespace(b)
	for i := range 5000 {
		send(b, c, http.MethodPost, path+"/configmaps", runtime.ContentTypeProtobuf, encodeProto(b, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("m-", i)}, Data: map[string]string{"key": strings.Repeat("x", 200)}}))
	}
	for b.Loop() {
		askFrom(b, c, path+"/configmaps", runtime.ContentTypeProtobuf, "gzip", "192.0.2.1:1")
	}
}
