package apiserver

import (
	"net/http"
	"net/http/httptest"
	"runtime"
	"runtime/pprof"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"k8s.io/apiserver/pkg/server/mux"

	"knarr/apiserver/options"
)

// TestProfiles: profiles are there unless they are turned off, and waits are measured where that is asked for.
func TestProfiles(t *testing.T) {
	defer runtime.SetBlockProfileRate(0)
	code := func(o *options.Options, path string) int {
		m := mux.NewPathRecorderMux("test")
		installProfiles(m, o)
		w := httptest.NewRecorder()
		m.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		return w.Code
	}
	waits := func() int {
		c := make(chan struct{})
		time.AfterFunc(time.Millisecond, func() { close(c) })
		<-c
		return pprof.Lookup("block").Count()
	}
	on := options.New()
	require.Equal(t, http.StatusOK, code(on, "/debug/pprof/goroutine"))
	require.Zero(t, waits())
	off := options.New()
	off.Profiling, off.ContentionProfiling = false, true
	require.Equal(t, http.StatusNotFound, code(off, "/debug/pprof/goroutine"))
	require.Zero(t, waits())
	on.ContentionProfiling = true
	require.Equal(t, http.StatusOK, code(on, "/debug/pprof/block"))
	require.Eventually(t, func() bool { return waits() > 0 }, 20*time.Second, time.Millisecond) // on a busy machine the channel may be closed before it is waited for
}
