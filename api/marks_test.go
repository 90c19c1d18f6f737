package api

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"knarr/store"
)

// TestMarks holds that marks never hide what a selector selects, over generated labels and selectors, and that they hide most of the rest.
func TestMarks(t *testing.T) {
	selectors := []string{"", "a=1", "a==2,b=3", "a in (1,2)", "a in (3)", "a!=1", "a notin (1,2)", "a", "!a", "b>1", "b<3", "c,d", "e=", "a=1,!b"}
	selected, hidden, others := 0, 0, 0
	for range 2000 {
		set := labels.Set{}
		for range rand.N(6) {
			set[string(rune('a'+rand.N(5)))] = []string{"", "1", "2", "3"}[rand.N(4)]
		}
		rec := &store.Record{Object: &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Labels: set}}}
		for _, text := range selectors {
			selector, err := labels.Parse(text)
			require.NoError(t, err)
			sel := Selection{Label: selector, marks: marksFor(selector)}
			is, bare := sel.Matches(rec), selector.Matches(set)
			require.Equal(t, bare, is, "%s of %v", text, set)
			switch {
			case bare:
				selected++
			case marksOf(rec)&sel.marks != sel.marks:
				hidden++
			default:
				others++
			}
		}
	}
	require.Positive(t, selected)
	require.Greater(t, hidden, others, "what no selector selects is looked at all the same")
}

func TestMarksOfNothing(t *testing.T) {
	require.Zero(t, marksFor(nil))
	require.Zero(t, marksFor(labels.Nothing()))
	require.Zero(t, marksFor(labels.Everything()))
	sel := Selection{Label: labels.Nothing(), marks: marksFor(labels.Nothing())}
	require.False(t, sel.Matches(&store.Record{Object: &corev1.Pod{}}))
}

// BenchmarkSelection tests 5,000 records, one in ten of which is selected; an operation is all of them.
func BenchmarkSelection(b *testing.B) {
	records := make([]*store.Record, 5000)
	for i := range records {
		records[i] = &store.Record{Object: &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": "bench", "shard": fmt.Sprint(i % 10)}}}}
	}
	selector := labels.SelectorFromSet(labels.Set{"shard": "3"})
	for _, sel := range []Selection{{Label: selector}, {Label: selector, marks: marksFor(selector)}} {
		b.Run(fmt.Sprint("marks=", sel.marks != 0), func(b *testing.B) {
			for b.Loop() {
				n := 0
				for _, rec := range records {
					if sel.Matches(rec) {
						n++
					}
				}
				if n != len(records)/10 {
					b.Fatal(n)
				}
			}
		})
	}
}
