package dns

import (
	"net"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A socket's reads have no end of their own, and still the one that the library puts to them when it stops.
func TestPatient(t *testing.T) {
	socket, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	defer socket.Close()
	p := patient{socket}
	require.NoError(t, p.SetReadDeadline(time.Now().Add(10*time.Millisecond)))
	ended := make(chan error, 1)
	go func() {
		_, _, err := p.ReadFrom(make([]byte, 1))
		ended <- err
	}()
	select {
	case err := <-ended:
		t.Fatal("gave up: ", err)
	case <-time.After(100 * time.Millisecond):
	}
	require.NoError(t, p.SetReadDeadline(time.Unix(1, 0)))
	require.ErrorIs(t, <-ended, os.ErrDeadlineExceeded)
}
