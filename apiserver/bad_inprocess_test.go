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

// TestEveryResourceRefusesBadRequests sends each kind of bad request to each resource, in process. The status and the reason
// are upstream's rules; of reads that our own path answers, the whole answer is compared with that of upstream's handlers.
// Then all are sent again, to see what they leave behind: the first time makes what is made once (a series of metrics for
// each verb, resource and status).
func TestEveryResourceRefusesBadRequests(t *testing.T) {
	s := serve(t, func(*apiserver.Config) {})
	all := s.allRefusals(t)
	require.GreaterOrEqual(t, len(all), refusals)
	s.checkRefusals(t, all)
	s.compareRefusals(t, all)
	before, goroutines, start := heap(), runtime.NumGoroutine(), time.Now()
	for _, r := range all {
		s.refuse(t, r)
	}
	took, after := time.Since(start), heap()
	t.Logf("%d bad requests in %s, heap %d KiB before, %d KiB after", len(all), took.Round(time.Millisecond), before>>10, after>>10)
	require.Less(t, after, before+heapGrowthBytes)
	require.Eventually(t, func() bool { return runtime.NumGoroutine() <= goroutines+goroutineGrowth }, timeout, time.Millisecond)
}

// shownWrongs is how many wrong answers of a class are shown.
const shownWrongs = 25

// checkRefusals holds every answer to its status and reason.
func (s *served) checkRefusals(t testing.TB, all []refusal) {
	t.Helper()
	wrong := map[string]int{}
	for _, r := range all {
		w := s.refuse(t, r)
		reason := reasonOf(w)
		if w.Code == r.status && (reason == r.reason || r.method == "HEAD") {
			continue
		}
		if wrong[r.class]++; wrong[r.class] <= shownWrongs {
			t.Errorf("%s: %s %.150s %.80v %.60q: %d %s, not %d %s: %.300s", r.class, r.method, r.uri, r.header, r.body, w.Code, reason, r.status, r.reason, w.Body)
		}
	}
	require.Empty(t, wrong, "wrong answers by class")
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
