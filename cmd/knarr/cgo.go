//go:build cgo

package main

// The program is built without cgo, as `make build` does: with it, a binary of this size died at once in the C runtime (SIGSEGV at address 0, below
// runtime.callCgoMmap, Go 1.26 and Debian 12). Whoever builds by hand gets this error instead: CGO_ENABLED=0 go build ./cmd/knarr
var _ = knarr_is_built_with_CGO_ENABLED_0
