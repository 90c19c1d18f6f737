// Package h2 is the server side of HTTP/2 (RFC 9113), made for an API server: many small answers on few connections.
// Frames and header compression are read by golang.org/x/net/http2; connections, streams and everything that is written are here.
//
// # Why not net/http's
//
// There, one request costs two hand-overs between goroutines, a request object with its header map, a frame queue, and
// a system call for each frame: three to four times what an API server spends on a GET that is answered from memory.
//
// # What holds
//
//   - One goroutine reads a connection. It may answer a request itself (Options.Fast), without making an http.Request of it;
//     all other requests get a goroutine each and behave as net/http's.
//
//   - Nobody owns the writing. Whoever has something to send appends its frames to conn.out under conn.mu and calls flush;
//     one caller at a time writes, and takes along what the others append meanwhile. So under load many answers share one TLS
//     record and one system call, and a lone answer goes out from the goroutine that made it.
//
//   - A handler may hand the rest of its body to a Feed. Whoever writes asks the feeds that have something, so that all that the watches of
//     a connection have to say about a change leaves at once, and no goroutine wakes for each of them. Where many connections are told of the same
//     changes, each rests for some milliseconds after it has written, so that what follows leaves together (rest.go).
//
//   - A handler may have a large body made as it is sent (Pourer). Such bodies take turns of a few batches, on their handlers' goroutines: all of a connection
//     leaves in one order anyway, and passing the turn on after each batch would wake a thread each time. What else is pending leaves with each batch.
//
//   - Before the reading goroutine waits for the network, and only then, it flushes (socket.beforeRead). A request whose body
//     is still on its way is started then too, or as soon as the body is whole.
//
//   - Bounds: Options names those of streams, headers and bodies; maxBodies what waits to be written on a connection, after
//     which writers wait for the network, batchRecords what is made of a large body ahead of it, and maxPending the same for small answers; pieceBytes, and one part more, what a feed has given that its client does not take;
//     queuedStreams the requests that a client may queue by cancelling others.
//
//   - A client that takes nothing in for Options.WriteTimeout loses its connection. Deadlines of single requests, as
//     http.ResponseController sets them, reset the request's stream.
//
// Lock order: body.mu and conn.mu are never held together; socket.mu and rests.mu come last. Feeds are asked without conn.mu, and wake takes nothing else.
//
// Answers use the static header table only: header blocks can be made before anybody knows in which order they are sent, and
// a connection keeps no table.
package h2
