// Package pieces keeps parts of large answers compressed, and puts gzip streams together from them: a list of thousands of objects, of which few
// have changed since it was last asked for, is compressed anew only where they did.
//
// A gzip stream (RFC 1952) holds DEFLATE blocks (RFC 1951) and ends with a checksum and the length of all that it stands for. A piece is blocks that refer
// to nothing before them and end at a byte, so that pieces can follow one another in any order; their checksums are combined by arithmetic, without
// looking at the bytes again.
package pieces
