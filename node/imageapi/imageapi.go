// Package imageapi is how the image commands reach a node's image store: HTTP over a unix socket that only root may open.
//
//	GET    /images               []Image
//	POST   /images/import?name=  the body is an archive (docker save or OCI layout); []Image
//	POST   /images/pull          PullRequest; a stream of PullProgress, one JSON object a line, the last with Image or Error
//	DELETE /images?ref=          204
//
// A failure is a status of 4xx or 5xx with its reason as text.
package imageapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"knarr/node/image"
)

// Bounds of the server.
const (
	// maxPullRequest is the largest pull request, in bytes.
	maxPullRequest = 64 << 10
	// headerTimeout is how long a caller may take to say what it wants.
	headerTimeout = 5 * time.Second
	// progressEvery is the shortest time between two progress lines.
	progressEvery = 200 * time.Millisecond
)

// Image is an image as the commands show it.
type Image struct {
	ID      string    `json:"id"`
	Names   []string  `json:"names"`
	Digests []string  `json:"digests,omitempty"`
	Size    uint64    `json:"size"` // bytes of its compressed blobs
	Pinned  bool      `json:"pinned"`
	Added   time.Time `json:"added"`
}

// PullRequest asks for an image of a registry.
type PullRequest struct {
	Ref      string `json:"ref"`
	Username string `json:"username,omitempty"`
	Password string `json:"password,omitempty"`
}

// PullProgress is one line of the answer to a pull.
type PullProgress struct {
	Done  int64  `json:"done,omitempty"`  // bytes
	Total int64  `json:"total,omitempty"` // bytes known so far
	Image *Image `json:"image,omitempty"`
	Error string `json:"error,omitempty"`
}

// Serve answers on the unix socket at path until ctx ends. A socket that a dead process left is replaced. The socket is
// readable by its owner alone.
func Serve(ctx context.Context, path string, store *image.Store) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("image socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return fmt.Errorf("image socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return fmt.Errorf("image socket: %w", err)
	}
	server := &http.Server{Handler: Handler(store), ReadHeaderTimeout: headerTimeout, BaseContext: func(net.Listener) context.Context { return ctx }}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("image socket: %w", err)
	}
	return nil
}

// Handler serves the images of store.
func Handler(store *image.Store) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /images", func(w http.ResponseWriter, r *http.Request) {
		list, err := store.List(r.Context())
		answer(w, list, err)
	})
	mux.HandleFunc("POST /images/import", func(w http.ResponseWriter, r *http.Request) {
		list, err := store.Import(r.Context(), r.Body, r.URL.Query()["name"]...)
		answer(w, list, err)
	})
	mux.HandleFunc("DELETE /images", func(w http.ResponseWriter, r *http.Request) {
		if err := store.Remove(r.Context(), r.URL.Query().Get("ref")); err != nil {
			fail(w, err)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("POST /images/pull", func(w http.ResponseWriter, r *http.Request) { pull(w, r, store) })
	return mux
}

func answer(w http.ResponseWriter, list []image.Image, err error) {
	if err != nil {
		fail(w, err)
		return
	}
	out := make([]Image, 0, len(list))
	for _, i := range list {
		out = append(out, view(i))
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(out)
}

func view(i image.Image) Image {
	return Image{ID: i.ID, Names: i.RepoTags, Digests: i.RepoDigests, Size: i.Size, Pinned: i.Pinned, Added: i.Added}
}

func fail(w http.ResponseWriter, err error) {
	status := http.StatusInternalServerError
	switch {
	case errdefs.IsNotFound(err):
		status = http.StatusNotFound
	case errdefs.IsInvalidArgument(err):
		status = http.StatusBadRequest
	case errors.Is(err, image.ErrUnauthorized):
		status = http.StatusForbidden
	}
	http.Error(w, err.Error(), status)
}

// pull streams progress; a failure after the first byte can only be the last line.
func pull(w http.ResponseWriter, r *http.Request, store *image.Store) {
	var q PullRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxPullRequest)).Decode(&q); err != nil {
		http.Error(w, "the request is no pull: "+err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	var mu sync.Mutex
	var last time.Time
	say := func(p PullProgress) {
		mu.Lock()
		defer mu.Unlock()
		json.NewEncoder(w).Encode(p)
		http.NewResponseController(w).Flush()
		last = time.Now()
	}
	i, err := store.Pull(r.Context(), q.Ref, image.Auth{Username: q.Username, Password: q.Password}, func(p image.Progress) {
		mu.Lock()
		due := time.Since(last) >= progressEvery
		mu.Unlock()
		if due {
			say(PullProgress{Done: p.Done, Total: p.Total})
		}
	})
	if err != nil {
		say(PullProgress{Error: err.Error()})
		return
	}
	v := view(i)
	say(PullProgress{Image: &v})
}
