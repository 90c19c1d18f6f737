package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"knarr/node/image"
	"knarr/node/imageapi"
)

func newImage() *cobra.Command {
	c := &cobra.Command{Use: "image", Short: "Build, import, pull, list and remove images on all nodes of this machine", Args: cobra.ArbitraryArgs, RunE: group}
	c.AddCommand(newImageBuild(), newImageImport(), newImagePull(), newImageList(), newImageRemove())
	return c
}

// nodeImages is a living node's image store.
type nodeImages struct {
	node string
	*imageapi.Client
}

// imageNodes connects to every living node of the cluster on this machine. The caller closes them.
func (c *cluster) imageNodes() ([]nodeImages, error) {
	names, err := c.nodeNames()
	if err != nil {
		return nil, err
	}
	procs, err := c.processes()
	if err != nil {
		return nil, err
	}
	server := false
	alive := map[string]bool{}
	for _, p := range procs {
		server = server || p.Name == "server"
		alive[p.Node] = alive[p.Node] || p.Name != "shim"
	}
	var out []nodeImages
	for _, n := range names {
		if socket := AgentSocket(c.dir, n); alive[n] && exists(socket) {
			out = append(out, nodeImages{n, imageapi.NewClient(socket)})
		}
	}
	if len(out) == 0 && server {
		return nil, fmt.Errorf("no node of cluster %q takes images yet: try again when `knarr status` says that it is ready", c.name)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("cluster %q does not run: `knarr up` starts it", c.name)
	}
	return out, nil
}

// eachNode calls f for every living node and joins what failed.
func (w *where) eachNode(f func(n nodeImages) error) error {
	c, err := w.cluster()
	if err != nil {
		return usageError{err}
	}
	nodes, err := c.imageNodes()
	if err != nil {
		return err
	}
	var errs []error
	for _, n := range nodes {
		if err := f(n); err != nil {
			errs = append(errs, fmt.Errorf("node %s: %w", n.node, err))
		}
		n.Close()
	}
	return errors.Join(errs...)
}

func newImageBuild() *cobra.Command {
	var w where
	var o image.BuildOptions
	var output string
	c := &cobra.Command{
		Use:   "build -t REF PATH",
		Short: "Pack a static binary, a Go package or a root file system directory into an image",
		Long: `Pack PATH into an image of one layer and load it into every node: a static binary, a directory with a Go program
(built without cgo), or a directory that becomes the root file system. With --output it goes to a file instead, for
` + "`knarr image import`" + ` and every other program that reads OCI layouts.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.Ref == "" {
				return usageError{errors.New("the image needs a name: -t NAME:TAG")}
			}
			o.Path, o.Output = args[0], cmd.ErrOrStderr()
			p := newProgress(cmd.ErrOrStderr())
			defer p.done()
			p.now("building %s", o.Ref)
			a, err := image.Build(cmd.Context(), o)
			if err != nil {
				return err
			}
			defer a.Close()
			if output != "" {
				return writeArchive(cmd, a, output)
			}
			return w.importAll(cmd, p, a.File)
		},
	}
	w.flags(c)
	f := c.Flags()
	f.StringVarP(&o.Ref, "tag", "t", "", "name of the image")
	f.StringVarP(&output, "output", "o", "", "file to write the image to, as an OCI layout in a tar, instead of loading it")
	f.StringArrayVar(&o.Entrypoint, "entrypoint", nil, "program of its containers, one argument a flag (default: the binary)")
	f.StringArrayVar(&o.Cmd, "cmd", nil, "default arguments, one a flag")
	f.StringArrayVarP(&o.Env, "env", "e", nil, "environment, NAME=value")
	f.StringVar(&o.User, "user", "", "user of its containers")
	f.StringVar(&o.WorkingDir, "workdir", "", "working directory of its containers")
	f.StringArrayVar(&o.ExposedPorts, "expose", nil, "port that it listens on, such as 8080 or 53/udp")
	return c
}

// writeArchive leaves no half of a file behind.
func writeArchive(cmd *cobra.Command, a *image.Archive, path string) error {
	part := path + ".part"
	f, err := os.Create(part)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, a.File)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(part, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(part))
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s: %s %s\n", path, a.Ref, a.ID)
	return nil
}

// importAll loads an archive into every node, from its beginning each time.
func (w *where) importAll(cmd *cobra.Command, p *progress, archive *os.File, names ...string) error {
	return w.eachNode(func(n nodeImages) error {
		p.now("loading into node %s", n.node)
		if _, err := archive.Seek(0, io.SeekStart); err != nil {
			return err
		}
		list, err := n.Import(cmd.Context(), archive, names...)
		if err != nil {
			return err
		}
		for _, i := range list {
			fmt.Fprintf(cmd.OutOrStdout(), "%s: %s %s\n", n.node, strings.Join(i.Names, " "), i.ID)
		}
		return nil
	})
}

func newImageImport() *cobra.Command {
	var w where
	var names []string
	c := &cobra.Command{
		Use:   "import FILE",
		Short: "Load an archive (docker save or OCI layout; - is standard input) into every node",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := openArchive(args[0], cmd.InOrStdin())
			if err != nil {
				return err
			}
			defer f.Close()
			p := newProgress(cmd.ErrOrStderr())
			defer p.done()
			return w.importAll(cmd, p, f, names...)
		},
	}
	w.flags(c)
	c.Flags().StringArrayVarP(&names, "tag", "t", nil, "name in place of the archive's own")
	return c
}

// openArchive opens a file; standard input is first copied to one without a name, because each node reads it.
func openArchive(path string, stdin io.Reader) (*os.File, error) {
	if path != "-" {
		return os.Open(path)
	}
	f, err := os.CreateTemp("", "knarr-import-*")
	if err != nil {
		return nil, err
	}
	os.Remove(f.Name())
	if _, err := io.Copy(f, stdin); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func newImagePull() *cobra.Command {
	var w where
	var q imageapi.PullRequest
	c := &cobra.Command{
		Use:   "pull REF",
		Short: "Pull an image from its registry to every node",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			q.Ref = args[0]
			q.Password = os.Getenv("KNARR_REGISTRY_PASSWORD")
			p := newProgress(cmd.ErrOrStderr())
			defer p.done()
			return w.eachNode(func(n nodeImages) error {
				p.now("pulling to node %s", n.node)
				i, err := n.Pull(cmd.Context(), q, func(done, total int64) {
					p.rename("pulling to node %s: %s of %s", n.node, megabytes(done), megabytes(total))
				})
				if err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s: %s %s\n", n.node, strings.Join(i.Names, " "), i.ID)
				return nil
			})
		},
	}
	w.flags(c)
	c.Flags().StringVarP(&q.Username, "username", "u", "", "user at the registry; the password comes from KNARR_REGISTRY_PASSWORD")
	return c
}

func newImageList() *cobra.Command {
	var w where
	c := &cobra.Command{
		Use:   "ls",
		Short: "List the images of the nodes",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			rows, err := w.imageRows(cmd.Context())
			if len(rows) == 0 && err != nil {
				return err
			}
			t := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 3, ' ', 0)
			fmt.Fprintln(t, "IMAGE\tID\tSIZE\tADDED\tNODES")
			for _, r := range rows {
				fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", r.name, shortID(r.ID), megabytes(int64(r.Size)), r.Added.Format(time.DateTime), strings.Join(r.nodes, ","))
			}
			return errors.Join(t.Flush(), err)
		},
	}
	w.flags(c)
	return c
}

// imageRow is one name of an image, with the nodes that have it.
type imageRow struct {
	imageapi.Image
	name  string
	nodes []string
}

func (w *where) imageRows(ctx context.Context) ([]*imageRow, error) {
	var rows []*imageRow
	found := map[string]*imageRow{}
	err := w.eachNode(func(n nodeImages) error {
		list, err := n.List(ctx)
		for _, i := range list {
			names := i.Names
			if len(names) == 0 {
				names = []string{"<none>"}
			}
			for _, name := range names {
				r := found[name+i.ID]
				if r == nil {
					r = &imageRow{Image: i, name: name}
					found[name+i.ID] = r
					rows = append(rows, r)
				}
				r.nodes = append(r.nodes, n.node)
			}
		}
		return err
	})
	return rows, err
}

// shortID is the first twelve digits of an ID.
func shortID(id string) string {
	_, hex, _ := strings.Cut(id, ":")
	return hex[:min(12, len(hex))]
}

func newImageRemove() *cobra.Command {
	var w where
	c := &cobra.Command{
		Use:     "rm REF...",
		Aliases: []string{"remove"},
		Short:   "Remove images from every node",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return w.eachNode(func(n nodeImages) error {
				var errs []error
				for _, ref := range args {
					errs = append(errs, n.Remove(cmd.Context(), ref))
				}
				return errors.Join(errs...)
			})
		},
	}
	w.flags(c)
	return c
}
