package main

import (
	"context"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"

	imageutils "k8s.io/kubernetes/test/utils/image"
)

// picture is an image that tests start: names, and what is in it.
type picture struct {
	ids []imageutils.ImageID
	// root is the directory of roots that becomes the file system, see buildRoots.
	root       string
	entrypoint []string
	cmd        []string
	user       string
	expose     []string
	// pulled images are in the mirror alone: nodes get them from there, as pods of policy IfNotPresent do it everywhere else.
	pulled bool
}

// pictures are all images of the conformance tests. Their names and versions come from the suite's own table.
// In place of nginx stands busybox's web server: tests only want something that runs and answers on port 80.
var pictures = []picture{
	{ids: []imageutils.ImageID{imageutils.Agnhost, imageutils.AgnhostPrev}, root: "agnhost",
		entrypoint: []string{"/agnhost"}, cmd: []string{"pause"}, expose: []string{"80", "8080", "8081", "9376", "5000"}},
	{ids: []imageutils.ImageID{imageutils.GlibcDnsTesting, imageutils.IpcUtils}, root: "tools", cmd: []string{"sh"}},
	{ids: []imageutils.ImageID{imageutils.BusyBox}, root: "busybox", cmd: []string{"sh"}},
	{ids: []imageutils.ImageID{imageutils.NonRoot}, root: "busybox", cmd: []string{"sh"}, user: "1234"},
	{ids: []imageutils.ImageID{imageutils.Nonewprivs}, root: "nonewprivs", cmd: []string{"nnp"}},
	{ids: []imageutils.ImageID{imageutils.Nginx, imageutils.NginxNew}, root: "web",
		cmd: []string{"httpd", "-f", "-p", "80", "-h", webRoot}, expose: []string{"80"}, pulled: true},
	{ids: []imageutils.ImageID{imageutils.Kitten}, root: "kitten", entrypoint: []string{"/agnhost"}, cmd: []string{"test-webserver"}, expose: []string{"80"}, pulled: true},
	{ids: []imageutils.ImageID{imageutils.Nautilus}, root: "nautilus", entrypoint: []string{"/agnhost"}, cmd: []string{"test-webserver"}, expose: []string{"80"}, pulled: true},
	{ids: []imageutils.ImageID{imageutils.Pause}, root: "pause", entrypoint: []string{"/pause"}},
	{ids: []imageutils.ImageID{imageutils.APIServer}, root: "sample-apiserver", entrypoint: []string{"/sample-apiserver"}},
	{ids: []imageutils.ImageID{imageutils.Etcd}, root: "etcd"},
}

// names are the image's names in the suite's own table.
func (p picture) names() []string {
	var out []string
	for _, id := range p.ids {
		out = append(out, imageutils.GetE2EImage(id))
	}
	return out
}

// archive is the file that pack makes of p.
func (c config) archive(p picture) string {
	base, _, _ := strings.Cut(path.Base(p.names()[0]), ":")
	return filepath.Join(c.out, "images", base+".tar")
}

// pack makes an archive of every image, once.
func (c config) pack(ctx context.Context) error {
	if err := os.MkdirAll(filepath.Join(c.out, "images"), 0o755); err != nil {
		return err
	}
	for _, p := range c.pictures {
		args := []string{"image", "build", "-t", p.names()[0], "-o", c.archive(p), "--user", p.user}
		for flag, values := range map[string][]string{"--entrypoint": p.entrypoint, "--cmd": p.cmd, "--expose": p.expose} {
			for _, v := range values {
				args = append(args, flag, v)
			}
		}
		if err := c.command(ctx, c.knarr, append(args, c.root(p.root))...).Run(); err != nil {
			return fmt.Errorf("packing %s: %w", p.names()[0], err)
		}
	}
	return nil
}

// load puts the images that are not pulled into every node of the kit's cluster, under all of their names.
func (c config) load(ctx context.Context) error {
	for _, p := range c.pictures {
		if p.pulled {
			continue
		}
		args := append([]string{"image", "import"}, c.where()...)
		for _, n := range p.names() {
			args = append(args, "-t", n)
		}
		if err := c.command(ctx, c.knarr, append(args, c.archive(p))...).Run(); err != nil {
			return fmt.Errorf("loading %s: %w", p.names()[0], err)
		}
	}
	return nil
}

func (c config) root(name string) string { return filepath.Join(c.out, "roots", name) }
