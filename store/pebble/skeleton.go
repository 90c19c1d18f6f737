// Package pebble is the durable engine of one machine (being built).
package pebble

import (
	"context"

	"github.com/cockroachdb/pebble/v2/vfs"

	"knarr/store"
)

type Options struct {
	Dir string // made with mode 0700
	FS  vfs.FS // nil: the disk; vfs.NewMem() for tests
}

func Open(ctx context.Context, o Options) (store.Engine, error) { panic("being built") }
