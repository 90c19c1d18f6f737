package cli

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"k8s.io/klog/v2"
)

// TestLogSaysThingsOnce: klog's own way is to write an error to the log of each severity below it too.
func TestLogSaysThingsOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	f, err := os.Create(path)
	require.NoError(t, err)
	defer f.Close()
	stderr := os.Stderr
	state := klog.CaptureState()
	os.Stderr = f
	t.Cleanup(func() {
		os.Stderr = stderr
		state.Restore()
	})
	require.NoError(t, boundLog(path))
	klog.ErrorS(errors.New("reason"), "Something failed")
	klog.Flush()
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, 1, strings.Count(string(b), "Something failed"), string(b))
}
