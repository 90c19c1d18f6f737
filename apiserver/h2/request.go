package h2

import (
	"context"
	"errors"
	"net/http"
	"net/textproto"
	"net/url"
	"strconv"
	"strings"

	"golang.org/x/net/http/httpguts"
	"golang.org/x/net/http2/hpack"
)

// errMalformed is a request that RFC 9113, section 8.1.1, tells to answer by resetting its stream.
var errMalformed = errors.New("malformed request")

// pseudo are a request's pseudo-header fields.
type pseudo struct {
	method, path, scheme, authority string
	given                           uint8 // bits: which there were
}

// set takes one of them; false where there is none of this name for requests, or it was there before: RFC 9113, section 8.3.
func (p *pseudo) set(f hpack.HeaderField) bool {
	var to *string
	var bit uint8
	switch f.Name {
	case ":method":
		to, bit = &p.method, 1
	case ":path":
		to, bit = &p.path, 2
	case ":scheme":
		to, bit = &p.scheme, 4
	case ":authority":
		to, bit = &p.authority, 8
	default:
		return false
	}
	if p.given&bit != 0 {
		return false
	}
	p.given |= bit
	*to = f.Value
	return true
}

// check refuses what no request can look like.
func (p *pseudo) check() error {
	if p.method == http.MethodConnect {
		if p.path != "" || p.scheme != "" || p.authority == "" {
			return errMalformed
		}
		return nil
	}
	if p.method == "" || p.path == "" || p.scheme != "https" && p.scheme != "http" {
		return errMalformed
	}
	return nil
}

// newRequest makes what a handler gets, without body. A connection-specific field or a bad path is an error that deserves
// an answer: 400.
func newRequest(ctx context.Context, p pseudo, fields []hpack.HeaderField) (req *http.Request, declared int64, err error) {
	h, trailer, err := headerOf(fields)
	if err != nil {
		return nil, 0, err
	}
	var empty http.Request // stays on the stack
	req = empty.WithContext(ctx)
	req.Method, req.Proto, req.ProtoMajor, req.Header, req.Trailer = p.method, "HTTP/2.0", 2, h, trailer
	req.Host, req.RequestURI = p.authority, p.path
	if req.Host == "" {
		req.Host = h.Get("Host")
	}
	delete(h, "Host")
	if !httpguts.ValidHostHeader(req.Host) {
		return nil, 0, errors.New("bad :authority")
	}
	if p.method == http.MethodConnect {
		req.URL, req.RequestURI = &url.URL{Host: p.authority}, p.authority
	} else if req.URL, err = url.ParseRequestURI(p.path); err != nil {
		return nil, 0, err
	}
	declared, err = contentLength(h)
	return req, declared, err
}

// headerOf collects the regular fields.
func headerOf(fields []hpack.HeaderField) (h, trailer http.Header, err error) {
	h = make(http.Header, len(fields))
	values := make([]string, len(fields)) // one allocation for the values of all
	for i, f := range fields {
		name := canonicalName(f.Name)
		switch name {
		case "Connection", "Proxy-Connection", "Transfer-Encoding", "Upgrade", "Keep-Alive":
			return nil, nil, errors.New("connection-specific header field " + f.Name)
		case "Te":
			if f.Value != "trailers" && f.Value != "" {
				return nil, nil, errors.New("te may only say trailers")
			}
		case "Cookie":
			if old := h["Cookie"]; len(old) > 0 {
				old[0] += "; " + f.Value
				continue
			}
		case "Trailer":
			trailer = declareTrailers(trailer, f.Value)
			continue
		}
		if old := h[name]; old != nil {
			h[name] = append(old, f.Value)
			continue
		}
		values[i] = f.Value
		h[name] = values[i : i+1 : i+1]
	}
	return h, trailer, nil
}

func declareTrailers(trailer http.Header, value string) http.Header {
	for name := range strings.SplitSeq(value, ",") {
		name = http.CanonicalHeaderKey(textproto.TrimString(name))
		if !httpguts.ValidTrailerHeader(name) {
			continue
		}
		if trailer == nil {
			trailer = http.Header{}
		}
		trailer[name] = nil
	}
	return trailer
}

// contentLength is the declared size of the body, -1 when there is none. Source: RFC 9110, section 8.6.
func contentLength(h http.Header) (int64, error) {
	values := h["Content-Length"]
	if len(values) == 0 {
		return -1, nil
	}
	for _, v := range values[1:] {
		if v != values[0] {
			return 0, errors.New("contradicting content-length")
		}
	}
	n, err := strconv.ParseUint(values[0], 10, 63)
	if err != nil {
		return 0, errors.New("bad content-length")
	}
	return int64(n), nil
}
