package pebble_test

import (
	"context"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.uber.org/goleak"

	"knarr/store"
	"knarr/store/pebble"
	"knarr/store/storetest"
)

func TestMain(m *testing.M) {
	storetest.Child(openDir)
	if os.Getenv(closeFullRole) != "" {
		os.Exit(m.Run()) // leaves goroutines by design
	}
	goleak.VerifyTestMain(m)
}

func openDir(dir string) (store.Engine, error) {
	return pebble.Open(context.Background(), pebble.Options{Dir: dir})
}

// memory is storage in a crashable file system.
type memory struct{ fs *vfs.MemFS }

func newMemory(testing.TB) storetest.Harness { return &memory{vfs.NewCrashableMem()} }

func (m *memory) Open() (store.Engine, error) {
	return pebble.Open(context.Background(), pebble.Options{Dir: "/db", FS: m.fs})
}

func (m *memory) Crash(how storetest.Crash, rng *rand.Rand) {
	keep := 100
	if how == storetest.PowerLoss {
		keep = []int{0, 50, 90}[rng.IntN(3)]
	}
	m.fs = m.fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: keep, RNG: rng})
}

func TestConformance(t *testing.T) { storetest.Run(t, newMemory) }

func TestKill(t *testing.T) { storetest.RunKill(t, openDir) }

func BenchmarkEngine(b *testing.B) { storetest.Bench(b, openDir) }
