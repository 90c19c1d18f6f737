package apiserver_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"regexp"
	"runtime/debug"
	"runtime/metrics"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	crdclient "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/klog/v2"

	"knarr/client"
)

const (
	// allocBase and allocPerByte bound what one request may allocate in all, in bytes and in bytes per byte of input. The
	// widest input is a list of empty messages in protobuf: two bytes make a container of 1 KiB in each of some ten copies
	// (decoded, defaulted, converted, admitted, validated with a dozen errors, stored), which is upstream's factor too.
	allocBase    = 64 << 20
	allocPerByte = 24 << 10
	// documentBytes is what building the OpenAPI document of all kinds may take in all, in bytes.
	documentBytes = 512 << 20
	// fuzzHeapBytes bounds what is live after any number of requests, the cluster itself and the caches of compiled
	// expressions included; it is looked at every fuzzHeapPeriod requests.
	fuzzHeapBytes  = 512 << 20
	fuzzHeapPeriod = 10_000
	// fuzzPatience is how long one request may take.
	fuzzPatience = 30 * time.Second
)

// fuzzed is a cluster that is held to what must be true of every request: no panic, not even a recovered one, no answer
// that blames the server, and no more memory than the input explains.
type fuzzed struct {
	*cluster
	kinds     []fuzzKind
	encodings []fuzzEncoding
	requests  int
}

var fuzzing struct {
	once   sync.Once
	c      *fuzzed
	panics atomic.Int64 // all that upstream's recovery was told of
}

// fuzzCluster is the cluster of this process for fuzzing; it is never stopped.
func fuzzCluster(t testing.TB) *fuzzed {
	t.Helper()
	fuzzing.once.Do(func() {
		klog.LogToStderr(false)
		klog.SetOutput(io.Discard) // upstream logs each refused object
		utilruntime.PanicHandlers = append(utilruntime.PanicHandlers, func(context.Context, any) { fuzzing.panics.Add(1) })
		c := &fuzzed{cluster: startCluster(t, vfs.NewMem(), nil), kinds: fuzzKinds(), encodings: fuzzEncodings()}
		c.prepare(t)
		fuzzing.c = c
	})
	require.NotNil(t, fuzzing.c)
	return fuzzing.c
}

// define makes a custom resource and waits until it is served.
func (c *cluster) define(t testing.TB, ctx context.Context, d *apiextensionsv1.CustomResourceDefinition) {
	t.Helper()
	definitions := crdclient.NewForConfigOrDie(restConfig(c)).ApiextensionsV1().CustomResourceDefinitions()
	_, err := definitions.Create(ctx, d, metav1.CreateOptions{})
	require.NoError(t, err)
	changes, err := definitions.Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + d.Name})
	require.NoError(t, err)
	defer changes.Stop()
	for e := range changes.ResultChan() {
		if crd, ok := e.Object.(*apiextensionsv1.CustomResourceDefinition); ok && len(crd.Status.Conditions) >= 2 && crd.Status.Conditions[1].Status == "True" {
			return
		}
	}
	t.Fatalf("%s is not served", d.Name)
}

// recorder is a response that ends a watch as soon as its stream has begun.
type recorder struct {
	*httptest.ResponseRecorder
	begun context.CancelFunc
}

// Flush implements http.Flusher.
func (r *recorder) Flush() { r.ResponseRecorder.Flush(); r.begun() }

// FlushError is what http.ResponseController calls.
func (r *recorder) FlushError() error { r.Flush(); return nil }

// CloseNotify implements what upstream's wrappers ask for before they pass Flush on.
func (r *recorder) CloseNotify() <-chan bool { return nil }

// admin is who sends the requests unless it says otherwise.
var admin = client.User("admin", user.SystemPrivilegedGroup)

// target makes a request as net/http's server would; nil for one that it would refuse itself.
func target(method, uri string, body []byte) *http.Request {
	u, err := url.ParseRequestURI(uri)
	if err != nil {
		return nil
	}
	req, err := http.NewRequest(method, "https://knarr/", bytes.NewReader(body))
	if err != nil {
		return nil
	}
	req.URL, req.RequestURI, req.Host, req.RemoteAddr = u, uri, "knarr", "127.0.0.1:1"
	return req
}

// do sends a request and holds the server to what must be true of each; nil for a request that is none.
func (c *fuzzed) do(t testing.TB, method, uri, contentType, accept string, body []byte) *httptest.ResponseRecorder {
	t.Helper()
	req := target(method, uri, body)
	if req == nil {
		return nil
	}
	req.Header.Set("Accept", accept)
	if body != nil {
		req.Header.Set("Content-Type", contentType)
	}
	return c.send(t, req, len(uri)+len(body), admin)
}

// send is do for a request that was made already; size is how much of it the fuzzer chose.
func (c *fuzzed) send(t testing.TB, req *http.Request, size int, who user.Info) *httptest.ResponseRecorder {
	t.Helper()
	ctx, cancel := context.WithTimeout(client.WithUser(context.Background(), who), fuzzPatience)
	defer cancel()
	w := &recorder{httptest.NewRecorder(), cancel}
	before, panics := allocated(), fuzzing.panics.Load()
	serveGuarded(t, &c.handler, w, req.WithContext(ctx))
	used := allocated() - before
	if fuzzing.panics.Load() != panics {
		t.Fatalf("%s %s: a panic was recovered: %s", req.Method, req.RequestURI, w.Body)
	}
	limit := uint64(allocBase + allocPerByte*size)
	if strings.HasPrefix(req.URL.Path, "/openapi/") {
		limit += documentBytes
	}
	if used > limit {
		t.Fatalf("%s %s: %d bytes of input took %d bytes of memory, more than %d", req.Method, req.RequestURI, size, used, limit)
	}
	if ctx.Err() == context.DeadlineExceeded {
		t.Fatalf("%s %s: no end within %s", req.Method, req.RequestURI, fuzzPatience)
	}
	if w.Code >= 500 && !excused(req, w.Body.String()) {
		t.Fatalf("%s %s: %d: %s", req.Method, req.RequestURI, w.Code, w.Body)
	}
	if c.requests++; c.requests%fuzzHeapPeriod == 0 {
		live := heap()
		if live > fuzzHeapBytes {
			t.Fatalf("%d bytes are live after %d requests, more than %d", live, c.requests, fuzzHeapBytes)
		}
		if log := os.Getenv("KNARR_FUZZ_LOG"); log != "" {
			note(t, log, fmt.Sprintf("%s: %d MiB live after %d requests\n", t.Name(), live>>20, c.requests))
		}
	}
	return w.ResponseRecorder
}

// note appends a line to a file: what a fuzzing process prints is not shown.
func note(t testing.TB, file, line string) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	require.NoError(t, err)
	_, err = f.WriteString(line)
	require.NoError(t, err)
	require.NoError(t, f.Close())
}

// serveGuarded turns a panic into a failure that shows where it came from.
func serveGuarded(t testing.TB, h http.Handler, w http.ResponseWriter, req *http.Request) {
	t.Helper()
	defer func() {
		if reason := recover(); reason != nil {
			t.Fatalf("%s %s: panic: %v\n%s", req.Method, req.RequestURI, reason, debug.Stack())
		}
	}()
	h.ServeHTTP(w, req)
}

// allocated counts the bytes that this process has ever allocated on its heap.
func allocated() uint64 {
	s := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}

// upstreamBlames are what upstream's own code says with a status of 500 and more to requests that are the client's fault
// or the future's. They come from code that is upstream's: storage and handlers above ours.
var upstreamBlames = regexp.MustCompile(strings.Join([]string{
	`Too large resource version`,
	`resourceVersion should not be set on objects to be created`,
	`"message":"strconv.ParseUint: parsing`,               // an update of a revision that is no number
	`resourceVersion: Invalid value`,                      // a watch from a revision that is no number
	`Non-matching dry-run options in request and content`, // an eviction
	`failed to create typed patch object`,                 // an apply with such a field, where unknown fields are to be ignored
	`failed to convert new object`,                        // an apply with a value that is none of its type
	`failed to create RequestInfo`,                        // a path that ends at "watch" or "proxy"
}, "|"))

// excused tells whether an answer of 500 and more is what upstream gives. The library of strategic merge patches has many
// ways to say that a patch does not fit; upstream's handler passes most of them on as they are, without a reason.
func excused(req *http.Request, body string) bool {
	strategic := req.Header.Get("Content-Type") == patchTypes[2] && !strings.Contains(body, `"reason"`) && strings.Contains(body, `"kind":"Status"`)
	return strategic || upstreamBlames.MatchString(body)
}

// metaOf reads the metadata of an object in an answer.
func metaOf(t testing.TB, w *httptest.ResponseRecorder) metav1.ObjectMeta {
	t.Helper()
	var o metav1.PartialObjectMetadata
	require.NoError(t, json.Unmarshal(w.Body.Bytes(), &o), "%s", w.Body)
	return o.ObjectMeta
}

// remove deletes an object, whatever holds it.
func (c *fuzzed) remove(t testing.TB, path string) {
	t.Helper()
	for range 2 {
		c.do(t, "DELETE", path, jsonType, jsonType, []byte(`{"gracePeriodSeconds":0,"propagationPolicy":"Background"}`))
		if w := c.do(t, "GET", path, jsonType, jsonType, nil); w.Code == http.StatusNotFound {
			return
		}
		w := c.do(t, "PATCH", path, "application/merge-patch+json", jsonType, []byte(`{"metadata":{"finalizers":null}}`))
		if w.Code != http.StatusOK && w.Code != http.StatusNotFound {
			t.Fatalf("cannot free %s: %d %s", path, w.Code, w.Body)
		}
	}
	if w := c.do(t, "GET", path, jsonType, jsonType, nil); w.Code != http.StatusNotFound {
		t.Fatalf("%s does not go: %d %s", path, w.Code, w.Body)
	}
}
