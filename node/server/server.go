// Package server is the HTTPS API of a node: what upstream's kubelet serves on
// port 10250. The API server sends logs, exec, attach and port-forward requests
// of users here.
//
// Streams are connected to the runtime in this process; there is no second
// streaming server to be redirected to.
package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apiserver/pkg/util/flushwriter"
	"k8s.io/client-go/kubernetes"
	"k8s.io/component-base/metrics/legacyregistry"
	streaming "k8s.io/cri-streaming/pkg/streaming"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	statsapi "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	"k8s.io/kubernetes/pkg/apis/core/v1/validation"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
	"k8s.io/utils/ptr"
)

const (
	// streamIdle is how long a stream may carry nothing.
	streamIdle = 4 * time.Hour
	// headerTimeout bounds the reading of request headers, idleTimeout unused
	// connections.
	headerTimeout = 32 * time.Second
	idleTimeout   = 90 * time.Second
	maxHeader     = 1 << 20 // bytes
)

// Host is what the API shows and reaches. Objects it returns are not modified.
type Host interface {
	// Pods returns the pods of the node.
	Pods() []*v1.Pod
	// PodByName finds a pod of the node.
	PodByName(namespace, name string) (*v1.Pod, bool)
	// Logs writes the log of a container, as opts says.
	Logs(ctx context.Context, pod *v1.Pod, container string, opts *v1.PodLogOptions, stdout, stderr io.Writer) error
	// ContainerID returns the id, in the runtime, of a running container.
	ContainerID(ctx context.Context, pod *v1.Pod, container string) (string, error)
	// SandboxID returns the id, in the runtime, of the pod's sandbox.
	SandboxID(ctx context.Context, pod *v1.Pod) (string, error)
	// Exec runs a command to its end and returns its output.
	Exec(ctx context.Context, containerID string, cmd []string) ([]byte, error)
	// Summary tells what node and pods use; light leaves out file systems and networks.
	Summary(ctx context.Context, light bool) (*statsapi.Summary, error)
	// Healthy returns why the node is not, if so.
	Healthy() error
}

// Options says what a Server needs. Streaming may be nil, all else is required.
type Options struct {
	NodeName  string
	Host      Host
	Streaming streaming.Runtime
	// Client reviews tokens and access.
	Client kubernetes.Interface
}

// Server answers requests. Create it with New.
type Server struct {
	opts Options
	mux  *http.ServeMux
	auth *guard
}

var _ http.Handler = (*Server)(nil)

// New returns a Server.
func New(opts Options) *Server {
	s := &Server{opts: opts, mux: http.NewServeMux(), auth: newGuard(opts.Client, opts.NodeName)}
	s.routes()
	return s
}

// HTTP returns the settings of the http.Server to serve with.
func (s *Server) HTTP(base context.Context) *http.Server {
	return &http.Server{Handler: s, ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeader,
		BaseContext: baseContext(base)}
}

func (s *Server) routes() {
	s.mux.HandleFunc("GET /healthz", s.healthz)
	s.mux.HandleFunc("GET /healthz/{check}", s.healthz)
	s.mux.HandleFunc("GET /pods", s.pods)
	s.mux.HandleFunc("GET /pods/{$}", s.pods)
	s.mux.HandleFunc("GET /runningpods/", s.pods)
	s.mux.HandleFunc("GET /stats/summary", s.summary)
	s.mux.Handle("GET /metrics", legacyregistry.Handler())
	s.mux.HandleFunc("GET /metrics/resource", s.resourceMetrics)
	s.mux.HandleFunc("GET /containerLogs/{namespace}/{pod}/{container}", s.logs)
	for _, method := range []string{"GET", "POST"} {
		for _, uid := range []string{"", "/{uid}"} {
			s.mux.HandleFunc(method+" /exec/{namespace}/{pod}"+uid+"/{container}", s.exec)
			s.mux.HandleFunc(method+" /attach/{namespace}/{pod}"+uid+"/{container}", s.attach)
			s.mux.HandleFunc(method+" /portForward/{namespace}/{pod}"+uid, s.portForward)
		}
	}
	s.mux.HandleFunc("POST /run/{namespace}/{pod}/{container}", s.run)
	s.mux.HandleFunc("POST /run/{namespace}/{pod}/{uid}/{container}", s.run)
	s.mux.HandleFunc("POST /checkpoint/", func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "checkpointing of containers is not supported by this node", http.StatusNotImplemented)
	})
}

// ServeHTTP lets in who may do what is asked, and answers.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	user, err := s.auth.authenticate(r)
	if err != nil {
		http.Error(w, "Unauthorized", http.StatusUnauthorized)
		return
	}
	if denied := s.auth.authorize(r, user); denied != nil {
		http.Error(w, denied.Error(), http.StatusForbidden)
		return
	}
	s.mux.ServeHTTP(w, r)
}

func (s *Server) healthz(w http.ResponseWriter, _ *http.Request) {
	if err := s.opts.Host.Healthy(); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	_, _ = io.WriteString(w, "ok")
}

func (s *Server) pods(w http.ResponseWriter, _ *http.Request) {
	list := v1.PodList{TypeMeta: metav1.TypeMeta{Kind: "PodList", APIVersion: "v1"}, Items: []v1.Pod{}}
	for _, p := range s.opts.Host.Pods() {
		list.Items = append(list.Items, *p)
	}
	writeJSON(w, &list)
}

func (s *Server) summary(w http.ResponseWriter, r *http.Request) {
	light := r.FormValue("only_cpu_and_memory") == "true"
	sum, err := s.opts.Host.Summary(r.Context(), light)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	writeJSON(w, sum)
}

func writeJSON(w http.ResponseWriter, obj any) {
	b, err := json.Marshal(obj)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(b)
}

// pod finds the pod that a request names.
func (s *Server) pod(w http.ResponseWriter, r *http.Request) (*v1.Pod, bool) {
	pod, ok := s.opts.Host.PodByName(r.PathValue("namespace"), r.PathValue("pod"))
	if ok && r.PathValue("uid") != "" && types.UID(r.PathValue("uid")) != pod.UID {
		ok = false
	}
	if !ok {
		http.Error(w, fmt.Sprintf("pod %q does not exist", r.PathValue("pod")), http.StatusNotFound)
	}
	return pod, ok
}

func (s *Server) logs(w http.ResponseWriter, r *http.Request) {
	opts, err := logOptions(r.URL.Query())
	if err != nil {
		http.Error(w, `{"message": "Unable to decode query."}`, http.StatusBadRequest)
		return
	}
	if errs := validation.ValidatePodLogOptions(opts); len(errs) > 0 {
		http.Error(w, `{"message": "Invalid request."}`, http.StatusUnprocessableEntity)
		return
	}
	pod, ok := s.pod(w, r)
	if !ok {
		return
	}
	container := r.PathValue("container")
	if kubecontainer.GetContainerSpec(pod, container) == nil {
		http.Error(w, fmt.Sprintf("container %q not found in pod %q", container, pod.Name), http.StatusNotFound)
		return
	}
	began := &watched{ResponseWriter: w}
	out := flushwriter.Wrap(began)
	var stdout, stderr io.Writer = out, out
	switch *opts.Stream {
	case v1.LogStreamStdout:
		stderr = nil
	case v1.LogStreamStderr:
		stdout = nil
	}
	switch err := s.opts.Host.Logs(r.Context(), pod, container, opts, stdout, stderr); {
	case err == nil || r.Context().Err() != nil:
	case began.wrote:
		_, _ = io.WriteString(w, err.Error()) // too late for a status code
	default:
		http.Error(w, err.Error(), http.StatusBadRequest)
	}
}

// watched notes whether anything was written.
type watched struct {
	http.ResponseWriter
	wrote bool
}

// Write notes and writes.
func (w *watched) Write(b []byte) (int, error) {
	w.wrote = true
	return w.ResponseWriter.Write(b)
}

// Flush sends what is written.
func (w *watched) Flush() {
	if f, ok := w.ResponseWriter.(http.Flusher); ok {
		f.Flush()
	}
}

func logOptions(query url.Values) (*v1.PodLogOptions, error) {
	if tail := query.Get("tail"); tail != "" {
		query.Set("tailLines", tail)
		if tail == "all" {
			query.Del("tailLines")
		}
	}
	opts := &v1.PodLogOptions{}
	if err := legacyscheme.ParameterCodec.DecodeParameters(query, v1.SchemeGroupVersion, opts); err != nil {
		return nil, err
	}
	if opts.Stream == nil {
		opts.Stream = ptr.To(v1.LogStreamAll)
	}
	opts.TypeMeta = metav1.TypeMeta{}
	return opts, nil
}

// target finds the running container that a request is about.
func (s *Server) target(w http.ResponseWriter, r *http.Request) (string, bool) {
	if s.opts.Streaming == nil {
		http.Error(w, "streams are not supported by this node", http.StatusNotImplemented)
		return "", false
	}
	pod, ok := s.pod(w, r)
	if !ok {
		return "", false
	}
	id, err := s.opts.Host.ContainerID(r.Context(), pod, r.PathValue("container"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return "", false
	}
	return id, true
}

func (s *Server) exec(w http.ResponseWriter, r *http.Request) {
	opts, err := remotecommand.NewOptions(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if id, ok := s.target(w, r); ok {
		remotecommand.ServeExec(w, r, streams{s.opts.Streaming}, "", "", id, r.URL.Query()["command"], opts,
			streamIdle, remotecommand.DefaultStreamCreationTimeout, remotecommand.SupportedStreamingProtocols)
	}
}

func (s *Server) attach(w http.ResponseWriter, r *http.Request) {
	opts, err := remotecommand.NewOptions(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if id, ok := s.target(w, r); ok {
		remotecommand.ServeAttach(w, r, streams{s.opts.Streaming}, "", "", id, opts,
			streamIdle, remotecommand.DefaultStreamCreationTimeout, remotecommand.SupportedStreamingProtocols)
	}
}

func (s *Server) portForward(w http.ResponseWriter, r *http.Request) {
	opts, err := portforward.NewV4Options(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if s.opts.Streaming == nil {
		http.Error(w, "streams are not supported by this node", http.StatusNotImplemented)
		return
	}
	pod, ok := s.pod(w, r)
	if !ok {
		return
	}
	id, err := s.opts.Host.SandboxID(r.Context(), pod)
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	portforward.ServePortForward(w, r, streams{s.opts.Streaming}, id, "", opts,
		streamIdle, remotecommand.DefaultStreamCreationTimeout, portforward.SupportedProtocols)
}

func (s *Server) run(w http.ResponseWriter, r *http.Request) {
	pod, ok := s.pod(w, r)
	if !ok {
		return
	}
	id, err := s.opts.Host.ContainerID(r.Context(), pod, r.PathValue("container"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	cmd := r.URL.Query()["cmd"]
	if len(cmd) == 0 {
		http.Error(w, "no command", http.StatusBadRequest)
		return
	}
	out, err := s.opts.Host.Exec(r.Context(), id, cmd)
	if err != nil {
		http.Error(w, errors.Join(err, errors.New(string(out))).Error(), http.StatusInternalServerError)
		return
	}
	_, _ = w.Write(out)
}

// streams connects CRI's streaming calls, which know ids only, to the library
// that speaks SPDY and WebSocket.
type streams struct{ rt streaming.Runtime }

func (s streams) ExecInContainer(ctx context.Context, _, _, id string, cmd []string, in io.Reader, out, err io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize, _ time.Duration) error {
	return s.rt.Exec(ctx, id, cmd, in, out, err, tty, resize)
}

func (s streams) AttachContainer(ctx context.Context, _, _, id string, in io.Reader, out, err io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	return s.rt.Attach(ctx, id, in, out, err, tty, resize)
}

func (s streams) PortForward(ctx context.Context, sandboxID, _ string, port int32, stream io.ReadWriteCloser) error {
	return s.rt.PortForward(ctx, sandboxID, port, stream)
}
