package agent

import (
	"slices"

	"k8s.io/apimachinery/pkg/util/version"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/component-base/featuregate"
	ndf "k8s.io/component-helpers/nodedeclaredfeatures"
	ndffeatures "k8s.io/component-helpers/nodedeclaredfeatures/features"
	ndftypes "k8s.io/component-helpers/nodedeclaredfeatures/types"
)

// translatesWebSocketV5 is the feature of nodes that speak version 5 of the
// WebSocket protocol for streams. This one leaves it to the API server, which
// talks SPDY to nodes without it.
const translatesWebSocketV5 = "ExtendWebSocketsToKubelet"

// gates adapts the feature gates of the process to upstream's discovery.
type gates struct{}

func (gates) Enabled(name string) bool {
	return utilfeature.DefaultFeatureGate.Enabled(featuregate.Feature(name))
}

// declaredFeatures lists the features of the node that pods may depend on.
func (a *Agent) declaredFeatures() []string {
	cfg := &ndftypes.NodeConfiguration{FeatureGates: gates{}, Version: version.MustParseSemantic(Version)}
	if a.features != nil {
		cfg.RuntimeFeatures.UserNamespacesHostNetwork = a.features.UserNamespacesHostNetwork
	}
	return slices.DeleteFunc(ndf.New(ndffeatures.AllFeatures).DiscoverNodeFeatures(cfg), func(f string) bool { return f == translatesWebSocketV5 })
}
