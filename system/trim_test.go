package system

import (
	"context"
	"runtime"
	"slices"
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

// TestTrims tells of collections, in seconds after a start, and looks when there is a trim.
func TestTrims(t *testing.T) {
	start := time.Now()
	at := func(seconds int) time.Time { return start.Add(time.Duration(seconds) * time.Second) }
	for name, test := range map[string]struct{ own, forced, want []int }{
		"a start alone": {own: []int{0, 1}, want: []int{5, 40}},
		"one before the second trim, which is that of both":                {own: []int{1, 12}, want: []int{5, 40}},
		"one shortly before the second trim, which waits until it's quiet": {own: []int{1, 27}, want: []int{5, 47}},
		"one that somebody asked for":                                      {own: []int{1}, forced: []int{27, 60}, want: []int{5, 40}},
		"work":                                                             {own: []int{1, 100, 101, 110, 125}, want: []int{5, 40, 145}},
		"two times of work":                                                {own: []int{1, 70, 100}, want: []int{5, 40, 90, 120}},
		"work from the start on":                                           {own: []int{1, 3, 6, 20, 35, 50}, want: []int{5, 70}},
		"the runtime's own, each two minutes":                              {own: []int{1, 160, 280}, want: []int{5, 40, 160, 280}},
	} {
		t.Run(name, func(t *testing.T) {
			trims := newTrims(start)
			var got []int
			trim := func(s int) {
				trims.done(at(s))
				trims.collected(at(s), false) // that of the trim itself
				got = append(got, s)
			}
			for s := range 300 {
				own := slices.Contains(test.own, s)
				if (own || slices.Contains(test.forced, s)) && trims.collected(at(s), own) {
					trim(s)
				}
				if !at(s).Before(trims.next) {
					trim(s)
				}
			}
			require.Equal(t, test.want, got)
		})
	}
}
