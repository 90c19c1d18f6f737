package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

const (
	// nodeLinks begins the names of the links from the machine to nodes in network namespaces of their own.
	nodeLinks = "knode"
	// headerTimeout bounds how long a client of the mirror takes for the head of a request.
	headerTimeout = 10 * time.Second
	// maxManifest bounds what is kept in memory of one file of an archive, in bytes.
	maxManifest = 1 << 20
)

// mirror is a registry in this process, which has all images. What it was asked is in its log.
type mirror struct {
	server *http.Server
	served chan error
	log    *os.File
	dir    string
}

// registries is the directory in which the nodes read of the mirror.
func (c config) registries() string { return filepath.Join(c.out, "certs.d") }

// mirror starts a registry that all nodes of the machine reach, fills it, and names it to the nodes as the mirror of every registry in the
// suite's table. The cluster runs already: its links are what the nodes reach the machine by.
func (c config) mirror(ctx context.Context) (_ *mirror, err error) {
	m := &mirror{dir: filepath.Join(c.out, "registry"), served: make(chan error, 1)}
	if err := errors.Join(os.RemoveAll(m.dir), os.MkdirAll(m.dir, 0o755)); err != nil {
		return nil, err
	}
	host, err := machineAddress()
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		return nil, err
	}
	if m.log, err = os.Create(filepath.Join(c.out, "registry.log")); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	h := registry.New(registry.WithBlobHandler(registry.NewDiskBlobHandler(m.dir)), registry.Logger(log.New(m.log, "", log.LstdFlags)))
	m.server = &http.Server{Handler: h, ReadHeaderTimeout: headerTimeout}
	go func() { m.served <- m.server.Serve(l) }()
	for _, p := range c.pictures {
		if err := c.publish(ctx, p, l.Addr().String()); err != nil {
			return nil, errors.Join(fmt.Errorf("filling the mirror with %s: %w", p.names()[0], err), m.close())
		}
	}
	return m, nil
}

func (m *mirror) close() error {
	err := m.server.Close()
	if end := <-m.served; !errors.Is(end, http.ErrServerClosed) {
		err = errors.Join(err, end)
	}
	return errors.Join(err, m.log.Close(), os.RemoveAll(m.dir))
}

// machineAddress is the machine's side of the link to a node; the loopback where the machine itself is the only node.
func machineAddress() (string, error) {
	links, err := net.Interfaces()
	if err != nil {
		return "", err
	}
	for _, l := range links {
		if !strings.HasPrefix(l.Name, nodeLinks) {
			continue
		}
		addrs, err := l.Addrs()
		if err != nil {
			return "", err
		}
		for _, a := range addrs {
			if ip, ok := a.(*net.IPNet); ok && ip.IP.To4() != nil {
				return ip.IP.String(), nil
			}
		}
	}
	return "127.0.0.1", nil
}

// publish pushes an image to the mirror at addr under all of its names, and tells the nodes that it is there.
func (c config) publish(ctx context.Context, p picture, addr string) error {
	for _, n := range p.names() {
		tag, err := name.NewTag(n)
		if err != nil {
			return err
		}
		if err := push(ctx, c.archive(p), "http://"+addr+"/v2/"+tag.RepositoryStr(), tag.TagStr()); err != nil {
			return err
		}
		dir := filepath.Join(c.registries(), strings.Replace(tag.RegistryStr(), name.DefaultRegistry, "docker.io", 1))
		hosts := fmt.Sprintf("# The mirror of the conformance kit; it runs while the kit does.\nserver = \"http://%s\"\n", addr)
		if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(hosts), 0o644)); err != nil {
			return err
		}
	}
	return nil
}

// push sends an archive (an OCI layout of one image, whose index comes last) to a registry's repository.
func push(ctx context.Context, archive, repository, tag string) error {
	f, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	small := map[string][]byte{} // the manifest is among them
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err == io.EOF {
			return fmt.Errorf("%s has no index", archive)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", archive, err)
		}
		var body io.Reader = r
		if h.Size <= maxManifest {
			if small[h.Name], err = io.ReadAll(r); err != nil {
				return fmt.Errorf("%s: %w", archive, err)
			}
			body = bytes.NewReader(small[h.Name])
		}
		if hex, ok := strings.CutPrefix(h.Name, "blobs/sha256/"); ok {
			if err := send(ctx, http.MethodPost, repository+"/blobs/uploads/?digest=sha256:"+hex, "application/octet-stream", body); err != nil {
				return err
			}
		}
		if h.Name == "index.json" {
			index, err := v1.ParseIndexManifest(body)
			if err != nil || len(index.Manifests) != 1 {
				return fmt.Errorf("%s: its index does not name one image: %w", archive, err)
			}
			m := index.Manifests[0]
			return send(ctx, http.MethodPut, repository+"/manifests/"+tag, string(m.MediaType), bytes.NewReader(small["blobs/sha256/"+m.Digest.Hex]))
		}
	}
}

// send makes one request, which must create something.
func send(ctx context.Context, method, url, kind string, body io.Reader) error {
	r, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", kind)
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	said, err := io.ReadAll(io.LimitReader(answer.Body, maxManifest))
	if answer.StatusCode != http.StatusCreated {
		return errors.Join(fmt.Errorf("%s %s: %s: %s", method, url, answer.Status, said), err)
	}
	return err
}
