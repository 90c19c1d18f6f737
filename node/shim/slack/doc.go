// Package slack lets the Go runtime of a container's init look less often after
// its one processor. Programs that are a container's init import it for nothing
// but that; without cgo it does nothing.
package slack
