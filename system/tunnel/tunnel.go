// Package tunnel lets an API server reach nodes whose address it cannot dial: behind a firewall, behind address translation.
//
// A node's agent keeps one connection to the server, made with the node's own client certificate, and then the roles turn:
// on that connection the server is the client of HTTP/2, and each connection that it wants to the node's API or to a pod
// of the node is one CONNECT request, whose body and answer carry the bytes. HTTP/2 brings what a multiplexer needs: flow
// control for each stream, an end of each direction, refusals with a reason, signs of life.
//
// Hub is the server's end and Agent the node's. Both hold the same short list of what a tunnel may lead to: see Reach.
package tunnel

import (
	"net/http"
	"time"
)

// Protocol is what a node asks to upgrade its connection to.
const Protocol = "knarr-tunnel/1"

// Bounds of one tunnel.
const (
	// maxConnections is how many connections a tunnel carries at once.
	maxConnections = 256
	// streamBytes is how much of a direction of a connection waits, at most, for who reads it.
	streamBytes = 256 << 10
	// copyBytes is the size of the buffer that a direction of a connection is copied with.
	copyBytes = 32 << 10
	// maxRefusalBytes bounds the text of a refusal.
	maxRefusalBytes = 1 << 10
)

// Times.
const (
	// dialTimeout bounds how long a connection, or the tunnel itself, takes to come about.
	dialTimeout = 10 * time.Second
	// lingerTimeout is how long what was written before Close may take to go out.
	lingerTimeout = 5 * time.Second
	// headStart is how long a direct connection is tried alone where there is a tunnel too.
	headStart = 250 * time.Millisecond
)

// vitals say when a silent peer is asked for a sign of life, and when it is given up.
type vitals struct{ silence, answer time.Duration }

// Only the server asks as a rule: its question is a sign of life for the node, which waits long enough to be asked first.
var (
	hubVitals   = vitals{silence: 30 * time.Second, answer: 15 * time.Second}
	agentVitals = vitals{silence: 50 * time.Second, answer: 15 * time.Second}
)

// http2 are the settings of both ends. The connection's window covers all its streams', so that connections whose reader
// stands still hold up no other.
func (v vitals) http2() *http.HTTP2Config {
	return &http.HTTP2Config{
		MaxConcurrentStreams:          maxConnections,
		MaxReceiveBufferPerStream:     streamBytes,
		MaxReceiveBufferPerConnection: streamBytes * maxConnections,
		SendPingTimeout:               v.silence,
		PingTimeout:                   v.answer,
		WriteByteTimeout:              v.answer,
	}
}

// protocols is HTTP/2 alone, which needs no negotiation: both ends know.
func protocols() *http.Protocols {
	p := new(http.Protocols)
	p.SetUnencryptedHTTP2(true)
	return p
}
