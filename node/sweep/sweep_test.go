package sweep

import (
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestRemoveAll: directories go, but only in a slot.
func TestRemoveAll(t *testing.T) {
	root := t.TempDir()
	for range cap(slots) {
		slots <- struct{}{}
	}
	var wg sync.WaitGroup
	for i := range 3 * cap(slots) {
		dir := filepath.Join(root, string(rune('a'+i)))
		require.NoError(t, os.MkdirAll(filepath.Join(dir, "in", "it"), 0o700))
		wg.Go(func() {
			if err := RemoveAll(dir); err != nil {
				t.Error(err)
			}
		})
	}
	time.Sleep(20 * time.Millisecond)
	left := func() int {
		entries, err := os.ReadDir(root)
		require.NoError(t, err)
		return len(entries)
	}
	require.Equal(t, 3*cap(slots), left())
	for range cap(slots) {
		<-slots
	}
	wg.Wait()
	require.Zero(t, left())
	require.Empty(t, slots)
}
