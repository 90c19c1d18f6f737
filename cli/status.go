package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/component-base/version"

	"knarr/system/pki"
)

// statusTimeout bounds how long `status` waits for an API that does not answer.
const statusTimeout = 3 * time.Second

// status is the answer of `knarr status -o json`; the fields are a contract.
type status struct {
	Name  string `json:"name"`
	Dir   string `json:"dir"`
	Ready bool   `json:"ready"`
	// Nodes is how many nodes the cluster has in its API.
	Nodes        int               `json:"nodes"`
	Processes    []process         `json:"processes"`
	NodeStatus   []nodeStatus      `json:"nodeStatus"`
	Pods         int               `json:"pods"`
	Versions     map[string]string `json:"versions"`
	Certificates []pki.Certificate `json:"certificates"`
	Problems     []string          `json:"problems,omitempty"`
}

type nodeStatus struct {
	Name    string `json:"name"`
	Ready   bool   `json:"ready"`
	Version string `json:"version"`
	Address string `json:"address"`
	Reason  string `json:"reason,omitempty"`
}

func newStatus() *cobra.Command {
	var w where
	var output string
	c := &cobra.Command{
		Use:   "status",
		Short: "Show the cluster's parts, their memory, versions and certificates",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "" && output != "json" {
				return usageError{fmt.Errorf("-o %q: only json is known", output)}
			}
			c, err := w.cluster()
			if err != nil {
				return usageError{err}
			}
			s, err := c.status(cmd.Context())
			if err != nil {
				return err
			}
			if output == "json" {
				e := json.NewEncoder(cmd.OutOrStdout())
				e.SetIndent("", "  ")
				return e.Encode(s)
			}
			if err := s.print(cmd.OutOrStdout()); err != nil {
				return err
			}
			if !s.Ready {
				return exitStatus(1)
			}
			return nil
		},
	}
	w.flags(c)
	c.Flags().StringVarP(&output, "output", "o", "", "json: for scripts")
	return c
}

// status looks at the cluster. A cluster that does not exist or does not run has a status too; an error means that we may
// not look.
func (c *cluster) status(ctx context.Context) (*status, error) {
	s := &status{Name: c.name, Dir: c.dir, Processes: []process{}, NodeStatus: []nodeStatus{}, Certificates: []pki.Certificate{},
		Versions: map[string]string{"knarr": version.Get().GitVersion}}
	r, err := c.load()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		s.Problems = []string{c.errNone().Error()}
		return s, nil
	case err != nil:
		return nil, err
	}
	procs, err := c.processes()
	if err != nil {
		return nil, err
	}
	for i := range procs {
		procs[i].measure()
	}
	s.Processes = append(s.Processes, procs...)
	if certs, err := c.certificates(); err == nil {
		s.Certificates = append(s.Certificates, certs...)
	}
	s.missing(c.name, r.Nodes)
	s.ask(ctx, c, r.Nodes)
	s.Ready = len(s.Problems) == 0
	return s, nil
}

// missing names the processes that ought to live.
func (s *status) missing(cluster string, nodes int) {
	alive := map[string]bool{}
	for _, p := range s.Processes {
		alive[p.Name+" "+p.Node] = true
	}
	if !alive["server "+NodeName(cluster, 0)] {
		s.Problems = append(s.Problems, "the server does not run")
	}
	for i := 1; i < nodes; i++ {
		if n := NodeName(cluster, i); !alive["agent "+n] {
			s.Problems = append(s.Problems, "the agent of node "+n+" does not run")
		}
	}
}

// ask fills in what the API knows.
func (s *status) ask(ctx context.Context, c *cluster, want int) {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	client, err := c.client()
	if err != nil {
		s.Problems = append(s.Problems, err.Error())
		return
	}
	v, err := client.Discovery().ServerVersion()
	if err != nil {
		s.Problems = append(s.Problems, "the API does not answer: "+err.Error())
		return
	}
	s.Versions["kubernetes"] = v.GitVersion
	nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		s.Problems = append(s.Problems, "the API does not answer: "+err.Error())
		return
	}
	ready := 0
	for i := range nodes.Items {
		n := nodeStatusOf(&nodes.Items[i])
		s.NodeStatus = append(s.NodeStatus, n)
		if n.Ready {
			ready++
		} else {
			s.Problems = append(s.Problems, "node "+n.Name+" is not Ready: "+n.Reason)
		}
	}
	s.Nodes = len(nodes.Items)
	if s.Nodes < want {
		s.Problems = append(s.Problems, fmt.Sprintf("%d of %d nodes have registered", s.Nodes, want))
	}
	if pods, err := client.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "status.phase=Running"}); err == nil {
		s.Pods = len(pods.Items)
	}
}

func nodeStatusOf(n *corev1.Node) nodeStatus {
	s := nodeStatus{Name: n.Name, Version: n.Status.NodeInfo.KubeletVersion, Reason: "it has not said anything yet"}
	for _, a := range n.Status.Addresses {
		if a.Type == corev1.NodeInternalIP && s.Address == "" {
			s.Address = a.Address
		}
	}
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			s.Ready = c.Status == corev1.ConditionTrue
			s.Reason = c.Message
		}
	}
	if s.Ready {
		s.Reason = ""
	}
	return s
}

// client is an API client with the admin's rights.
func (c *cluster) client() (kubernetes.Interface, error) {
	config, err := clientcmd.BuildConfigFromFlags("", AdminKubeconfig(c.dir))
	if err != nil {
		return nil, fmt.Errorf("admin kubeconfig: %w", err)
	}
	config.Timeout = 0 // watches last
	return kubernetes.NewForConfig(config)
}

// print writes the status on one screen.
func (s *status) print(out io.Writer) error {
	state := "ready"
	if !s.Ready {
		state = "NOT READY"
	}
	fmt.Fprintf(out, "cluster %s: %s, %d nodes, %d pods running, Kubernetes %s\n", s.Name, state, s.Nodes, s.Pods, s.Versions["kubernetes"])
	fmt.Fprintf(out, "data     %s\n", s.Dir)
	for _, p := range s.Problems {
		fmt.Fprintf(out, "problem  %s\n", strings.TrimSpace(p))
	}
	t := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	if len(s.Processes) > 0 {
		fmt.Fprintln(t, "\nPART\tNODE\tPID\tMEMORY (PSS)\tANONYMOUS")
		var pss, anon int64
		for _, p := range s.Processes {
			fmt.Fprintf(t, "%s\t%s\t%d\t%s\t%s\n", p.Name, p.Node, p.PID, megabytes(p.ProportionalBytes), megabytes(p.AnonymousBytes))
			pss, anon = pss+p.ProportionalBytes, anon+p.AnonymousBytes
		}
		fmt.Fprintf(t, "all\t\t\t%s\t%s\n", megabytes(pss), megabytes(anon))
	}
	if len(s.NodeStatus) > 0 {
		fmt.Fprintln(t, "\nNODE\tREADY\tADDRESS\tVERSION")
		for _, n := range s.NodeStatus {
			fmt.Fprintf(t, "%s\t%t\t%s\t%s\n", n.Name, n.Ready, n.Address, n.Version)
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if len(s.Certificates) > 0 {
		first := s.Certificates[0]
		fmt.Fprintf(out, "\ncertificates: %d, the first to end on %s (%s)\n", len(s.Certificates), first.NotAfter.Format(time.DateOnly), first.Subject)
	}
	if s.Ready {
		fmt.Fprintf(out, "kubeconfig:   %s\n", AdminKubeconfig(s.Dir))
	}
	return nil
}

// exists says whether path is there at all.
func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
