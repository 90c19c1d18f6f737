package network

import (
	discovery "k8s.io/api/discovery/v1"
	"k8s.io/client-go/tools/cache"
)

// SlicesByService is the name of an index of EndpointSlices: from "namespace/service" to the slices of the service.
const SlicesByService = "knarr.network/service"

// AddSlicesByService adds the index where it is missing. Call it before the informer starts; constructors of one factory run one after the other.
func AddSlicesByService(inf cache.SharedIndexInformer) error {
	return AddIndex(inf, SlicesByService, func(o any) ([]string, error) {
		s, ok := o.(*discovery.EndpointSlice)
		if !ok || s.Labels[discovery.LabelServiceName] == "" {
			return nil, nil
		}
		return []string{s.Namespace + "/" + s.Labels[discovery.LabelServiceName]}, nil
	})
}

// AddIndex adds an index where no index of that name exists.
func AddIndex(inf cache.SharedIndexInformer, name string, fn cache.IndexFunc) error {
	if _, ok := inf.GetIndexer().GetIndexers()[name]; ok {
		return nil
	}
	return inf.AddIndexers(cache.Indexers{name: fn})
}
