package api

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/storage"

	"knarr/store"
	"knarr/store/pebble"
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
		held := store.NewLabelSet(set)
		for _, text := range selectors {
			selector, err := labels.Parse(text)
			require.NoError(t, err)
			sel := Selection{Label: selector, marks: marksFor(selector)}
			is, bare := sel.selects(held), selector.Matches(set)
			require.Equal(t, bare, is, "%s of %v", text, set)
			switch {
			case bare:
				selected++
			case marksOf(set)&sel.marks != sel.marks:
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

// labeled is a table of pods in a store, whose lists are compared with what is written to it.
type labeled struct {
	*Kind
	present map[string]*corev1.Pod
	page    Page
}

// podCodec is the JSON of pods.
type podCodec struct{}

func (podCodec) Encode(_ context.Context, _ string, obj runtime.Object) ([]byte, error) {
	return json.Marshal(obj)
}

func (podCodec) Decode(_ context.Context, _ string, data []byte, _ int64) (runtime.Object, error) {
	pod := &corev1.Pod{}
	return pod, json.Unmarshal(data, pod)
}

func newLabeled(t testing.TB, debug bool) *labeled {
	ctx := context.Background()
	engine, err := pebble.Open(ctx, pebble.Options{Dir: "db", FS: vfs.NewMem()})
	require.NoError(t, err)
	s, err := store.Open(ctx, store.Options{Engine: engine, Debug: debug})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	l := &labeled{Kind: &Kind{store: s, prefix: "/registry/pods/"}, present: map[string]*corev1.Pod{}}
	l.open(t)
	return l
}

func (l *labeled) open(t testing.TB) {
	var err error
	l.Table, err = l.store.OpenTable(context.Background(), store.TableOptions{Prefix: l.prefix, Codec: podCodec{}})
	require.NoError(t, err)
}

// set writes a pod, or deletes it where labels are absent.
func (l *labeled) set(t testing.TB, key string, set labels.Set) {
	op := store.Op{Table: l.Table, Key: l.prefix + key}
	if old := l.Table.Get(op.Key); old != nil {
		op.Expect = old.Revision
	}
	if delete(l.present, key); set != nil {
		namespace, name, _ := strings.Cut(key, "/")
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: set}}
		l.present[key], op.Object = pod, pod.DeepCopy()
	} else if op.Expect == 0 {
		return
	}
	_, err := l.store.Txn(context.Background(), op)
	require.NoError(t, err)
}

// want is the plain scan.
func (l *labeled) want(namespace string, selector labels.Selector) []string {
	out := []string{}
	for key, pod := range l.present {
		if (namespace == "" || pod.Namespace == namespace) && selector.Matches(labels.Set(pod.Labels)) {
			out = append(out, key)
		}
	}
	slices.Sort(out)
	return out
}

// begin asks for the first page, and gives the keys of it and a function for those of the rest.
func (l *labeled) begin(t *testing.T, namespace string, selector labels.Selector, limit int64) (keys []string, rest func() []string) {
	sel, opts := l.Select(namespace, selector, nil), storage.ListOptions{Recursive: true}
	opts.Predicate.Limit = limit
	next := func() (keys []string) {
		page := &l.page // used again and again
		require.NoError(t, l.ListInto(page, sel, opts))
		require.True(t, limit == 0 || int64(len(page.Records)) <= limit)
		keys = []string{}
		for _, rec := range page.Records {
			keys = append(keys, strings.TrimPrefix(rec.Key, l.prefix))
		}
		opts.Predicate.Continue = page.Continue
		return keys
	}
	return next(), func() (keys []string) {
		for opts.Predicate.Continue != "" {
			keys = append(keys, next()...)
		}
		return keys
	}
}

// TestLabeledLists compares lists by labels with the plain scan, under random writes: at once and in pages that go on while others write, and
// after a restart of the table.
func TestLabeledLists(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	selectors := []string{"", "a=1", "a==2,b=3", "a in (1,2)", "a!=1", "a notin (1,2)", "a", "!a", "b>1", "e=", "a=1,!b", "own", "own=n-3"}
	l := newLabeled(t, true)
	write := func() {
		name := fmt.Sprint("n-", random.IntN(40))
		var set labels.Set
		if random.IntN(4) > 0 {
			set = labels.Set{}
			for range random.IntN(4) {
				set[string(rune('a'+random.IntN(5)))] = []string{"", "1", "2", "3"}[random.IntN(4)]
			}
			if random.IntN(3) == 0 {
				set["own"] = name
			}
		}
		l.set(t, []string{"one/", "two/"}[random.IntN(2)]+name, set)
	}
	for round := range 300 {
		write()
		selector, err := labels.Parse(selectors[random.IntN(len(selectors))])
		require.NoError(t, err)
		namespace := []string{"", "one", "two", "none"}[random.IntN(4)]
		want := l.want(namespace, selector)
		got, rest := l.begin(t, namespace, selector, int64(random.IntN(3)*7))
		for range random.IntN(5) {
			write()
		}
		require.Equal(t, want, append(got, rest()...), "round %d: %s in %q", round, selector, namespace)
		if round%50 == 0 {
			l.store.CloseTable(l.prefix)
			l.open(t)
		}
	}
	for key := range l.present {
		l.set(t, key, nil)
	}
	got, _ := l.begin(t, "", labels.Everything(), 0)
	require.Empty(t, got)
}

// BenchmarkSelection lists one in ten of 5,000 records by a label; an operation is all of them. Labels are shared as those of workloads' pods are,
// or each record has one of its own.
func BenchmarkSelection(b *testing.B) {
	for _, own := range []bool{false, true} {
		b.Run(fmt.Sprint("own=", own), func(b *testing.B) {
			const count = 5000
			l := newLabeled(b, false)
			ops := make([]store.Op, 0, count)
			for i := range count {
				set := map[string]string{"app": "bench", "shard": fmt.Sprint(i % 10)}
				if own {
					set["number"] = fmt.Sprint(i)
				}
				ops = append(ops, store.Op{Table: l.Table, Key: fmt.Sprint(l.prefix, "n/", i), Object: &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Labels: set}}})
			}
			for some := range slices.Chunk(ops, 1000) {
				_, err := l.store.Txn(context.Background(), some...)
				require.NoError(b, err)
			}
			sel := l.Select("n", labels.SelectorFromSet(labels.Set{"shard": "3"}), nil)
			b.ReportAllocs()
			for b.Loop() {
				page, err := l.List(sel, storage.ListOptions{Recursive: true})
				if err != nil || len(page.Records) != count/10 {
					b.Fatal(err)
				}
			}
		})
	}
}
