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
	open  itemWriter
	begun bool // the first item is in rest, or sent
	// scratch is for what stands before an item.
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
	head, body := l.open(l.scratch[:0], l.items[0], !l.begun)
	l.begun = true
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
	page     api.Page
	items    [][]byte
	parts    []part
	versions []int64
	buffer   []byte // the items of a part
}

var listings = sync.Pool{New: func() any { return &listing{} }}

// leave gives the listing back, holding on to no object.
func (l *listing) leave() {
	clear(l.page.Records)
	clear(l.items)
	clear(l.parts)
	if cap(l.buffer) > 2*pieceBytes {
		l.buffer = nil
	}
	listings.Put(l)
}

// gather finds or makes the bytes of the items from the i-th up to the j-th.
func (l *listing) gather(f format, i, j int) (err error) {
	records, items := l.page.Records[i:j], l.items[i:j]
	store.Encodings(records, f.name(), items)
	for i, rec := range records {
		if items[i] == nil {
			if items[i], err = f.raw(rec); err != nil {
				return apierrors.NewInternalError(err)
			}
		}
	}
	return nil
}

// sendList writes a list.
func (rd *read) sendList(w http.ResponseWriter, req *http.Request, l *listing) error {
	l.items = slices.Grow(l.items[:0], len(l.page.Records))[:len(l.page.Records)]
	w.Header().Set("Content-Type", rd.format.contentType())
	body, err := rd.zipped(req, l)
	if err != nil {
		return err
	}
	if body != nil {
		announceZip(w.Header())
		body.send(w, req)
		return nil
	}
	if err := l.gather(rd.format, 0, len(l.items)); err != nil {
		return err
	}
	size, inList := 0, 0
	for _, item := range l.items {
		size += len(item)
		inList += rd.format.inList(item)
	}
	if body, err = rd.around(l, inList); err != nil {
		return err
	}
	body.items = l.items
	out, end, err := compressed(w, req, size)
	if err != nil {
		return err
	}
	if out == w {
		body.send(w, req)
	} else if body.writeTo(out) == nil {
		end()
	}
	return nil
}

// around makes a list without its items, which are inList bytes.
func (rd *read) around(l *listing, inList int) (*listBody, error) {
	head, tail, err := rd.format.list(&l.page, inList, rd.kind.Stored)
	if err != nil {
		return nil, apierrors.NewInternalError(err)
	}
	return &listBody{rest: head, tail: tail, open: rd.format.item(rd.kind.Stored)}, nil
}

// send sends the body, as well as the connection can. An error of the writer is not told: the client went away.
func (l *listBody) send(w http.ResponseWriter, req *http.Request) {
	if !pour(w, req, l) {
		_ = l.writeTo(w)
	}
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
