package client

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"
)

// picture is a handler that keeps what it is told, as a controller's cache would.
type picture struct {
	mu      sync.Mutex
	objects map[string]string // revision by name
}

func (p *picture) set(obj any) {
	m := obj.(metav1.Object)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.objects[m.GetName()] = m.GetResourceVersion()
}

func (p *picture) OnAdd(obj any, _ bool) { p.set(obj) }
func (p *picture) OnUpdate(_, obj any)   { p.set(obj) }

func (p *picture) OnDelete(obj any) {
	if d, ok := obj.(cache.DeletedFinalStateUnknown); ok {
		obj = d.Obj
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.objects, obj.(metav1.Object).GetName())
}

func (p *picture) seen() map[string]string {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := map[string]string{}
	for k, v := range p.objects {
		out[k] = v
	}
	return out
}

// Whenever handlers come and go, and however far they fall behind, those that stay know in the end what the store holds: informers that are started
// while others write, as the controllers of a server that becomes the leader are.
func TestHandlersComeAndGoWhileOthersWrite(t *testing.T) {
	const rounds, writers = 20, 3
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	w := newWorld(t, 16)
	for round := range rounds {
		f := NewFactory(Options{Tables: w})
		var work sync.WaitGroup
		for n := range writers {
			r := rand.New(rand.NewPCG(seed, uint64(round*writers+n)))
			work.Go(func() {
				for range 40 {
					p := pod("n", fmt.Sprintf("w%d-%d", n, r.IntN(6)), "Running")
					if t := w.table(p); r.IntN(3) == 0 && t.Get(keyOf(t, p)) != nil {
						w.remove(p)
					} else {
						w.put(p)
					}
				}
			})
		}
		var stay []*picture
		ctx := t.Context()
		r := rand.New(rand.NewPCG(seed, uint64(round)<<32))
		for range 8 {
			p := &picture{objects: map[string]string{}}
			i := f.Core().V1().Pods().Informer()
			handle, err := i.AddEventHandler(p)
			require.NoError(t, err)
			f.StartWithContext(ctx)
			if r.IntN(2) == 0 {
				work.Go(func() { _ = i.RemoveEventHandler(handle) })
				continue
			}
			stay = append(stay, p)
		}
		work.Wait()
		want := map[string]string{}
		for _, obj := range f.Core().V1().Pods().Informer().GetStore().List() {
			m := obj.(metav1.Object)
			want[m.GetName()] = m.GetResourceVersion()
		}
		for n, p := range stay {
			require.Eventually(t, func() bool { return fmt.Sprint(p.seen()) == fmt.Sprint(want) }, testTimeout, time.Millisecond,
				"round %d, handler %d: has %v, the store %v", round, n, p.seen(), want)
		}
	}
}
