package api

import (
	"errors"
	"fmt"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"knarr/store"
)

// TestFailuresOfTheStoreAreStatuses checks what clients hear when the store cannot write.
func TestFailuresOfTheStoreAreStatuses(t *testing.T) {
	other := errors.New("something else")
	for _, test := range []struct {
		name string
		err  error
		want string // of a 503; empty: the error stays
	}{
		{"full disk", &store.UnavailableError{Err: fmt.Errorf("write the log: %w", syscall.ENOSPC)}, "the disk of the cluster's store is full: make room on it"},
		{"broken disk", &store.UnavailableError{Err: syscall.EIO}, "the store takes no writes now: input/output error"},
		{"closed", fmt.Errorf("write: %w", store.ErrClosed), "the server is shutting down"},
		{"other", other, ""},
	} {
		got := unavailable(test.err)
		if test.want == "" {
			require.Equal(t, test.err, got, test.name)
			continue
		}
		require.True(t, apierrors.IsServiceUnavailable(got), test.name)
		require.ErrorContains(t, got, test.want, test.name)
	}
}
