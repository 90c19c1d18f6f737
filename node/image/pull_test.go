package image

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/stretchr/testify/require"
)

// testRegistry is a real registry on the loopback with a guard in front of it.
type testRegistry struct {
	*httptest.Server
	host    string
	backend http.Handler
	guard   atomic.Pointer[func(http.ResponseWriter, *http.Request) bool] // false: the guard has answered

	mu   sync.Mutex
	hits map[string]int // "GET /v2/..." answered by the registry
}

func newRegistry(t testing.TB, secure bool) *testRegistry {
	t.Helper()
	r := &testRegistry{backend: registry.New(registry.Logger(log.New(io.Discard, "", 0))), hits: map[string]int{}}
	h := http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if g := r.guard.Load(); g != nil && !(*g)(w, q) {
			return
		}
		r.mu.Lock()
		r.hits[q.Method+" "+q.URL.Path]++
		r.mu.Unlock()
		r.backend.ServeHTTP(w, q)
	})
	r.Server = httptest.NewUnstartedServer(h)
	r.Config.ErrorLog = log.New(io.Discard, "", 0)
	if secure {
		r.StartTLS()
	} else {
		r.Start()
	}
	t.Cleanup(r.Close)
	_, r.host, _ = strings.Cut(r.URL, "://")
	return r
}

// push stores img as repo:tag in the registry, past the guard.
func (r *testRegistry) push(t testing.TB, repoTag string, img v1.Image) {
	t.Helper()
	repo, tag, _ := strings.Cut(repoTag, ":")
	layers, err := img.Layers()
	require.NoError(t, err)
	for _, l := range layers {
		h, err := l.Digest()
		require.NoError(t, err)
		rc, err := l.Compressed()
		require.NoError(t, err)
		r.put(t, http.MethodPost, "/v2/"+repo+"/blobs/uploads/?digest="+h.String(), "application/octet-stream", rc)
		require.NoError(t, rc.Close())
	}
	config, err := img.RawConfigFile()
	require.NoError(t, err)
	r.put(t, http.MethodPost, "/v2/"+repo+"/blobs/uploads/?digest="+imageID(t, img), "application/octet-stream", bytes.NewReader(config))
	r.pushManifest(t, repo, tag, img)
}

// pushManifest stores a manifest or an index, by its digest and as tag.
func (r *testRegistry) pushManifest(t testing.TB, repo, tag string, m interface {
	RawManifest() ([]byte, error)
	MediaType() (types.MediaType, error)
	Digest() (v1.Hash, error)
}) {
	t.Helper()
	raw, err := m.RawManifest()
	require.NoError(t, err)
	mt, err := m.MediaType()
	require.NoError(t, err)
	h, err := m.Digest()
	require.NoError(t, err)
	for _, ref := range []string{h.String(), tag} {
		r.put(t, http.MethodPut, "/v2/"+repo+"/manifests/"+ref, string(mt), bytes.NewReader(raw))
	}
}

func (r *testRegistry) put(t testing.TB, method, path, contentType string, body io.Reader) {
	t.Helper()
	q := httptest.NewRequest(method, path, body)
	q.Header.Set("Content-Type", contentType)
	w := httptest.NewRecorder()
	r.backend.ServeHTTP(w, q)
	require.Equal(t, http.StatusCreated, w.Code, w.Body.String())
}

func (r *testRegistry) setGuard(g func(http.ResponseWriter, *http.Request) bool) { r.guard.Store(&g) }

func (r *testRegistry) count(prefix string) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for k, v := range r.hits {
		if strings.HasPrefix(k, prefix) {
			n += v
		}
	}
	return n
}

// ca is the registry's certificate.
func (r *testRegistry) ca() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.Certificate().Raw}))
}

func small(t testing.TB, seed uint64) v1.Image {
	return imageOf(t, layerOf(t, file{"data", noise(seed, 50_000), 0o644}), layerOf(t, file{"more", noise(seed+1000, 50_000), 0o644}))
}

func TestPullHTTP(t *testing.T) {
	r := newRegistry(t, false)
	img := small(t, 1)
	r.push(t, "team/app:1", img)
	s := openStore(t, Options{})
	var last Progress
	im, err := s.Pull(t.Context(), r.host+"/team/app:1", Auth{}, func(p Progress) {
		require.LessOrEqual(t, p.Done, p.Total)
		last = p
	})
	require.NoError(t, err)
	require.Equal(t, imageID(t, img), im.ID)
	require.False(t, im.Pinned)
	require.Equal(t, []string{r.host + "/team/app:1"}, im.RepoTags)
	require.Equal(t, last.Total, last.Done)
	require.Greater(t, last.Total, int64(100_000))
	withRootfs(t, s, "c", im.ID, func(dir string) {
		require.FileExists(t, filepath.Join(dir, "data"))
		require.FileExists(t, filepath.Join(dir, "more"))
	})
	// By digest, and again: nothing is downloaded twice.
	blobs := r.count("GET /v2/team/app/blobs")
	_, err = s.Pull(t.Context(), im.RepoDigests[0], Auth{}, nil)
	require.NoError(t, err)
	_, err = s.Pull(t.Context(), r.host+"/team/app:1", Auth{}, nil)
	require.NoError(t, err)
	require.Equal(t, blobs, r.count("GET /v2/team/app/blobs"))

	s = reopen(t, s)
	_, err = s.Resolve(t.Context(), im.RepoDigests[0])
	require.NoError(t, err)
	require.NoError(t, s.Remove(t.Context(), r.host+"/team/app:1"))
	_, err = s.Resolve(t.Context(), im.ID)
	require.True(t, errdefs.IsNotFound(err), "the digest goes with the last tag")
}

func TestPullHTTPS(t *testing.T) {
	r := newRegistry(t, true)
	r.push(t, "app:1", small(t, 2))
	ref := r.host + "/app:1"
	_, err := openStore(t, Options{}).Pull(t.Context(), ref, Auth{}, nil)
	require.ErrorContains(t, err, "certificate")
	for _, c := range []string{`ca = "ca.crt"`, `skip_verify = true`, "[host.\"" + r.URL + "\"]\nca = [\"ca.crt\"]"} {
		dir := registryDir(t, r.host, c)
		require.NoError(t, os.WriteFile(filepath.Join(dir, r.host, "ca.crt"), []byte(r.ca()), 0o600))
		_, err = openStore(t, Options{RegistryConfigPath: dir}).Pull(t.Context(), ref, Auth{}, nil)
		require.NoError(t, err, c)
	}
}

func TestPullBasicAuth(t *testing.T) {
	r := newRegistry(t, false)
	r.push(t, "app:1", small(t, 3))
	r.setGuard(func(w http.ResponseWriter, q *http.Request) bool {
		if user, pass, ok := q.BasicAuth(); ok && user == "u" && pass == "p:w" {
			return true
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"no"}]}`, http.StatusUnauthorized)
		return false
	})
	ref := r.host + "/app:1"
	for _, bad := range []Auth{{}, {Username: "u", Password: "x"}, {Username: "u", Password: "p:w", ServerAddress: "elsewhere.example.com"}, {RegistryToken: "t"}} {
		s := openStore(t, Options{})
		_, err := s.Pull(t.Context(), ref, bad, nil)
		require.ErrorIs(t, err, ErrUnauthorized)
		require.ErrorContains(t, err, "unauthorized")
	}
	for _, good := range []Auth{{Username: "u", Password: "p:w"}, {Auth: "dTpwOnc="}, {Username: "u", Password: "p:w", ServerAddress: "http://" + r.host + "/v1/"}} {
		s := openStore(t, Options{})
		_, err := s.Pull(t.Context(), ref, good, nil)
		require.NoError(t, err)
	}
}

// bearerGuard lets through who has a token from a token server, which it starts.
func bearerGuard(t testing.TB, r *testRegistry) {
	t.Helper()
	tokens := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		_ = q.ParseForm()
		user, pass, _ := q.BasicAuth()
		ok := user == "u" && pass == "p" // GET
		if q.Method == http.MethodPost {
			ok = q.PostForm.Get("username") == "u" && q.PostForm.Get("password") == "p" || q.PostForm.Get("refresh_token") == "identity"
		}
		if !ok || q.Form.Get("scope") != "repository:app:pull" || q.Form.Get("service") != "test" {
			http.Error(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`, http.StatusUnauthorized)
			return
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"token": "secret", "access_token": "secret", "expires_in": 300})
	}))
	t.Cleanup(tokens.Close)
	r.setGuard(func(w http.ResponseWriter, q *http.Request) bool {
		if q.Header.Get("Authorization") == "Bearer secret" {
			return true
		}
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="test",scope="repository:app:pull"`, tokens.URL))
		http.Error(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`, http.StatusUnauthorized)
		return false
	})
}

func TestPullBearerToken(t *testing.T) {
	r := newRegistry(t, false)
	r.push(t, "app:1", small(t, 4))
	bearerGuard(t, r)
	ref := r.host + "/app:1"
	for _, bad := range []Auth{{}, {Username: "u", Password: "x"}, {IdentityToken: "stolen"}, {RegistryToken: "old"}} {
		s := openStore(t, Options{})
		_, err := s.Pull(t.Context(), ref, bad, nil)
		require.ErrorIs(t, err, ErrUnauthorized)
	}
	for _, good := range []Auth{{Username: "u", Password: "p"}, {IdentityToken: "identity"}, {RegistryToken: "secret"}} {
		s := openStore(t, Options{})
		_, err := s.Pull(t.Context(), ref, good, nil)
		require.NoError(t, err)
	}
}

func TestPullNotFound(t *testing.T) {
	r := newRegistry(t, false)
	s := openStore(t, Options{})
	_, err := s.Pull(t.Context(), r.host+"/nosuch:1", Auth{}, nil)
	require.True(t, errdefs.IsNotFound(err), "%v", err)
	full := r.host + "/nosuch:1"
	require.EqualError(t, err, fmt.Sprintf("failed to pull and unpack image %q: failed to resolve reference %q: %s: not found", full, full, full))
	_, err = s.Pull(t.Context(), "No Such", Auth{}, nil)
	require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
}

func TestPullNoConnection(t *testing.T) {
	r := newRegistry(t, false)
	r.Close()
	s := openStore(t, Options{Resolver: deadResolver(t)})
	for _, ref := range []string{r.host + "/a:1", "does-not-exist.invalid/a:1"} {
		start := time.Now()
		_, err := s.Pull(t.Context(), ref, Auth{}, nil)
		require.ErrorIs(t, err, ErrUnreachable)
		require.ErrorContains(t, err, "knarr image import")
		require.Less(t, time.Since(start), lookupTimeout)
	}
}

// deadResolver is the DNS of a machine without a network: nobody listens.
func deadResolver(t testing.TB) *net.Resolver {
	t.Helper()
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	addr := c.LocalAddr().String()
	require.NoError(t, c.Close())
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "udp", addr)
	}}
}

func TestPullImportedWhenUnreachable(t *testing.T) {
	r := newRegistry(t, false)
	s := openStore(t, Options{Resolver: deadResolver(t), ImportedWhenUnreachable: true})
	id := importNoise(t, s, "loaded.invalid/a:latest", 1, 1000)
	im, err := s.Pull(t.Context(), "loaded.invalid/a", Auth{}, nil)
	require.NoError(t, err)
	require.Equal(t, id, im.ID)
	_, err = s.Pull(t.Context(), "loaded.invalid/b", Auth{}, nil)
	require.ErrorIs(t, err, ErrUnreachable)
	importNoise(t, s, r.host+"/a:1", 1, 1000)
	_, err = s.Pull(t.Context(), r.host+"/a:1", Auth{}, nil)
	require.True(t, errdefs.IsNotFound(err), "a registry that answers rules: %v", err)
}

func TestPullBrokenBlob(t *testing.T) {
	r := newRegistry(t, false)
	img := small(t, 5)
	r.push(t, "app:1", img)
	layers, err := img.Layers()
	require.NoError(t, err)
	broken, err := layers[1].Digest()
	require.NoError(t, err)
	size, err := layers[1].Size()
	require.NoError(t, err)
	r.setGuard(func(w http.ResponseWriter, q *http.Request) bool {
		if !strings.HasSuffix(q.URL.Path, broken.String()) {
			return true
		}
		w.Header().Set("Content-Length", fmt.Sprint(size))
		_, _ = w.Write(make([]byte, size))
		return false
	})
	s := openStore(t, Options{})
	_, err = s.Pull(t.Context(), r.host+"/app:1", Auth{}, nil)
	require.ErrorContains(t, err, "unexpected commit digest")
	_, err = s.Resolve(t.Context(), r.host+"/app:1")
	require.True(t, errdefs.IsNotFound(err))
	r.guard.Store(nil)
	_, err = s.Pull(t.Context(), r.host+"/app:1", Auth{}, nil)
	require.NoError(t, err, "what was broken is not kept")
}

func TestPullResumes(t *testing.T) {
	r := newRegistry(t, false)
	img := imageOf(t, layerOf(t, file{"data", noise(6, 4<<20), 0o644}))
	r.push(t, "app:1", img)
	layers, err := img.Layers()
	require.NoError(t, err)
	h, err := layers[0].Digest()
	require.NoError(t, err)
	rc, err := layers[0].Compressed()
	require.NoError(t, err)
	data, err := io.ReadAll(rc)
	require.NoError(t, err)
	require.NoError(t, rc.Close())
	var first, up atomic.Bool
	var resumedAt atomic.Value
	r.setGuard(func(w http.ResponseWriter, q *http.Request) bool {
		if !strings.HasSuffix(q.URL.Path, h.String()) {
			return true
		}
		if first.CompareAndSwap(false, true) {
			// Half of the layer, then the connection breaks, and the registry is away for all retries of this pull.
			w.Header().Set("Content-Length", fmt.Sprint(len(data)))
			_, _ = w.Write(data[:len(data)/2])
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}
		if !up.Load() {
			panic(http.ErrAbortHandler)
		}
		resumedAt.CompareAndSwap(nil, q.Header.Get("Range"))
		http.ServeContent(w, q, "", time.Time{}, strings.NewReader(string(data)))
		return false
	})
	s := openStore(t, Options{})
	_, err = s.Pull(t.Context(), r.host+"/app:1", Auth{}, nil)
	require.Error(t, err)
	up.Store(true)
	s = reopen(t, s)
	_, err = s.Pull(t.Context(), r.host+"/app:1", Auth{}, nil)
	require.NoError(t, err)
	var from int
	_, err = fmt.Sscanf(resumedAt.Load().(string), "bytes=%d-", &from)
	require.NoError(t, err, resumedAt.Load())
	require.Greater(t, from, 1<<20, "the second pull went on where the first one stopped")
}

func TestPullMovedTag(t *testing.T) {
	r := newRegistry(t, false)
	s := openStore(t, Options{})
	ref := r.host + "/app:latest"
	one, two := small(t, 8), small(t, 9)
	for _, img := range []v1.Image{one, two} {
		r.push(t, "app:latest", img)
		im, err := s.Pull(t.Context(), ref, Auth{}, nil)
		require.NoError(t, err)
		require.Equal(t, imageID(t, img), im.ID)
	}
	old, err := s.Resolve(t.Context(), imageID(t, one))
	require.NoError(t, err, "what a running container was started from is still known")
	require.Empty(t, old.RepoTags)
	require.Len(t, old.RepoDigests, 1)
	_, err = s.GC(t.Context(), func(id string) bool { return id == imageID(t, two) }, -1)
	require.NoError(t, err)
	_, err = s.Resolve(t.Context(), imageID(t, one))
	require.True(t, errdefs.IsNotFound(err))
}

func TestPullPlatform(t *testing.T) {
	r := newRegistry(t, false)
	mine, other := small(t, 10), withArch(t, small(t, 11), "s390x")
	idx := mutate.AppendManifests(emptyIndex(),
		mutate.IndexAddendum{Add: other, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "s390x"}}},
		mutate.IndexAddendum{Add: mine, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: hostArch}}})
	r.push(t, "app:mine", mine)
	r.push(t, "app:theirs", other)
	r.pushManifest(t, "app", "1", idx)
	s := openStore(t, Options{})
	im, err := s.Pull(t.Context(), r.host+"/app:1", Auth{}, nil)
	require.NoError(t, err)
	require.Equal(t, imageID(t, mine), im.ID)
	layers, err := other.Layers()
	require.NoError(t, err)
	h, err := layers[0].Digest()
	require.NoError(t, err)
	require.Zero(t, r.count("GET /v2/app/blobs/"+h.String()), "layers of another platform are not downloaded")
	s = reopen(t, s)
	_, err = s.Resolve(t.Context(), r.host+"/app:1")
	require.NoError(t, err)

	only := mutate.AppendManifests(emptyIndex(), mutate.IndexAddendum{Add: other, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "s390x"}}})
	r.pushManifest(t, "app", "other", only)
	_, err = s.Pull(t.Context(), r.host+"/app:other", Auth{}, nil)
	require.ErrorContains(t, err, "no match for platform")
}

func TestPullsShareTheWork(t *testing.T) {
	r := newRegistry(t, false)
	img := small(t, 12)
	r.push(t, "app:1", img)
	const pulls = 10
	arrived := make(chan struct{})
	var once sync.Once
	r.setGuard(func(w http.ResponseWriter, q *http.Request) bool {
		if strings.Contains(q.URL.Path, "/blobs/") {
			<-arrived
		}
		return true
	})
	s := openStore(t, Options{})
	errs := make(chan error, pulls)
	for range pulls {
		go func() {
			_, err := s.Pull(t.Context(), r.host+"/app:1", Auth{}, nil)
			errs <- err
		}()
	}
	require.Eventually(t, func() bool {
		s.pulls.mu.Lock()
		defer s.pulls.mu.Unlock()
		for _, f := range s.pulls.flights {
			if f.callers == pulls {
				once.Do(func() { close(arrived) })
				return true
			}
		}
		return false
	}, 10*time.Second, time.Millisecond)
	for range pulls {
		require.NoError(t, <-errs)
	}
	require.Equal(t, 3, r.count("GET /v2/app/blobs"), "configuration and two layers, once each")
}

func TestPullCanceled(t *testing.T) {
	r := newRegistry(t, false)
	r.push(t, "app:1", small(t, 13))
	asked, gone := make(chan struct{}, 100), make(chan struct{})
	r.setGuard(func(w http.ResponseWriter, q *http.Request) bool {
		if !strings.Contains(q.URL.Path, "/blobs/") {
			return true
		}
		asked <- struct{}{}
		<-q.Context().Done()
		gone <- struct{}{}
		return false
	})
	s := openStore(t, Options{})
	ctx, cancel := context.WithCancel(t.Context())
	errs := make(chan error, 1)
	go func() {
		_, err := s.Pull(ctx, r.host+"/app:1", Auth{}, nil)
		errs <- err
	}()
	<-asked
	cancel()
	require.True(t, errors.Is(<-errs, context.Canceled))
	<-gone // the work ends with its last caller
}
