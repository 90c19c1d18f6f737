package h2

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// blockBound is small, so that the fuzzer gets to it.
const blockBound = 512

// readBlock reads the next frame's header block as a connection does.
func readBlock(b *block) error {
	f, err := b.framer.ReadFrame()
	if err != nil {
		return err
	}
	h, ok := f.(*http2.HeadersFrame)
	if !ok {
		return io.EOF
	}
	return b.read(h)
}

// upstreamBlock reads it with the framer's own decoding; ok is false where that takes what no request has, or counts differently.
func upstreamBlock(f *http2.Framer) (fields []hpack.HeaderField, truncated, ok bool, err error) {
	frame, err := f.ReadFrame()
	if err != nil {
		return nil, false, true, err
	}
	h, isHeaders := frame.(*http2.MetaHeadersFrame)
	if !isHeaders {
		return nil, false, true, io.EOF
	}
	for _, field := range h.Fields {
		if field.Name == ":status" || field.Name == ":protocol" || field.Name == "trailer" {
			return nil, false, false, nil
		}
	}
	return h.Fields, h.Truncated, true, nil
}

// sameFailure reports whether a connection answers both errors alike.
func sameFailure(a, b error) bool {
	var fatalA, fatalB http2.ConnectionError
	var resetA, resetB http2.StreamError
	if errors.As(a, &fatalA) || errors.As(b, &fatalB) {
		return errors.As(a, &fatalA) && errors.As(b, &fatalB) && fatalA == fatalB
	}
	if errors.As(a, &resetA) || errors.As(b, &resetB) {
		return errors.As(a, &resetA) && errors.As(b, &resetB) && resetA.Code == resetB.Code && resetA.StreamID == resetB.StreamID
	}
	return (a == nil) == (b == nil)
}

// requireSameBlocks reads all blocks of a stream of frames both ways.
func requireSameBlocks(t *testing.T, stream []byte) {
	upstream := http2.NewFramer(nil, bytes.NewReader(stream))
	upstream.ReadMetaHeaders = hpack.NewDecoder(tableBytes, nil)
	upstream.MaxHeaderListSize = blockBound
	own := newBlock(http2.NewFramer(nil, bytes.NewReader(stream)), blockBound)
	for {
		want, truncated, ok, wantErr := upstreamBlock(upstream)
		err := readBlock(own)
		if !ok {
			return
		}
		require.True(t, sameFailure(wantErr, err), "%v, upstream %v", err, wantErr)
		var reset http2.StreamError
		if errors.As(err, &reset) {
			continue
		}
		if err != nil {
			return
		}
		require.Equal(t, truncated, own.truncated)
		var got []hpack.HeaderField
		for _, p := range []struct {
			bit         uint8
			name, value string
		}{{1, ":method", own.method}, {2, ":path", own.path}, {4, ":scheme", own.scheme}, {8, ":authority", own.authority}} {
			if own.given&p.bit != 0 {
				got = append(got, hpack.HeaderField{Name: p.name, Value: p.value})
			}
		}
		var pseudos []hpack.HeaderField
		for len(want) > 0 && want[0].IsPseudo() {
			pseudos, want = append(pseudos, hpack.HeaderField{Name: want[0].Name, Value: want[0].Value}), want[1:]
		}
		require.ElementsMatch(t, pseudos, got)
		require.Equal(t, len(want), len(own.fields))
		for i := range want {
			require.Equal(t, want[i], own.fields[i])
		}
		own.forget()
	}
}

// blockFrames writes header blocks, each in frames of at most size bytes.
func blockFrames(size int, blocks ...[]string) []byte {
	var out, encoded bytes.Buffer
	enc := hpack.NewEncoder(&encoded)
	framer := http2.NewFramer(&out, nil)
	for i, b := range blocks {
		encoded.Reset()
		for j := 0; j+1 < len(b); j += 2 {
			_ = enc.WriteField(hpack.HeaderField{Name: b[j], Value: b[j+1]})
		}
		fragment := encoded.Bytes()
		first := fragment[:min(size, len(fragment))]
		rest := fragment[len(first):]
		_ = framer.WriteHeaders(http2.HeadersFrameParam{StreamID: uint32(2*i + 1), BlockFragment: first, EndStream: i%2 == 0, EndHeaders: len(rest) == 0})
		for len(rest) > 0 {
			n := min(size, len(rest))
			_ = framer.WriteContinuation(uint32(2*i+1), n == len(rest), rest[:n])
			rest = rest[n:]
		}
	}
	return out.Bytes()
}

// blockCases are requests as they are, and as they must not be.
func blockCases() map[string][]string {
	get := []string{":method", "GET", ":path", "/api", ":scheme", "https", ":authority", "a:1"}
	with := func(more ...string) []string { return append(append([]string{}, get...), more...) }
	return map[string][]string{
		"plain": get, "fields": with("accept", "a", "user-agent", "b", "accept", "c"), "empty": {}, "only fields": {"accept", "a"},
		"twice": with(":path", "/b"), "late": append([]string{"accept", "a"}, get...), "unknown": with(":wrong", "x"), "no name": with("", "x"),
		"upper case": with("Accept", "x"), "space": with("ac cept", "x"), "not ASCII": with("acc\u00e9pt", "x"), "line break": with("accept", "a\nb"), "bad path": {":path", "a\nb"},
		"at the bound": with("a", strings.Repeat("x", 200)), "over the bound": with("a", strings.Repeat("x", 300)), "a field over it": with("a", strings.Repeat("x", 600)),
		"a path over it": {":method", "GET", ":path", strings.Repeat("/", 490)}, "an unknown one over it": with(":wrong", strings.Repeat("x", 490)), "many over it": with(strings.Split(strings.Repeat("a,b,", 60)+"a,b", ",")...), "far over it": with("a", strings.Repeat("x", 5000)),
	}
}

// TestBlocks reads header blocks, of which those after the first build on it, as golang.org/x/net does.
func TestBlocks(t *testing.T) {
	plain := blockCases()["fields"]
	for name, c := range blockCases() {
		t.Run(name, func(t *testing.T) {
			for _, size := range []int{1, 7, 16000} {
				requireSameBlocks(t, blockFrames(size, c, plain, plain))
				requireSameBlocks(t, blockFrames(size, plain, c, plain))
			}
		})
	}
}

// TestTrailerNames counts each name that a request announces, as it is kept as one.
func TestTrailerNames(t *testing.T) {
	b := newBlock(http2.NewFramer(nil, bytes.NewReader(blockFrames(16000, []string{":method", "GET", "trailer", strings.Repeat("a,", 20)}))), blockBound)
	require.NoError(t, readBlock(b))
	require.True(t, b.truncated)
}

// TestBlocksForget holds that nothing of a request stays with its connection, and no room of a large one.
func TestBlocksForget(t *testing.T) {
	many := strings.Split(strings.Repeat("a,b,", 70)+"a,b", ",")
	b := newBlock(http2.NewFramer(nil, bytes.NewReader(blockFrames(16000, []string{":method", "GET", "accept", "a"}, many))), 64<<10)
	require.NoError(t, readBlock(b))
	b.forget()
	require.Equal(t, pseudo{}, b.pseudo)
	require.Equal(t, hpack.HeaderField{}, b.fields[:1][0])
	require.NoError(t, readBlock(b))
	require.Len(t, b.fields, 71)
	b.forget()
	require.Nil(t, b.fields)
}

// FuzzBlocks does so with anything.
func FuzzBlocks(f *testing.F) {
	plain := blockCases()["fields"]
	for _, c := range blockCases() {
		f.Add(blockFrames(16000, plain, c, plain))
		f.Add(blockFrames(9, c, plain))
	}
	f.Fuzz(requireSameBlocks)
}

// usualBlock gives a function that reads the header block of a usual request, as they come after the first of a connection.
func usualBlock(t testing.TB) (read func()) {
	one := []string{":method", "GET", ":path", "/api/v1/namespaces/default/pods/x", ":scheme", "https", ":authority", "127.0.0.1:6443",
		"accept", "application/vnd.kubernetes.protobuf", "user-agent", "apibench", "accept-encoding", "gzip"}
	frames := blockFrames(16000, one, one)
	first := len(blockFrames(16000, one))
	var r bytes.Reader
	r.Reset(frames[:first])
	own := newBlock(http2.NewFramer(nil, &r), 64<<10)
	require.NoError(t, readBlock(own))
	return func() {
		r.Reset(frames[first:])
		require.NoError(t, readBlock(own))
		own.forget()
	}
}

// TestBlockAllocations holds that a request's header costs the framer's frame, and no more.
func TestBlockAllocations(t *testing.T) {
	require.LessOrEqual(t, testing.AllocsPerRun(100, usualBlock(t)), 1.0)
}

func BenchmarkBlock(b *testing.B) {
	read := usualBlock(b)
	b.ReportAllocs()
	for b.Loop() {
		read()
	}
}
