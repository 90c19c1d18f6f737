package imageapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
)

// maxReason bounds the text of a failure, in bytes.
const maxReason = 16 << 10

// Client talks to one node's socket. Methods may be called concurrently.
type Client struct{ http http.Client }

// NewClient is for the socket at path. It connects when it is used.
func NewClient(path string) *Client {
	return &Client{http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
	}}}
}

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// List returns the node's images, sorted by name.
func (c *Client) List(ctx context.Context) ([]Image, error) {
	return c.images(ctx, http.MethodGet, "/images", nil)
}

// Import sends an archive to the node; names, where given, take the place of the archive's own.
func (c *Client) Import(ctx context.Context, archive io.Reader, names ...string) ([]Image, error) {
	return c.images(ctx, http.MethodPost, "/images/import?"+url.Values{"name": names}.Encode(), io.NopCloser(archive)) // the caller closes it
}

// Remove removes a name, or an image by its ID.
func (c *Client) Remove(ctx context.Context, ref string) error {
	body, err := c.do(ctx, http.MethodDelete, "/images?"+url.Values{"ref": {ref}}.Encode(), nil)
	if err != nil {
		return err
	}
	return body.Close()
}

// Pull makes the node pull an image; progress may be nil.
func (c *Client) Pull(ctx context.Context, q PullRequest, progress func(done, total int64)) (Image, error) {
	b, err := json.Marshal(q)
	if err != nil {
		return Image{}, err
	}
	body, err := c.do(ctx, http.MethodPost, "/images/pull", strings.NewReader(string(b)))
	if err != nil {
		return Image{}, err
	}
	defer body.Close()
	d := json.NewDecoder(body)
	for {
		var p PullProgress
		if err := d.Decode(&p); err != nil {
			return Image{}, fmt.Errorf("the node ended the pull without a result: %w", err)
		}
		switch {
		case p.Error != "":
			return Image{}, errors.New(p.Error)
		case p.Image != nil:
			return *p.Image, nil
		case progress != nil:
			progress(p.Done, p.Total)
		}
	}
}

func (c *Client) images(ctx context.Context, method, path string, body io.Reader) ([]Image, error) {
	r, err := c.do(ctx, method, path, body)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	var out []Image
	return out, json.NewDecoder(r).Decode(&out)
}

// do returns the body of a good answer; the caller closes it.
func (c *Client) do(ctx context.Context, method, path string, body io.Reader) (io.ReadCloser, error) {
	r, err := http.NewRequestWithContext(ctx, method, "http://node"+path, body)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(r)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode < 300 {
		return resp.Body, nil
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxReason))
	if err != nil {
		return nil, err
	}
	return nil, errors.New(strings.TrimSpace(string(b)))
}
