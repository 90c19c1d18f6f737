package test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/stretchr/testify/require"

	"knarr/internal/rig"
	"knarr/internal/rig/machine"
)

// busyboxImage is an image of the static busybox alone, made without knarr.
func busyboxImage(t *testing.T) v1.Image {
	t.Helper()
	program, err := os.ReadFile("/bin/busybox")
	require.NoError(t, err)
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	require.NoError(t, w.WriteHeader(&tar.Header{Name: "bin/busybox", Mode: 0o755, Size: int64(len(program))}))
	_, err = w.Write(program)
	require.NoError(t, err)
	require.NoError(t, w.WriteHeader(&tar.Header{Name: "bin/sleep", Typeflag: tar.TypeSymlink, Linkname: "busybox"}))
	require.NoError(t, w.Close())
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	require.NoError(t, err)
	image, err := mutate.AppendLayers(empty.Image, layer)
	require.NoError(t, err)
	file, err := image.ConfigFile()
	require.NoError(t, err)
	file = file.DeepCopy()
	file.OS, file.Architecture = "linux", "amd64"
	file.Config.Cmd = []string{"/bin/sleep", "3600"}
	file.Config.Env = []string{"UNIQUE=" + t.Name()} // who pulled an image with a password may use it, others not: images of tests must differ
	image, err = mutate.ConfigFile(image, file)
	require.NoError(t, err)
	return image
}

// push puts an image into a registry, as tag 1 of the repository at path.
func push(t *testing.T, registry http.Handler, path string, image v1.Image) {
	t.Helper()
	send := func(method, url, kind string, body []byte) {
		r := httptest.NewRequest(method, url, bytes.NewReader(body))
		r.Header.Set("Content-Type", kind)
		w := httptest.NewRecorder()
		registry.ServeHTTP(w, r)
		require.Equal(t, http.StatusCreated, w.Code, "%s %s: %s", method, url, w.Body)
	}
	layers, err := image.Layers()
	require.NoError(t, err)
	for _, l := range layers {
		r, err := l.Compressed()
		require.NoError(t, err)
		b, err := io.ReadAll(r)
		require.NoError(t, err)
		digest, err := l.Digest()
		require.NoError(t, err)
		send(http.MethodPost, path+"/blobs/uploads/?digest="+digest.String(), "application/octet-stream", b)
	}
	config, err := image.RawConfigFile()
	require.NoError(t, err)
	digest, err := image.ConfigName()
	require.NoError(t, err)
	send(http.MethodPost, path+"/blobs/uploads/?digest="+digest.String(), "application/octet-stream", config)
	manifest, err := image.RawManifest()
	require.NoError(t, err)
	kind, err := image.MediaType()
	require.NoError(t, err)
	send(http.MethodPut, path+"/manifests/1", string(kind), manifest)
}

// TestPullFromRegistry: a pod's image comes from a registry that wants a password, which is in the pod's pull secret;
// without the secret the pod says why it does not start.
func TestPullFromRegistry(t *testing.T) {
	c := theCluster(t)
	ns := namespace(t, c)
	store := registry.New()
	var refused atomic.Int32
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	s := &httptest.Server{Listener: l, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != "jane" || password != "secret" {
			refused.Add(1)
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		store.ServeHTTP(w, r)
	})}}
	s.Start()
	defer s.Close()
	host := l.Addr().String()
	push(t, store, "/v2/tools/busybox", busyboxImage(t))
	ref := host + "/tools/busybox:1"

	must(t, c, "create", "secret", "docker-registry", "pull", "-n", ns, "--docker-server="+host, "--docker-username=jane", "--docker-password=secret")
	run := func(pod, secret string) {
		must(t, c, "run", pod, "-n", ns, "--image="+ref,
			fmt.Sprintf(`--overrides={"spec":{"nodeName":"%s-0","terminationGracePeriodSeconds":0%s}}`, c.Name, secret))
	}
	run("without", "")
	eventually(t, settle, "the pod says why", func() (bool, string) {
		out := must(t, c, "describe", "pod", "without", "-n", ns)
		return strings.Contains(strings.ToLower(out), "unauthorized"), out
	})
	require.Positive(t, refused.Load())
	run("with", `,"imagePullSecrets":[{"name":"pull"}]`)
	must(t, c, "wait", "pod/with", "-n", ns, "--for=condition=Ready", "--timeout=60s")
}

// TestImageImport: an archive is loaded into all nodes, shown, used and removed.
func TestImageImport(t *testing.T) {
	c := theCluster(t)
	ns := namespace(t, c)
	tag, err := name.NewTag("imported:" + machine.Random())
	require.NoError(t, err)
	archive := filepath.Join(t.TempDir(), "image.tar")
	require.NoError(t, tarball.WriteToFile(archive, tag, busyboxImage(t)))
	_, err = c.Run(t.Context(), "image import", archive)
	require.NoError(t, err)
	list, err := c.Run(t.Context(), "image ls")
	require.NoError(t, err)
	require.Regexp(t, tag.TagStr()+`.*`+c.Name+"-0,"+c.Name+"-1", list)
	for i := range nodes {
		must(t, c, "run", fmt.Sprintf("i%d", i), "-n", ns, "--image="+tag.RepositoryStr()[len("library/"):]+":"+tag.TagStr(), "--image-pull-policy=Never",
			fmt.Sprintf(`--overrides={"spec":{"nodeName":"%s-%d","terminationGracePeriodSeconds":0}}`, c.Name, i))
	}
	mustBeReady(t, c, ns)
	_, err = c.Run(t.Context(), "image rm", tag.Name())
	require.NoError(t, err)
	list, err = c.Run(t.Context(), "image ls")
	require.NoError(t, err)
	require.NotContains(t, list, tag.TagStr())
	built := filepath.Join(t.TempDir(), "built.tar")
	_, err = c.Run(t.Context(), "image build", "-t", tag.Name(), "-o", built, "../examples/pi")
	require.NoError(t, err)
	_, err = c.Run(t.Context(), "image import", built)
	require.NoError(t, err)
	list, err = c.Run(t.Context(), "image ls")
	require.NoError(t, err)
	require.Contains(t, list, tag.TagStr())
	_, err = c.Run(t.Context(), "image import", "/dev/null")
	require.ErrorContains(t, err, "archive")
}

// mirrorsOf is the directory that names the mirrors of a cluster's registries; TestMirrors makes and removes it.
func mirrorsOf(c *rig.Cluster) string { return filepath.Join(os.TempDir(), c.Name+"-certs.d") }

// TestMirrors: pods of all nodes get an image of a registry that does not exist from its mirror, which a running cluster is told of; a file
// that is wrong is named in the pod's event.
func TestMirrors(t *testing.T) {
	c := theCluster(t)
	ns := namespace(t, c)
	store := registry.New()
	var asked atomic.Int32
	l, err := net.Listen("tcp", net.JoinHostPort(machine.IP, "0"))
	require.NoError(t, err)
	s := &httptest.Server{Listener: l, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		store.ServeHTTP(w, r)
	})}}
	s.Start()
	defer s.Close()
	push(t, store, "/v2/tools/busybox", busyboxImage(t))
	dir := filepath.Join(mirrorsOf(c), "registry.invalid")
	require.NoError(t, os.MkdirAll(dir, 0o755))
	defer os.RemoveAll(mirrorsOf(c))
	hosts := func(text string) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(text), 0o644))
	}
	run := func(pod string, node int) {
		must(t, c, "run", pod, "-n", ns, "--image=registry.invalid/tools/busybox:1", "--image-pull-policy=Always",
			fmt.Sprintf(`--overrides={"spec":{"nodeName":"%s-%d","terminationGracePeriodSeconds":0}}`, c.Name, node))
	}
	hosts(fmt.Sprintf("server = %q", s.URL))
	for i := range nodes {
		run(fmt.Sprintf("p%d", i), i)
	}
	mustBeReady(t, c, ns)
	before := asked.Load()
	run("again", 0)
	mustBeReady(t, c, ns)
	require.Greater(t, asked.Load(), before, "policy Always asks again for an image that is there")

	hosts("servr = 5")
	run("broken", 1)
	eventually(t, settle, "the event names file and key", func() (bool, string) {
		out := must(t, c, "describe", "pod", "broken", "-n", ns)
		return strings.Contains(out, filepath.Join(dir, "hosts.toml")+": servr: line 1: there is no such key"), out
	})
}
