package image

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// registryDir is a directory with a hosts.toml for one registry.
func registryDir(t testing.TB, registry, hosts string) string {
	t.Helper()
	dir := t.TempDir()
	writeHosts(t, dir, registry, hosts)
	return dir
}

func writeHosts(t testing.TB, dir, registry, hosts string) {
	t.Helper()
	require.NoError(t, os.MkdirAll(filepath.Join(dir, registry), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(dir, registry, hostsFile), []byte(hosts), 0o644))
}

// mirror is the table of one.
func mirror(url string, more ...string) string {
	return fmt.Sprintf("[host.%q]\n%s\n", url, strings.Join(more, "\n"))
}

func TestPullMirror(t *testing.T) {
	m := newRegistry(t, false)
	img := small(t, 7)
	m.push(t, "library/app:1", img)
	m.push(t, "under/v2/library/app:1", img)
	var mu sync.Mutex
	var asked []http.Header
	m.setGuard(func(_ http.ResponseWriter, q *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		asked = append(asked, q.Header)
		return true
	})
	dead := newRegistry(t, false)
	dead.Close()
	for _, c := range []struct{ name, dir, hosts, ref string }{
		{"the second of Docker's", "docker.io", mirror(dead.URL) + mirror(m.URL), "app:1"},
		{"any registry", anyRegistry, mirror(m.URL, `capabilities = ["pull", "resolve"]`), "other.invalid/library/app:1"},
		{"with a port", "other.invalid:5000", mirror(m.URL), "other.invalid:5000/library/app:1"},
		{"with a port, in containerd's spelling", "other.invalid_5000_", mirror(m.URL), "other.invalid:5000/library/app:1"},
		{"a server of its own", "other.invalid", fmt.Sprintf("server = %q", m.URL), "other.invalid/library/app:1"},
		{"a path below the API", "other.invalid", mirror(m.URL+"/v2/", "override_path = true"), "other.invalid/library/app:1"},
		{"a path", "other.invalid", mirror(m.URL + "/v2"), "other.invalid/library/app:1"},
		{"plain, with a word of TLS", "other.invalid", mirror(m.URL, "skip_verify = true"), "other.invalid/library/app:1"},
		{"a header", "other.invalid", mirror(m.URL) + fmt.Sprintf("[host.%q.header]\nx-team = [\"a\", \"b\"]\nx-one = \"c\"\n", m.URL), "other.invalid/library/app:1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			mu.Lock()
			asked = nil
			mu.Unlock()
			s := openStore(t, Options{RegistryConfigPath: registryDir(t, c.dir, c.hosts), Resolver: deadResolver(t)})
			im, err := s.Pull(t.Context(), c.ref, Auth{Username: "u", Password: "p"}, nil)
			require.NoError(t, err)
			require.Equal(t, imageID(t, img), im.ID)
			full, err := Normalize(c.ref)
			require.NoError(t, err)
			require.Equal(t, []string{full}, im.RepoTags, "it has the registry's name, not the mirror's")
			mu.Lock()
			defer mu.Unlock()
			require.NotEmpty(t, asked)
			for _, h := range asked {
				require.Empty(t, h.Get("Authorization"), "credentials of the registry are not sent to its mirror")
				if strings.Contains(c.hosts, "x-team") {
					require.Equal(t, []string{"a", "b"}, h.Values("X-Team"))
					require.Equal(t, "c", h.Get("X-One"))
				}
			}
		})
	}
}

// What the directory says holds from the next pull on, and the registry comes after its mirrors.
func TestMirrorsAreReadAtEachPull(t *testing.T) {
	first, second, own := newRegistry(t, false), newRegistry(t, false), newRegistry(t, false)
	of := map[*testRegistry]string{}
	for i, r := range []*testRegistry{first, second, own} {
		img := small(t, uint64(20+i))
		r.push(t, "app:1", img)
		of[r] = imageID(t, img)
	}
	dir := filepath.Join(t.TempDir(), "made later")
	s := openStore(t, Options{RegistryConfigPath: dir})
	pulls := func(want *testRegistry) {
		t.Helper()
		im, err := s.Pull(t.Context(), own.host+"/app:1", Auth{}, nil)
		require.NoError(t, err)
		require.Equal(t, of[want], im.ID)
	}
	pulls(own)
	writeHosts(t, dir, own.host, mirror(first.URL)+mirror(second.URL))
	pulls(first)
	writeHosts(t, dir, own.host, mirror(second.URL)+mirror(first.URL))
	pulls(second)
	second.setGuard(func(w http.ResponseWriter, _ *http.Request) bool {
		http.Error(w, "not here", http.StatusNotFound)
		return false
	})
	pulls(first)
	writeHosts(t, dir, own.host, mirror(second.URL)+mirror(first.URL, `capabilities = ["pull"]`))
	pulls(own) // first may not say what a tag means
	require.NoError(t, os.RemoveAll(dir))
	pulls(own)
}

// A mirror that may not resolve serves what a digest names, and cannot pass off anything else for it.
func TestMirrorByDigest(t *testing.T) {
	m, own := newRegistry(t, false), newRegistry(t, false)
	img := small(t, 30)
	m.push(t, "app:1", img)
	h, err := img.Digest()
	require.NoError(t, err)
	dir := registryDir(t, own.host, mirror(m.URL, `capabilities = ["pull"]`))
	ref := own.host + "/app@" + h.String()
	raw, err := small(t, 31).RawManifest()
	require.NoError(t, err)
	m.setGuard(func(w http.ResponseWriter, q *http.Request) bool {
		if !strings.Contains(q.URL.Path, "/manifests/") {
			return true
		}
		w.Header().Set("Content-Type", "application/vnd.docker.distribution.manifest.v2+json")
		w.Header().Set("Docker-Content-Digest", h.String())
		_, _ = w.Write(raw)
		return false
	})
	s := openStore(t, Options{RegistryConfigPath: dir})
	_, err = s.Pull(t.Context(), ref, Auth{}, nil)
	require.Error(t, err)
	_, err = s.Resolve(t.Context(), ref)
	require.True(t, errdefs.IsNotFound(err))
	m.guard.Store(nil)
	im, err := s.Pull(t.Context(), ref, Auth{}, nil)
	require.NoError(t, err)
	require.Equal(t, imageID(t, img), im.ID)
}

// An imported image is no answer while a mirror answers: policy Always means what the registry has now.
func TestMirrorRulesOverImported(t *testing.T) {
	m := newRegistry(t, false)
	dir := registryDir(t, anyRegistry, mirror(m.URL))
	s := openStore(t, Options{RegistryConfigPath: dir, Resolver: deadResolver(t), ImportedWhenUnreachable: true})
	old := importNoise(t, s, "loaded.invalid/a:1", 1, 1000)
	_, err := s.Pull(t.Context(), "loaded.invalid/a:1", Auth{}, nil)
	require.True(t, errdefs.IsNotFound(err), "%v", err)
	img := small(t, 32)
	m.push(t, "a:1", img)
	im, err := s.Pull(t.Context(), "loaded.invalid/a:1", Auth{}, nil)
	require.NoError(t, err)
	require.Equal(t, imageID(t, img), im.ID)
	require.NotEqual(t, old, im.ID)
	now, err := s.Resolve(t.Context(), "loaded.invalid/a:1")
	require.NoError(t, err)
	require.Equal(t, im.ID, now.ID)
}

func TestMirrorWithCertificates(t *testing.T) {
	m := newRegistry(t, true)
	m.push(t, "app:1", small(t, 33))
	var seen atomic.Int32
	m.setGuard(func(w http.ResponseWriter, q *http.Request) bool {
		if len(q.TLS.PeerCertificates) == 0 {
			http.Error(w, "no certificate", http.StatusForbidden)
			return false
		}
		seen.Add(1)
		return true
	})
	m.TLS.ClientAuth = tls.RequestClientCert
	cert, key := selfSigned(t)
	for name, c := range map[string]struct {
		hosts string
		files map[string]string
	}{
		"one file":       {mirror(m.URL, `ca = "m.pem"`, `client = "both.pem"`), map[string]string{"m.pem": m.ca(), "both.pem": cert + key}},
		"a pair":         {mirror(m.URL, `ca = ["m.pem"]`, `client = [["c.pem", "k.pem"]]`), map[string]string{"m.pem": m.ca(), "c.pem": cert, "k.pem": key}},
		"docker's files": {"", map[string]string{"m.crt": m.ca(), "c.cert": cert, "c.key": key}},
	} {
		t.Run(name, func(t *testing.T) {
			seen.Store(0)
			dir := registryDir(t, m.host, c.hosts)
			if c.hosts == "" {
				require.NoError(t, os.Remove(filepath.Join(dir, m.host, hostsFile)))
			}
			for f, text := range c.files {
				require.NoError(t, os.WriteFile(filepath.Join(dir, m.host, f), []byte(text), 0o600))
			}
			_, err := openStore(t, Options{RegistryConfigPath: dir}).Pull(t.Context(), m.host+"/app:1", Auth{}, nil)
			require.NoError(t, err)
			require.Positive(t, seen.Load())
		})
	}
	_, err := openStore(t, Options{RegistryConfigPath: registryDir(t, m.host, "skip_verify = true")}).Pull(t.Context(), m.host+"/app:1", Auth{}, nil)
	require.ErrorIs(t, err, ErrUnauthorized)
}

func selfSigned(t *testing.T) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, k.Public(), k)
	require.NoError(t, err)
	raw, err := x509.MarshalPKCS8PrivateKey(k)
	require.NoError(t, err)
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw}))
}

// A broken file is not passed over in favour of the registry: the pod's event names it and the key.
func TestBrokenHosts(t *testing.T) {
	for _, c := range []struct{ hosts, says string }{
		{"server = ", "line 1, column "},
		{"server = 5", "server: line 1, column "},
		{`server = "ftp://m"`, `server: "ftp://m" must be http://host or https://host`},
		{mirror("https://"), `host: "https://" must be http://host or https://host`},
		{mirror("https://u:secret@m"), `"https://u:xxxxx@m" must not have a user: give [host."https://m".header] an Authorization`},
		{mirror("https://m:port"), `host: not a URL: `},
		{mirror("https://m", `skip-verify = true`), `host."https://m".skip-verify: line 2: there is no such key`},
		{mirror("https://m", `skip_verify = "yes"`), `host."https://m".skip_verify: line 2, column `},
		{mirror("https://m", `capabilities = ["pul"]`), `host."https://m".capabilities: "pul" is not one of pull, push, referrers, resolve`},
		{mirror("https://m", `ca = 5`), `host."https://m".ca: 5 is neither a text in quotes nor a list of such`},
		{mirror("https://m", `ca = "nosuch.pem"`), "nosuch.pem: no such file or directory"},
		{mirror("https://m", `ca = "hosts.toml"`), "hosts.toml has no PEM certificate"},
		{mirror("https://m", `client = ["a", ["b", "c", "d"]]`), `host."https://m".client: `},
		{mirror("https://m", `client = [["b", "c", "d"]]`), "must be a file with certificate and key, or a pair of a certificate and its key"},
		{mirror("https://m", `client = "nosuch.pem"`), "nosuch.pem: no such file or directory"},
		{mirror("https://m", `dial_timeout = "soon"`), `host."https://m".dial_timeout: "soon" is not a time such as 5s`},
		{mirror("https://m", `header = { a = 5 }`), `host."https://m".header: a: 5 is neither`},
		{`ca = "nosuch.pem"`, "ca: open "},
		{`host = { "https://m" = { skip_verify = true } }`, `host."https://m": write it as a table of its own, [host."https://m"]`},
		{"[[host]]\nuri = \"https://m\"", "host: "},
	} {
		t.Run(c.says, func(t *testing.T) {
			dir := registryDir(t, "broken.invalid", c.hosts)
			s := openStore(t, Options{RegistryConfigPath: dir, Resolver: deadResolver(t), ImportedWhenUnreachable: true})
			_, err := s.CRI().PullImage(t.Context(), &runtimeapi.ImageSpec{Image: "broken.invalid/app:1"}, nil, nil)
			require.ErrorContains(t, err, filepath.Join(dir, "broken.invalid", hostsFile)+": ")
			require.ErrorContains(t, err, c.says)
			require.NotContains(t, err.Error(), "secret")
			require.Equal(t, codes.Unknown, status.Code(err))
			require.False(t, errors.Is(err, ErrUnreachable))
		})
	}
}
