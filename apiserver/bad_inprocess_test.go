package apiserver_test

import (
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"knarr/apiserver"
)

const (
	// refusals is the least number of different bad requests that are sent in process.
	refusals = 10_000
	// goroutineGrowth is how many more goroutines may run after them than before.
	goroutineGrowth = 10
	// documentHeapBytes is what the OpenAPI document may keep once somebody has asked for it, in bytes.
	documentHeapBytes = 64 << 20
)

// TestEveryResourceRefusesBadRequests sends each kind of bad request to each resource, in process, and looks at what they
// leave behind. The status and the reason are upstream's rules; of reads that our own path answers, the whole answer is
// compared with that of upstream's handlers.
func TestEveryResourceRefusesBadRequests(t *testing.T) {
	s := serve(t, func(*apiserver.Config) {})
	all := s.allRefusals(t)
	require.GreaterOrEqual(t, len(all), refusals)
	for _, class := range classes { // one each first, which makes what is made once
		for _, r := range class.of(allPlaces(t, s.cluster)[0]) {
			s.refuse(t, r)
		}
	}
	before, goroutines, start := heap(), runtime.NumGoroutine(), time.Now()
	wrong := map[string]int{}
	for _, r := range all {
		w := s.refuse(t, r)
		if reason := reasonOf(w); (w.Code != r.status || reason != r.reason) && r.method != "HEAD" || w.Code != r.status {
			if wrong[r.class]++; wrong[r.class] <= 25 {
				t.Errorf("%s: %s %.150s %.80v %.60q: %d %s, not %d %s: %.300s", r.class, r.method, r.uri, r.header, r.body, w.Code, reason, r.status, r.reason, w.Body)
			}
		}
	}
	took, after := time.Since(start), uint64(0)
	require.Eventually(t, func() bool { after = heap(); return after < before+heapGrowthBytes }, timeout, 100*time.Millisecond)
	s.compareRefusals(t, all)
	t.Logf("%d bad requests in %s, heap %d KiB before, %d KiB after; wrong: %v", len(all), took.Round(time.Millisecond), before>>10, after>>10, wrong)
	require.Eventually(t, func() bool { return runtime.NumGoroutine() <= goroutines+goroutineGrowth }, timeout, time.Millisecond)
}

// compareRefusals asks for the reads again, by a spelling of the media type that only upstream's handlers take.
func (s *served) compareRefusals(t testing.TB, all []refusal) {
	t.Helper()
	compared := 0
	for _, r := range all {
		if r.method != "GET" || r.who != "" || r.header["Accept"] != "" {
			continue
		}
		ours := s.refuse(t, r)
		r.header = map[string]string{"Accept": readFormats[0].upstream}
		theirs := s.refuse(t, r)
		require.Equal(t, theirs.Code, ours.Code, r.uri)
		require.Equal(t, theirs.Body.String(), ours.Body.String(), r.uri)
		compared++
	}
	require.Greater(t, compared, refusals/4)
}

// allRefusals are all classes for all places.
func (s *served) allRefusals(t testing.TB) []refusal {
	t.Helper()
	var out []refusal
	for _, p := range allPlaces(t, s.cluster) {
		for _, class := range classes {
			for _, r := range class.of(p) {
				r.class = class.name
				out = append(out, r)
			}
		}
	}
	return out
}
