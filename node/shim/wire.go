package shim

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

const (
	// maxMessageBytes bounds one message. A container's spec with a large
	// environment is below 2 MiB (the kernel's limit for arguments).
	maxMessageBytes = 16 << 20
	// maxMessageFDs bounds the descriptors that come with one message.
	maxMessageFDs = 8
	headerBytes   = 4
)

// Send writes one message: a big-endian uint32 length, then JSON. The
// descriptors travel with the first byte; they stay open here.
func Send(conn *net.UnixConn, message any, files ...*os.File) error {
	body, err := json.Marshal(message)
	if err != nil {
		return fmt.Errorf("shim protocol: encode: %w", err)
	}
	if len(body) > maxMessageBytes {
		return fmt.Errorf("shim protocol: message of %d bytes exceeds %d", len(body), maxMessageBytes)
	}
	packet := make([]byte, headerBytes, headerBytes+len(body))
	binary.BigEndian.PutUint32(packet, uint32(len(body)))
	packet = append(packet, body...)
	if len(files) == 0 {
		_, err = conn.Write(packet)
		return err
	}
	fds := make([]int, len(files))
	for i, f := range files {
		raw, err := f.SyscallConn()
		if err != nil {
			return err
		}
		if err := raw.Control(func(fd uintptr) { fds[i] = int(fd) }); err != nil {
			return err
		}
	}
	n, _, err := conn.WriteMsgUnix(packet, unix.UnixRights(fds...), nil)
	if err != nil {
		return err
	}
	if n < len(packet) { // an empty write would fail when the answer came already
		_, err = conn.Write(packet[n:])
	}
	return err
}

// Receive reads one message into out and returns the descriptors that came
// with it, named by labels as far as the caller asks; the caller owns them.
// A connection closed between messages gives io.EOF.
func Receive(conn *net.UnixConn, out any) ([]*os.File, error) {
	r := &fdReader{conn: conn}
	header := make([]byte, headerBytes)
	if _, err := io.ReadFull(r, header); err != nil {
		r.closeFiles()
		return nil, err
	}
	size := binary.BigEndian.Uint32(header)
	if size > maxMessageBytes {
		r.closeFiles()
		return nil, fmt.Errorf("shim protocol: message of %d bytes exceeds %d", size, maxMessageBytes)
	}
	body := make([]byte, size)
	if _, err := io.ReadFull(r, body); err != nil {
		r.closeFiles()
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	if err := json.Unmarshal(body, out); err != nil {
		r.closeFiles()
		return nil, fmt.Errorf("shim protocol: decode: %w", err)
	}
	return r.files, nil
}

// fdReader reads a stream and collects the descriptors that come along.
type fdReader struct {
	conn  *net.UnixConn
	files []*os.File
}

func (r *fdReader) Read(p []byte) (int, error) {
	oob := make([]byte, unix.CmsgSpace(4*maxMessageFDs))
	n, oobn, _, _, err := r.conn.ReadMsgUnix(p, oob)
	if oobn > 0 {
		if perr := r.collect(oob[:oobn]); perr != nil && err == nil {
			err = perr
		}
	}
	if errors.Is(err, io.EOF) || err == nil && n == 0 && len(p) > 0 {
		err = io.EOF // unwrapped, as io.ReadFull wants it
	}
	return n, err
}

func (r *fdReader) collect(oob []byte) error {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return fmt.Errorf("shim protocol: control message: %w", err)
	}
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			continue
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			r.files = append(r.files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return nil
}

func (r *fdReader) closeFiles() { CloseFiles(r.files) }

// CloseFiles closes what Receive returned.
func CloseFiles(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// Listen makes the unix socket with mode 0600 in dir, replacing a dead one.
// The path may be longer than a socket address permits.
func Listen(dir, name string) (*net.UnixListener, error) {
	addr, done, err := shortAddr(dir, name)
	if err != nil {
		return nil, err
	}
	defer done()
	if err := os.Remove(addr.Name); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	old := unix.Umask(0o177)
	l, err := net.ListenUnix("unix", addr)
	unix.Umask(old)
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	return l, nil
}

// Dial connects to the socket in dir.
func Dial(dir, name string) (*net.UnixConn, error) {
	addr, done, err := shortAddr(dir, name)
	if err != nil {
		return nil, err
	}
	defer done()
	return net.DialUnix("unix", nil, addr)
}

// shortAddr addresses a socket by way of an open directory when its path is
// longer than sockaddr_un holds.
func shortAddr(dir, name string) (*net.UnixAddr, func(), error) {
	const maxSocketPath = 107
	path := dir + "/" + name
	if len(path) <= maxSocketPath {
		return &net.UnixAddr{Name: path, Net: "unix"}, func() {}, nil
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	short := fmt.Sprintf("/proc/self/fd/%d/%s", fd, name)
	return &net.UnixAddr{Name: short, Net: "unix"}, func() { _ = unix.Close(fd) }, nil
}
