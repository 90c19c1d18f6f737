package apiserver

import (
	"maps"
	"sync/atomic"

	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/component-base/featuregate"
)

// gates answers whether a feature of upstream's is on, which its validation asks a hundred times for a pod, from one table: nothing in this program
// switches a feature once the packages are initialized. Upstream's own works the answer out each time, from versions.
type gates struct {
	featuregate.FeatureGate
	answers atomic.Pointer[map[featuregate.Feature]bool]
}

// Enabled implements featuregate.FeatureGate.
func (g *gates) Enabled(f featuregate.Feature) bool {
	if on, ok := (*g.answers.Load())[f]; ok {
		return on
	}
	on := g.FeatureGate.Enabled(f)
	for {
		known := g.answers.Load()
		more := maps.Clone(*known)
		more[f] = on
		if g.answers.CompareAndSwap(known, &more) {
			return on
		}
	}
}

func newGates(of featuregate.FeatureGate) *gates {
	g := &gates{FeatureGate: of}
	g.answers.Store(&map[featuregate.Feature]bool{})
	return g
}

func init() { utilfeature.DefaultFeatureGate = newGates(utilfeature.DefaultFeatureGate) }
