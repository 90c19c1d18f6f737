package storetest

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"knarr/store"
)

// Bench measures an engine in directories of a real disk.
func Bench(b *testing.B, open OpenDir) {
	for _, writers := range []int{1, 32} {
		for class, name := range []string{"Durable", "Lossy"} {
			b.Run(fmt.Sprintf("Txn/%s/%d", name, writers), func(b *testing.B) { benchTxn(b, open, store.Class(class), writers) })
		}
	}
	b.Run("Get", func(b *testing.B) { benchGet(b, open) })
	b.Run("SnapshotAscend5000", func(b *testing.B) { benchList(b, open) })
	b.Run("SnapshotAscend5000Changing", func(b *testing.B) { benchListChanging(b, open) })
	b.Run("Fanout1000", func(b *testing.B) { benchFanout(b, open) })
}

func benchStore(b *testing.B, open OpenDir, class store.Class) (*store.Store, *store.Table) {
	b.Helper()
	engine, err := open(b.TempDir() + "/db")
	must(b, err)
	s, err := store.Open(context.Background(), store.Options{Engine: engine})
	must(b, err)
	b.Cleanup(func() { must(b, s.Close()) })
	tab, err := s.OpenTable(context.Background(), store.TableOptions{Prefix: Pods, Codec: Codec{}, Class: class})
	must(b, err)
	return s, tab
}

// content is about as large as a pod.
var benchContent = strings.Repeat("x", 2000)

func benchPut(b *testing.B, s *store.Store, tab *store.Table, key string) {
	expect := int64(0)
	if r := tab.Get(key); r != nil {
		expect = r.Revision
	}
	_, err := s.Txn(context.Background(), store.Op{Table: tab, Key: key, Object: Object("bench", benchContent), Expect: expect})
	if err != nil {
		b.Error(err)
	}
}

func benchTxn(b *testing.B, open OpenDir, class store.Class, writers int) {
	s, tab := benchStore(b, open, class)
	b.ReportAllocs()
	var next atomic.Int64
	var wg sync.WaitGroup
	for w := range writers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for n := next.Add(1); n <= int64(b.N); n = next.Add(1) {
				benchPut(b, s, tab, fmt.Sprintf("%sw%d/k%d", Pods, w, n%100))
			}
		}()
	}
	wg.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "txn/s")
}

func benchFill(b *testing.B, s *store.Store, tab *store.Table, n int) {
	var ops []store.Op
	for i := range n {
		ops = append(ops, store.Op{Table: tab, Key: fmt.Sprintf("%sns/p%05d", Pods, i), Object: Object("p", benchContent)})
		if len(ops) == 1000 || i == n-1 {
			_, err := s.Txn(context.Background(), ops...)
			must(b, err)
			ops = nil
		}
	}
	b.ResetTimer()
}

func benchGet(b *testing.B, open OpenDir) {
	s, tab := benchStore(b, open, store.Lossy)
	benchFill(b, s, tab, 5000)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if tab.Get("/registry/pods/ns/p02500") == nil {
			b.Fatal("absent")
		}
	}
}

func benchAscend(b *testing.B, tab *store.Table) {
	n := 0
	tab.Snapshot().Ascend("", "", func(*store.Record) bool { n++; return true })
	if n < 5000 {
		b.Fatal("only", n)
	}
}

func benchList(b *testing.B, open OpenDir) {
	s, tab := benchStore(b, open, store.Lossy)
	benchFill(b, s, tab, 5000)
	b.ReportAllocs()
	for b.Loop() {
		benchAscend(b, tab)
	}
}

// benchListChanging writes once before each list, so that each needs a new copy-on-write snapshot; the write counts.
func benchListChanging(b *testing.B, open OpenDir) {
	s, tab := benchStore(b, open, store.Lossy)
	benchFill(b, s, tab, 5000)
	for i := 0; b.Loop(); i++ {
		benchPut(b, s, tab, fmt.Sprintf("%sns/p%05d", Pods, i%5000))
		benchAscend(b, tab)
	}
}

// benchFanout measures from the start of a write until all of 1,000 watches have read it.
func benchFanout(b *testing.B, open OpenDir) {
	s, tab := benchStore(b, open, store.Lossy)
	const watchers = 1000
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var running, got sync.WaitGroup
	for range watchers {
		w, err := tab.Watch("", s.Revision())
		must(b, err)
		running.Add(1)
		go func() {
			defer running.Done()
			defer w.Stop()
			for {
				evs, err := w.Next(ctx)
				if err != nil {
					return
				}
				for range evs {
					got.Done()
				}
			}
		}()
	}
	b.ReportAllocs()
	for b.Loop() {
		got.Add(watchers)
		benchPut(b, s, tab, Pods+"a")
		got.Wait()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/watchers, "ns/watcher")
	cancel()
	running.Wait()
}
