package runtime_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestMountPoints: what is mounted in every container takes no directory of the container's own, and nothing else is there that the image does not have.
func TestMountPoints(t *testing.T) {
	const account = "/var/run/secrets/kubernetes.io/serviceaccount"
	for _, c := range []struct {
		name  string
		image func(t *testing.T, base string)
		// own is what the container's layer has.
		own []string
		// absent is not seen in the container.
		absent string
	}{
		{"an image with neither", func(*testing.T, string) {}, nil, "/run"},
		{"a link at /var/run", func(t *testing.T, base string) { link(t, base, "/run") }, nil, "/run/lock"},
		{"a relative link", func(t *testing.T, base string) { link(t, base, "../run") }, nil, "/run/lock"},
		{"a link elsewhere", func(t *testing.T, base string) { link(t, base, "/etc") },
			[]string{"etc", "etc/secrets", "etc/secrets/kubernetes.io", "etc/secrets/kubernetes.io/serviceaccount"}, "/run"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			c.image(t, filepath.Join(h.images.dir, "base"))
			token := t.TempDir()
			if err := os.WriteFile(filepath.Join(token, "token"), []byte("secret"), 0o644); err != nil {
				t.Fatal(err)
			}
			p := h.pod()
			id := p.run("exec sleep 1000", func(c *runtimeapi.ContainerConfig) {
				c.Mounts = []*runtimeapi.Mount{{ContainerPath: account, HostPath: token, Readonly: true}}
			})
			if got := h.exec(id, "cat", account+"/token"); got != "secret" {
				t.Errorf("token %q", got)
			}
			if got := h.exec(id, "sh", "-c", "cat /etc/hostname; ls -d "+c.absent+" 2>/dev/null || echo absent"); got != "web\nabsent" {
				t.Errorf("inside: %q", got)
			}
			if got := inside(t, filepath.Join(h.images.dir, id, "upper")); !slices.Equal(got, c.own) {
				t.Errorf("the container's own: %v, want %v", got, c.own)
			}
			plain := p.run("exec sleep 1000")
			if got := h.exec(plain, "sh", "-c", "ls /var/run/secrets 2>/dev/null; ls /run/secrets 2>/dev/null || echo none"); got != "none" {
				t.Errorf("without a token: %q", got)
			}
		})
	}
}

func link(t *testing.T, base, to string) {
	t.Helper()
	for _, dir := range []string{"var", "run"} {
		if err := os.MkdirAll(filepath.Join(base, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if to == "/etc" {
		if err := os.Remove(filepath.Join(base, "run")); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(to, filepath.Join(base, "var", "run")); err != nil {
		t.Fatal(err)
	}
}

// inside lists what is in a directory, at all depths.
func inside(t *testing.T, dir string) (out []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if rel, _ := filepath.Rel(dir, path); rel != "." {
			out = append(out, rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}
