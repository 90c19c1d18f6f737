package apiserver

import (
	"io"
	"net/http"
	"slices"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"

	"knarr/api"
	"knarr/apiserver/h2"
	"knarr/store"
)

// listBufferBytes is how much of a list is gathered before it is handed on, where the connection does not take it itself.
const listBufferBytes = 32 << 10

// listBuffers gather the many small parts of a list.
var listBuffers = sync.Pool{New: func() any { b := make([]byte, 0, listBufferBytes); return &b }}

// listBody makes the body of a list piece by piece: there is never a second copy of it.
type listBody struct {
	// rest is what was begun and comes next: at first what stands before the items.
	rest  []byte
	items [][]byte // that follow
	tail  []byte   // after the last
	// open appends what stands before an item's bytes, and gives those that are sent.
	open    func(out, item []byte) (_, rest []byte)
	scratch [16]byte
}

// next is an h2.Source.
func (l *listBody) next(out []byte, limit int) ([]byte, bool) {
	for end := len(out) + limit; ; {
		n := min(len(l.rest), end-len(out))
		out = append(out, l.rest[:n]...)
		switch l.rest = l.rest[n:]; {
		case len(l.rest) > 0:
			return out, true
		case len(l.items) > 0:
			out = l.begin(out, end)
		case l.tail != nil:
			l.rest, l.tail = l.tail, nil
		default:
			return out, false
		}
	}
}

// begin goes on to the next item, where what stands before it fits.
func (l *listBody) begin(out []byte, end int) []byte {
	head, body := l.open(l.scratch[:0], l.items[0])
	if len(head) > end-len(out) {
		l.rest = append(append(make([]byte, 0, len(head)+len(body)), head...), body...)
	} else {
		out, l.rest = append(out, head...), body
	}
	l.items = l.items[1:]
	return out
}

// listing is what a list is made of, for use again: of 5,000 objects it is a third of a megabyte.
type listing struct {
	page  api.Page
	items [][]byte
}

var listings = sync.Pool{New: func() any { return &listing{} }}

// leave gives the listing back, holding on to no object.
func (l *listing) leave() {
	clear(l.page.Records)
	clear(l.items)
	listings.Put(l)
}

// gather finds or makes the items' bytes, and gives their size.
func (l *listing) gather(f format) (size int, err error) {
	l.items = slices.Grow(l.items[:0], len(l.page.Records))[:len(l.page.Records)]
	store.Encodings(l.page.Records, f.name(), l.items)
	for i, rec := range l.page.Records {
		if l.items[i] == nil {
			if l.items[i], err = f.raw(rec); err != nil {
				return 0, apierrors.NewInternalError(err)
			}
		}
		size += len(l.items[i])
	}
	return size, nil
}

// sendList writes a list.
func (rd *read) sendList(w http.ResponseWriter, req *http.Request, l *listing) error {
	size, err := l.gather(rd.format)
	if err != nil {
		return err
	}
	body, err := rd.format.list(&l.page, l.items, rd.kind.Stored)
	if err != nil {
		return apierrors.NewInternalError(err)
	}
	w.Header().Set("Content-Type", rd.format.contentType())
	out, end, err := compressed(w, req, size)
	if err != nil {
		return err
	}
	// An error of the writer: the client went away, and nobody is left to tell.
	if out == w && pour(w, req, body) {
		return nil
	}
	if body.writeTo(out) == nil {
		end()
	}
	return nil
}

// writeTo writes what is left.
func (l *listBody) writeTo(w io.Writer) error {
	buffer := listBuffers.Get().(*[]byte)
	defer listBuffers.Put(buffer)
	for {
		data, more := l.next((*buffer)[:0], listBufferBytes)
		if _, err := w.Write(data); err != nil || !more {
			return err
		}
	}
}

// pour lets the connection below a response's wrappers make the body as it sends it; false where it cannot. What the wrappers count of
// the bytes they do not see is counted here.
func pour(w http.ResponseWriter, req *http.Request, body *listBody) bool {
	pourer := below[h2.Pourer](w)
	if pourer == nil {
		return false
	}
	w.WriteHeader(http.StatusOK)
	began := time.Now()
	n, _ := pourer.Pour(body.next)
	apirequest.TrackResponseWriteLatency(req.Context(), time.Since(began))
	if m, ok := w.(*measured); ok {
		m.size += n
	}
	return true
}

// below finds what implements an interface below the wrappers of a response; nil where nothing does.
func below[T any](w http.ResponseWriter) (found T) {
	for {
		if found, ok := w.(T); ok {
			return found
		}
		u, ok := w.(interface{ Unwrap() http.ResponseWriter })
		if !ok {
			return found
		}
		w = u.Unwrap()
	}
}
