package agent

import (
	"k8s.io/apimachinery/pkg/util/version"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/component-base/featuregate"
	ndf "k8s.io/component-helpers/nodedeclaredfeatures"
	ndffeatures "k8s.io/component-helpers/nodedeclaredfeatures/features"
	ndftypes "k8s.io/component-helpers/nodedeclaredfeatures/types"
)

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
	return ndf.New(ndffeatures.AllFeatures).DiscoverNodeFeatures(cfg)
}
