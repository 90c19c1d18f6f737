package shim_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"knarr/node/shim"
)

// connPair is a connected pair of unix stream sockets.
func connPair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	conns := [2]*net.UnixConn{}
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		_ = f.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		conns[i] = c.(*net.UnixConn)
	}
	return conns[0], conns[1]
}

func TestMessagesCarryDescriptors(t *testing.T) {
	a, b := connPair(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	// Larger than a socket's buffer, and followed by a message without descriptors.
	big := shim.Request{Op: shim.OpStart, Container: strings.Repeat("x", 1<<20), FDLabels: []string{"stdout"}}
	sent := make(chan error, 1)
	go func() {
		err := shim.Send(a, &big, w)
		if err == nil {
			err = shim.Send(a, &shim.Request{Op: shim.OpPing})
		}
		_ = a.Close()
		sent <- err
	}()
	var got shim.Request
	files, err := shim.Receive(b, &got)
	if err != nil || len(files) != 1 || got.Container != big.Container {
		t.Fatalf("%d files, %d bytes, %v", len(files), len(got.Container), err)
	}
	defer shim.CloseFiles(files)
	if _, err := files[0].WriteString("through"); err != nil {
		t.Fatal(err)
	}
	text := make([]byte, 7)
	if _, err := io.ReadFull(r, text); err != nil || string(text) != "through" {
		t.Errorf("%q %v", text, err)
	}
	got = shim.Request{}
	if files, err := shim.Receive(b, &got); err != nil || len(files) != 0 || got.Op != shim.OpPing {
		t.Errorf("second message %+v %v", got, err)
	}
	if _, err := shim.Receive(b, &got); !errors.Is(err, io.EOF) {
		t.Errorf("after the end: %v", err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
}

func TestBadMessages(t *testing.T) {
	for name, data := range map[string][]byte{
		"too long":   {0xff, 0xff, 0xff, 0xff},
		"cut off":    {0, 0, 0, 9, '{'},
		"no JSON":    append([]byte{0, 0, 0, 3}, "abc"...),
		"cut header": {0, 0},
	} {
		a, b := connPair(t)
		if _, err := a.Write(data); err != nil {
			t.Fatal(err)
		}
		_ = a.Close()
		var got shim.Request
		if _, err := shim.Receive(b, &got); err == nil || errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestLongSocketPath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 120))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time over the socket that the first one left
		l, err := shim.Listen(dir, "s")
		if err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(filepath.Join(dir, "s")); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("socket %v %v", info, err)
		}
		c, err := shim.Dial(dir, "s")
		if err != nil {
			t.Fatal(err)
		}
		s, err := l.AcceptUnix()
		if err != nil {
			t.Fatal(err)
		}
		if err := shim.Send(c, &shim.Request{Op: shim.OpList}); err != nil {
			t.Fatal(err)
		}
		var got shim.Request
		if _, err := shim.Receive(s, &got); err != nil || !bytes.Equal([]byte(got.Op), []byte(shim.OpList)) {
			t.Errorf("%+v %v", got, err)
		}
		_, _, _ = c.Close(), s.Close(), l.Close()
	}
	if _, err := shim.Dial(dir, "s"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("dead socket: %v", err)
	}
}
