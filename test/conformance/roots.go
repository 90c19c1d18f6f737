package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

const (
	webRoot = "/usr/share/nginx/html"
	busybox = "/bin/busybox"
	// osRelease is a file that a test of image volumes reads for the name of the distribution which upstream's image is made of.
	osRelease = "NAME=\"static binary in place of Alpine Linux\"\n"
)

// toolPackages are the programs of Debian that tests call inside agnhost (sh, curl, nc, dig, ss, iperf, ipcs).
var toolPackages = []string{"bash", "dash", "coreutils", "grep", "sed", "mount", "procps", "curl", "netcat-openbsd", "iproute2", "iperf", "bind9-dnsutils", "bind9-host", "util-linux", "libc-bin"}

// trees says how each root file system is made, in an empty directory, in this order: later ones copy earlier ones.
var trees = []struct {
	name string
	make func(ctx context.Context, c config, dir string) error
	bare bool // there is one without Debian's packages
}{
	{"bash", func(ctx context.Context, c config, dir string) error { return c.unpack(ctx, dir, "bash-static") }, false},
	{"tools", makeTools, false},
	{"busybox", makeBusybox, true},
	{"agnhost", makeAgnhost, true},
	{"nonewprivs", makeNoNewPrivs, false},
	{"web", makeWeb, true},
	{"kitten", func(ctx context.Context, c config, dir string) error { return c.makeFleet(ctx, dir, "kitten") }, false},
	{"nautilus", func(ctx context.Context, c config, dir string) error { return c.makeFleet(ctx, dir, "nautilus") }, false},
	{"pause", func(_ context.Context, c config, dir string) error { return c.program(dir, "pause", "/pause", 0o755) }, true},
	{"sample-apiserver", func(_ context.Context, c config, dir string) error {
		return errors.Join(os.Mkdir(filepath.Join(dir, "tmp"), 0o777), c.program(dir, "sample-apiserver", "/sample-apiserver", 0o755))
	}, false},
	{"etcd", func(_ context.Context, c config, dir string) error {
		return errors.Join(os.Mkdir(filepath.Join(dir, "tmp"), 0o777), c.program(dir, "etcd", "/usr/local/bin/etcd", 0o755))
	}, false},
}

// fromDebian are the trees made of Debian's packages alone: they are kept once made.
var fromDebian = []string{"bash", "tools"}

// buildRoots makes the root file systems anew, except those that do not change with the module.
func (c config) buildRoots(ctx context.Context) error {
	for _, t := range trees {
		if c.bare && !t.bare {
			continue
		}
		dir := c.root(t.name)
		if _, err := os.Stat(dir); err == nil && slices.Contains(fromDebian, t.name) {
			continue
		}
		fresh := dir + ".new"
		if err := errors.Join(os.RemoveAll(fresh), os.MkdirAll(fresh, 0o755)); err != nil {
			return err
		}
		if err := t.make(ctx, c, fresh); err != nil {
			return fmt.Errorf("contents of image %s: %w", t.name, err)
		}
		if err := errors.Join(os.RemoveAll(dir), os.Rename(fresh, dir)); err != nil {
			return err
		}
	}
	return nil
}

// unpack puts Debian's packages and what they need into dir, as they are: none of their scripts runs.
func (c config) unpack(ctx context.Context, dir string, packages ...string) error {
	cmd := c.command(ctx, "mmdebstrap", "--quiet", "--variant=extract", "--mode=root", "--include="+strings.Join(packages, ","), "bookworm", dir)
	cmd.Dir = "/"
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("mmdebstrap: %w", err)
	}
	return nil
}

// makeBusybox is Debian's static busybox under all its names, with a sh that is bash where busybox's own shell would not hand on an environment
// variable that has a dash in its name, as upstream's does and tests want; bare runs leave those tests out.
func makeBusybox(ctx context.Context, c config, dir string) error {
	for _, d := range []string{"bin", "etc", "home", "root", "usr", "var/log", "var/run", "proc", "sys", "dev"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	tmp := filepath.Join(dir, "tmp")
	if err := errors.Join(os.Mkdir(tmp, 0o777), os.Chmod(tmp, 0o777|fs.ModeSticky), os.Symlink("bin", filepath.Join(dir, "sbin")),
		os.Symlink("../bin", filepath.Join(dir, "usr", "bin")), os.Symlink("../bin", filepath.Join(dir, "usr", "sbin")),
		copyFile(busybox, filepath.Join(dir, "bin", "busybox"), 0o755),
		addUsers(dir)); err != nil {
		return err
	}
	if c.bare {
		return linkApplets(ctx, dir, func(string) bool { return false })
	}
	return errors.Join(copyFile(filepath.Join(c.root("bash"), "bin", "bash-static"), filepath.Join(dir, "bin", "bash"), 0o755),
		c.program(dir, "sh", "/bin/sh", 0o755), linkApplets(ctx, dir, func(name string) bool { return name == "sh" }))
}

// linkApplets gives busybox in dir/bin its further names, except those that has reports.
func linkApplets(ctx context.Context, dir string, has func(string) bool) error {
	out, err := exec.CommandContext(ctx, busybox, "--list").Output()
	if err != nil {
		return fmt.Errorf("busybox --list: %w", err)
	}
	for _, name := range strings.Fields(string(out)) {
		if name == "busybox" || has(name) {
			continue
		}
		if err := os.Symlink("busybox", filepath.Join(dir, "bin", name)); err != nil {
			return err
		}
	}
	return nil
}

// addUsers writes the users that upstream's images have; the supplementary group of one is what a test asks for.
func addUsers(dir string) error {
	etc := filepath.Join(dir, "etc")
	return errors.Join(os.MkdirAll(etc, 0o755),
		os.WriteFile(filepath.Join(etc, "passwd"), []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n"+
			"user-defined-in-image:x:1000:1000::/home/user-defined-in-image:/bin/sh\n"), 0o644),
		os.WriteFile(filepath.Join(etc, "group"), []byte("root:x:0:\ntty:x:5:\nnogroup:x:65534:\nuser-defined-in-image:x:1000:\n"+
			"group-defined-in-image:x:50000:user-defined-in-image\n"), 0o644))
}

// makeTools unpacks Debian's packages, with busybox for all that they lack.
func makeTools(ctx context.Context, c config, dir string) error {
	if err := c.unpack(ctx, dir, toolPackages...); err != nil {
		return err
	}
	for _, waste := range []string{"usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/perl", "usr/lib/x86_64-linux-gnu/perl", "usr/lib/x86_64-linux-gnu/perl-base", "var/cache", "var/lib"} {
		if err := os.RemoveAll(filepath.Join(dir, waste)); err != nil {
			return err
		}
	}
	has := func(name string) bool {
		for _, d := range []string{"bin", "sbin", "usr/bin", "usr/sbin"} {
			if _, err := os.Lstat(filepath.Join(dir, d, name)); err == nil {
				return true
			}
		}
		return false
	}
	return errors.Join(os.Symlink("nc.openbsd", filepath.Join(dir, "bin", "nc")), copyFile(busybox, filepath.Join(dir, "bin", "busybox"), 0o755),
		addUsers(dir), linkApplets(ctx, dir, has))
}

// makeAgnhost is agnhost with the tools that its tests call in it; bare runs have tests that call none.
func makeAgnhost(ctx context.Context, c config, dir string) error {
	if c.bare {
		return errors.Join(c.program(dir, "agnhost", "/agnhost", 0o755), os.Mkdir(filepath.Join(dir, "tmp"), 0o777))
	}
	if err := copyTree(c.root("tools"), dir); err != nil {
		return err
	}
	from, err := c.upstream(ctx, "test/images/agnhost/porter")
	if err != nil {
		return err
	}
	return errors.Join(c.program(dir, "agnhost", "/agnhost", 0o755), os.Symlink("agnhost", filepath.Join(dir, "agnhost-2")),
		os.Mkdir(filepath.Join(dir, "uploads"), 0o755), os.MkdirAll(filepath.Join(dir, "usr/local/bin"), 0o755),
		os.Symlink("/usr/bin/iperf", filepath.Join(dir, "usr/local/bin/iperf")),
		copyFile(filepath.Join(from, "localhost.crt"), filepath.Join(dir, "localhost.crt"), 0o644),
		copyFile(filepath.Join(from, "localhost.key"), filepath.Join(dir, "localhost.key"), 0o644))
}

// makeNoNewPrivs is busybox with a setuid program that says which user it runs as.
func makeNoNewPrivs(_ context.Context, c config, dir string) error {
	if err := copyTree(c.root("busybox"), dir); err != nil {
		return err
	}
	return c.program(dir, "nnp", "/usr/local/bin/nnp", 0o755|fs.ModeSetuid|fs.ModeSetgid)
}

func makeWeb(_ context.Context, c config, dir string) error {
	html := filepath.Join(dir, webRoot)
	return errors.Join(copyTree(c.root("busybox"), dir), os.MkdirAll(html, 0o755),
		os.WriteFile(filepath.Join(html, "index.html"), []byte("<title>Welcome to nginx!</title>\n"), 0o644))
}

// makeFleet is agnhost with the picture that the demo of kubectl's tests shows.
func (c config) makeFleet(ctx context.Context, dir, name string) error {
	html, err := c.upstream(ctx, "test/images/"+name+"/html")
	if err != nil {
		return err
	}
	etc := filepath.Join(dir, "etc")
	return errors.Join(c.program(dir, "agnhost", "/agnhost", 0o755), os.Mkdir(etc, 0o755),
		os.WriteFile(filepath.Join(etc, "os-release"), []byte(osRelease), 0o644),
		copyFile(filepath.Join(html, name+".jpg"), filepath.Join(dir, name+".jpg"), 0o644),
		copyFile(filepath.Join(html, "data.json"), filepath.Join(dir, "data.json"), 0o644))
}

// upstream is the directory rel of the module of Kubernetes.
func (c config) upstream(ctx context.Context, rel string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "k8s.io/kubernetes")
	cmd.Dir = filepath.Join(c.top, "test", "conformance")
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("go list -m k8s.io/kubernetes: %w", err)
	}
	return filepath.Join(strings.TrimSpace(string(out)), rel), nil
}

// program puts what buildPrograms made into a root file system.
func (c config) program(dir, name, at string, mode fs.FileMode) error {
	to := filepath.Join(dir, at)
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	return copyFile(c.bin(name), to, mode)
}
