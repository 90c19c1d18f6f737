package etcd_test

import (
	"context"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"knarr/store"
	"knarr/store/etcd"
	"knarr/store/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// requestTimeout is short, so that tests that take etcd away end soon, yet long enough for a busy machine.
const requestTimeout = 4 * time.Second

func open(s *server) (*etcd.Engine, error) {
	return etcd.Open(context.Background(), etcd.Options{Endpoints: []string{s.url}, RequestTimeout: requestTimeout})
}

// harness is one etcd. Its crash is the death of etcd: engines opened before never find it again, later ones do at its new address.
type harness struct{ s *server }

func (h harness) Open() (store.Engine, error) { return open(h.s) }

func (h harness) Crash(storetest.Crash, *rand.Rand) {
	h.s.kill()
	h.s.start(freshAddress())
}

func (harness) Traits() storetest.Traits {
	return storetest.Traits{OneRevision: true, NothingLossy: true, OwnExpiry: true}
}

func TestConformance(t *testing.T) {
	if os.Getenv("KNARR_ROUNDS") == "" {
		t.Setenv("KNARR_ROUNDS", "5") // each crash waits for clients to give up
	}
	storetest.Run(t, func(t testing.TB) storetest.Harness { return harness{newServer(t, "-no-fsync")} })
}

// openStore opens a store with a table of pods.
func openStore(t testing.TB, s *server) (*store.Store, *store.Table) {
	t.Helper()
	engine, err := open(s)
	require.NoError(t, err)
	return openOn(t, engine)
}

func openOn(t testing.TB, engine *etcd.Engine) (*store.Store, *store.Table) {
	t.Helper()
	st, err := store.Open(t.Context(), store.Options{Engine: engine, Debug: true})
	if err != nil {
		engine.Close()
	}
	require.NoError(t, err)
	t.Cleanup(func() { st.Close() })
	tab, err := st.OpenTable(t.Context(), store.TableOptions{Prefix: storetest.Pods, Codec: storetest.Codec{}})
	require.NoError(t, err)
	return st, tab
}

func BenchmarkEngine(b *testing.B) {
	storetest.Bench(b, func(string) (store.Engine, error) { return open(newServer(b)) })
}
