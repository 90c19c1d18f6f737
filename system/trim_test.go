package system

import (
	"context"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestOnCollection(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	c := make(chan struct{}, 1)
	onCollection(ctx, c)
	for range 3 { // each collection is told, not only the first
		runtime.GC()
		select {
		case <-c:
		case <-time.After(10 * time.Second):
			require.Fail(t, "a collection was not told")
		}
	}
}
