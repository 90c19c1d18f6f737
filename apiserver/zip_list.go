package apiserver

import (
	"net/http"

	"knarr/apiserver/pieces"
	"knarr/store"
)

const (
	// zippedBytes is how much all compressed pieces of lists may take: those of some 100,000 pods.
	zippedBytes = 8 << 20
	// A piece of a list has about pieceRecords objects, and ends after the one with which it has pieceRecordsMost or pieceBytes.
	pieceRecords, pieceRecordsMost = 64, 256
	pieceBytes                     = 128 << 10
	// zipFrom is the least size of all objects, as they are stored, from which a list may have compressFrom bytes.
	zipFrom = compressFrom / 2
)

// part is the objects of a list that make one piece.
type part struct {
	*pieces.Entry
	from, to int // of the list's records
}

// zipped gives a large list as a gzip stream, to each client that takes it, as upstream does; nil where it is better sent as it is. To compress a list costs about what it costs to send it,
// to send what is compressed a quarter of that.
func (rd *read) zipped(req *http.Request, l *listing) (*listBody, error) {
	if len(l.page.Records) < 2 || !acceptsZip(req) || !l.isLarge() {
		return nil, nil
	}
	l.split(rd.zips, rd.kind.Resource.String()+" "+rd.format.name())
	// The first item goes with what stands before it: all others are preceded by the same, wherever in a list they are.
	if err := l.gather(rd.format, 0, 1); err != nil {
		return nil, err
	}
	list := make([]*pieces.Piece, 1, len(l.parts)+2)
	item := rd.format.item(rd.kind.Stored)
	size := 0
	for _, p := range l.parts {
		made, err := p.Make(func() ([]byte, error) { return l.raw(rd.format, item, p.from, p.to) })
		if err != nil {
			return nil, err
		}
		list = append(list, made)
		size += made.Size()
	}
	body, err := rd.around(l, size+rd.format.inList(l.items[0]))
	if err != nil {
		return nil, err
	}
	if size += len(body.rest) + len(l.items[0]) + len(body.tail); size < compressFrom {
		return nil, nil
	}
	head, rest := item(body.rest, l.items[0], true)
	list[0] = pieces.Store(append(head, rest...))
	return &listBody{items: pieces.Stream(append(list, pieces.Store(body.tail))...), open: asItIs}, nil
}

// asItIs is an itemWriter.
func asItIs(out, item []byte, _ bool) (_, rest []byte) { return out, item }

// isLarge reports whether the list may be one to compress, by what the store keeps of it.
func (l *listing) isLarge() bool {
	size := int64(0)
	for _, rec := range l.page.Records {
		if size += rec.Size(); size >= zipFrom {
			return true
		}
	}
	return false
}

// split finds the parts of all records but the first. Where a part ends depends on the records in it alone, so
// that a change of one object changes one part, or two, wherever it is.
func (l *listing) split(zips *pieces.Cache, source string) {
	l.parts, l.versions = l.parts[:0], l.versions[:0]
	from, size := 1, int64(0)
	for i, rec := range l.page.Records[1:] {
		l.versions = append(l.versions, rec.Revision)
		size += rec.Size()
		if i+2 < len(l.page.Records) && len(l.versions) < pieceRecordsMost && size < pieceBytes && !endsPiece(rec) {
			continue
		}
		l.parts = append(l.parts, part{zips.Find(source, l.versions), from, i + 2})
		l.versions, from, size = l.versions[:0], i+2, 0
	}
}

// endsPiece is true of one in pieceRecords, by chance.
func endsPiece(rec *store.Record) bool {
	return uint64(rec.Revision)*0x9e3779b97f4a7c15>>32%pieceRecords == 0
}

// raw makes the bytes of the items from the i-th up to the j-th; they are good until the next call.
func (l *listing) raw(f format, item itemWriter, i, j int) ([]byte, error) {
	if err := l.gather(f, i, j); err != nil {
		return nil, err
	}
	l.buffer = l.buffer[:0]
	for _, data := range l.items[i:j] {
		var rest []byte
		l.buffer, rest = item(l.buffer, data, false)
		l.buffer = append(l.buffer, rest...)
	}
	return l.buffer, nil
}
