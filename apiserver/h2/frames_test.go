package h2

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// peerRig is a client that may send what no client should.
type peerRig struct {
	*http2.Framer
	conn   *tls.Conn
	block  bytes.Buffer
	encode *hpack.Encoder
}

// dial opens a connection and exchanges prefaces.
func dial(t *testing.T, s *rig, settings ...http2.Setting) *peerRig {
	t.Helper()
	conn, err := tls.Dial("tcp", s.address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	require.NoError(t, conn.SetDeadline(time.Now().Add(testTimeout)))
	p := &peerRig{conn: conn, Framer: http2.NewFramer(conn, conn)}
	p.encode = hpack.NewEncoder(&p.block)
	p.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	_, err = io.WriteString(conn, http2.ClientPreface)
	require.NoError(t, err)
	require.NoError(t, p.WriteSettings(settings...))
	return p
}

// get is the header block of a GET, with further fields.
func (p *peerRig) get(path string, more ...string) []byte {
	p.block.Reset()
	fields := append([]string{":method", "GET", ":scheme", "https", ":authority", "h", ":path", path}, more...)
	for i := 0; i < len(fields); i += 2 {
		_ = p.encode.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return p.block.Bytes()
}

func (p *peerRig) open(t *testing.T, id uint32, end bool, block []byte) {
	t.Helper()
	require.NoError(t, p.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block, EndStream: end, EndHeaders: true}))
}

// next reads the next frame that is no SETTINGS or WINDOW_UPDATE.
func (p *peerRig) next(t *testing.T) http2.Frame {
	t.Helper()
	for {
		f, err := p.ReadFrame()
		require.NoError(t, err)
		switch f.(type) {
		case *http2.SettingsFrame, *http2.WindowUpdateFrame:
		default:
			return f
		}
	}
}

func (p *peerRig) expectGoAway(t *testing.T, code http2.ErrCode) {
	t.Helper()
	for {
		f, err := p.ReadFrame()
		require.NoError(t, err, "the connection ended without a GOAWAY")
		if g, ok := f.(*http2.GoAwayFrame); ok {
			require.Equal(t, code, g.ErrCode)
			break
		}
	}
	for {
		if _, err := p.ReadFrame(); err != nil {
			return // closed
		}
	}
}

func (p *peerRig) expectReset(t *testing.T, id uint32, code http2.ErrCode) {
	t.Helper()
	for {
		if r, ok := p.next(t).(*http2.RSTStreamFrame); ok {
			require.Equal(t, id, r.StreamID)
			require.Equal(t, code, r.ErrCode)
			return
		}
	}
}

func (p *peerRig) expectStatus(t *testing.T, id uint32, status string) {
	t.Helper()
	for {
		if h, ok := p.next(t).(*http2.MetaHeadersFrame); ok && h.StreamID == id {
			require.Equal(t, status, h.PseudoValue("status"))
			return
		}
	}
}

// TestBadFrames holds the error codes of RFC 9113 for what a client must not do.
func TestBadFrames(t *testing.T) {
	const connection, stream = true, false
	for _, tc := range []struct {
		name string
		send func(t *testing.T, p *peerRig)
		code http2.ErrCode
		ends bool
	}{
		{"even stream", func(t *testing.T, p *peerRig) { p.open(t, 2, true, p.get("/")) }, http2.ErrCodeProtocol, connection},
		{"stream number goes back", func(t *testing.T, p *peerRig) {
			p.open(t, 5, true, p.get("/size/1"))
			p.open(t, 3, true, p.get("/size/1"))
		}, http2.ErrCodeStreamClosed, connection},
		{"data on an idle stream", func(t *testing.T, p *peerRig) { require.NoError(t, p.WriteData(1, true, nil)) }, http2.ErrCodeProtocol, connection},
		{"reset of an idle stream", func(t *testing.T, p *peerRig) { require.NoError(t, p.WriteRSTStream(1, 0)) }, http2.ErrCodeProtocol, connection},
		{"window update of an idle stream", func(t *testing.T, p *peerRig) { require.NoError(t, p.WriteWindowUpdate(1, 1)) }, http2.ErrCodeProtocol, connection},
		{"window too large", func(t *testing.T, p *peerRig) { require.NoError(t, p.WriteWindowUpdate(0, 1<<31-1)) }, http2.ErrCodeFlowControl, connection},
		{"bad setting", func(t *testing.T, p *peerRig) {
			require.NoError(t, p.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 31}))
		}, http2.ErrCodeFlowControl, connection},
		{"push promise", func(t *testing.T, p *peerRig) {
			require.NoError(t, p.WriteRawFrame(http2.FramePushPromise, http2.FlagPushPromiseEndHeaders, 1, []byte{0, 0, 0, 2}))
		}, http2.ErrCodeProtocol, connection},
		{"broken compression", func(t *testing.T, p *peerRig) { p.open(t, 1, true, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}) },
			http2.ErrCodeCompression, connection},
		{"frame too large", func(t *testing.T, p *peerRig) {
			require.NoError(t, p.WriteRawFrame(http2.FrameData, 0, 1, make([]byte, frameBytes+1)))
		}, http2.ErrCodeFrameSize, connection},
		{"continuation without headers", func(t *testing.T, p *peerRig) { require.NoError(t, p.WriteContinuation(1, true, nil)) },
			http2.ErrCodeProtocol, connection},
		{"no path", func(t *testing.T, p *peerRig) {
			p.block.Reset()
			_ = p.encode.WriteField(hpack.HeaderField{Name: ":method", Value: "GET"})
			p.open(t, 1, true, p.block.Bytes())
		}, http2.ErrCodeProtocol, stream},
		{"upper case", func(t *testing.T, p *peerRig) { p.open(t, 1, true, p.get("/", "Upper", "x")) }, http2.ErrCodeProtocol, stream},
		{"pseudo header at the end", func(t *testing.T, p *peerRig) { p.open(t, 1, true, p.get("/", "a", "b", ":path", "/")) },
			http2.ErrCodeProtocol, stream},
		{"depends on itself", func(t *testing.T, p *peerRig) {
			require.NoError(t, p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.get("/"), EndHeaders: true, EndStream: true,
				Priority: http2.PriorityParam{StreamDep: 1}}))
		}, http2.ErrCodeProtocol, stream},
		{"longer than declared", func(t *testing.T, p *peerRig) {
			p.open(t, 1, false, p.get("/echo", "content-length", "1"))
			require.NoError(t, p.WriteData(1, false, []byte("ab")))
		}, http2.ErrCodeProtocol, stream},
		{"shorter than declared", func(t *testing.T, p *peerRig) {
			p.open(t, 1, false, p.get("/echo", "content-length", "3"))
			require.NoError(t, p.WriteData(1, true, []byte("ab")))
		}, http2.ErrCodeProtocol, stream},
		{"data after the end", func(t *testing.T, p *peerRig) {
			p.open(t, 1, false, p.get("/echo"))
			require.NoError(t, p.WriteData(1, true, []byte("ab")))
			require.NoError(t, p.WriteData(1, true, []byte("ab")))
		}, http2.ErrCodeStreamClosed, stream},
		{"window of a stream too large", func(t *testing.T, p *peerRig) {
			p.open(t, 1, false, p.get("/echo"))
			require.NoError(t, p.WriteWindowUpdate(1, 1<<31-1))
		}, http2.ErrCodeFlowControl, stream},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := serve(t, echo(), testOptions(), false)
			p := dial(t, s)
			tc.send(t, p)
			if tc.ends == connection {
				p.expectGoAway(t, tc.code)
				return
			}
			p.expectReset(t, 1, tc.code)
			p.open(t, 7, true, p.get("/size/1")) // the connection goes on
			p.expectStatus(t, 7, "200")
		})
	}
}

// TestRefusals holds what is answered without asking the handler.
func TestRefusals(t *testing.T) {
	s := serve(t, echo(), testOptions(), false)
	var many []string // one kilobyte, which the header table holds, a hundred times
	for range 100 {
		many = append(many, "x", strings.Repeat("y", 1<<10))
	}
	for _, tc := range []struct {
		name, status string
		fields       []string
	}{
		{"connection field", "400", []string{"connection", "close"}},
		{"te", "400", []string{"te", "gzip"}},
		{"contradicting lengths", "400", []string{"content-length", "1", "content-length", "2"}},
		{"much too long", "431", many},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := dial(t, s)
			p.open(t, 1, true, p.get("/size/1", tc.fields...))
			p.expectStatus(t, 1, tc.status)
		})
	}
}

func TestPing(t *testing.T) {
	p := dial(t, serve(t, echo(), testOptions(), false))
	require.NoError(t, p.WritePing(false, [8]byte{1, 2, 3}))
	f := p.next(t).(*http2.PingFrame)
	require.True(t, f.IsAck())
	require.Equal(t, [8]byte{1, 2, 3}, f.Data)
}

// TestRapidReset opens and cancels requests whose handlers go on: few run, some wait, then the client is cut off.
func TestRapidReset(t *testing.T) {
	o := testOptions()
	o.MaxStreams = 4
	release := make(chan struct{})
	running := make(chan struct{}, 1000)
	s := serve(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		running <- struct{}{}
		<-release
	}), o, false)
	p := dial(t, s)
	for i := range o.MaxStreams*(queuedStreams+1) + 1 {
		id := uint32(2*i + 1)
		p.open(t, id, true, p.get("/"))
		if i < o.MaxStreams {
			<-running
		}
		require.NoError(t, p.WriteRSTStream(id, http2.ErrCodeCancel))
	}
	p.expectGoAway(t, http2.ErrCodeEnhanceYourCalm)
	require.Empty(t, running)
	close(release)
}

func TestTooManyStreams(t *testing.T) {
	o := testOptions()
	o.MaxStreams = 2
	release := make(chan struct{})
	s := serve(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-release }), o, false)
	p := dial(t, s)
	for id := uint32(1); id <= 5; id += 2 {
		p.open(t, id, true, p.get("/"))
	}
	p.expectReset(t, 5, http2.ErrCodeRefusedStream)
	close(release)
	p.expectStatus(t, 3, "200")
}

// TestPingFlood sends pings and reads nothing: the server does not gather answers without bound.
func TestPingFlood(t *testing.T) {
	o := testOptions()
	o.WriteTimeout = 500 * time.Millisecond
	p := dial(t, serve(t, echo(), o, false))
	var many bytes.Buffer
	fr := http2.NewFramer(&many, nil)
	for range 10_000 {
		require.NoError(t, fr.WritePing(false, [8]byte{}))
	}
	var err error
	for i := 0; err == nil && i < 1000; i++ {
		_, err = p.conn.Write(many.Bytes())
	}
	require.Error(t, err)
	require.NotErrorIs(t, err, os.ErrDeadlineExceeded)
}

// TestClientWindows sends no more than the client takes, and goes on when it takes more.
func TestClientWindows(t *testing.T) {
	s := serve(t, echo(), testOptions(), false)
	p := dial(t, s, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 10})
	p.open(t, 1, true, p.get("/size/25"))
	got := 0
	for _, more := range []int{10, 10, 5} {
		for got < more {
			if d, ok := p.next(t).(*http2.DataFrame); ok {
				got += len(d.Data())
			}
		}
		require.Equal(t, more, got)
		got = 0
		require.NoError(t, p.WriteWindowUpdate(1, 10))
	}
	// The window of new streams grows for open ones too.
	p.open(t, 3, true, p.get("/size/30"))
	require.NoError(t, p.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 100}))
	for got < 30 {
		if d, ok := p.next(t).(*http2.DataFrame); ok && d.StreamID == 3 {
			got += len(d.Data())
		}
	}
}

// TestSilentClient takes nothing in: writers wait, then the connection ends.
func TestSilentClient(t *testing.T) {
	o := testOptions()
	o.WriteTimeout = 300 * time.Millisecond
	failed := make(chan error, 1)
	s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		var err error
		for err == nil {
			_, err = w.Write(make([]byte, 1<<20))
		}
		failed <- err
	}), o, false)
	p := dial(t, s, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1<<31 - 1})
	require.NoError(t, p.WriteWindowUpdate(0, 1<<30))
	p.open(t, 1, true, p.get("/"))
	select {
	case err := <-failed:
		require.Error(t, err)
	case <-time.After(testTimeout):
		t.Fatal("the handler still writes")
	}
}

func TestBadPreface(t *testing.T) {
	s := serve(t, echo(), testOptions(), false)
	conn, err := tls.Dial("tcp", s.address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	require.NoError(t, err)
	defer conn.Close()
	require.NoError(t, conn.SetDeadline(time.Now().Add(testTimeout)))
	_, err = io.WriteString(conn, "GET / HTTP/1.1\r\nHost: here\r\n\r\n")
	require.NoError(t, err)
	_, err = io.Copy(io.Discard, conn)
	require.False(t, errors.Is(err, io.ErrUnexpectedEOF) || err != nil && strings.Contains(err.Error(), "timeout"), "%v", err)
}

// FuzzFrames sends anything after the preface: no panic, and the connection ends.
func FuzzFrames(f *testing.F) {
	var out bytes.Buffer
	fr := http2.NewFramer(&out, nil)
	_ = fr.WriteSettings()
	_ = fr.WritePing(false, [8]byte{})
	_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x82, 0x84, 0x87, 0x41, 1, 'h'}, EndHeaders: true})
	_ = fr.WriteData(1, true, []byte("body"))
	_ = fr.WriteRSTStream(1, 8)
	f.Add(out.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		s := serve(t, echo(), testOptions(), false)
		conn, err := tls.Dial("tcp", s.address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(testTimeout))
		_, _ = io.WriteString(conn, http2.ClientPreface)
		_, _ = conn.Write(data)
		_ = conn.CloseWrite()
		_, _ = io.Copy(io.Discard, conn)
	})
}
