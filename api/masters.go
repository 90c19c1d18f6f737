package api

import (
	"context"
	"time"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/apiserver/pkg/storage"
	core "k8s.io/kubernetes/pkg/apis/core"
	"k8s.io/kubernetes/pkg/controlplane/reconcilers"
)

// masterLeases remembers which servers of a store live: under upstream's key, one object for each address, which goes by itself when
// it is not renewed.
//
// Upstream's own type for this opens an etcd client by itself, which is why it is not used here.
type masterLeases struct {
	storage *Storage
	ttl     uint64 // seconds
}

// mastersKey is upstream's.
const mastersKey = "/masterleases"

// MasterLeases gives upstream's reconcilers the addresses of the servers that live; one is forgotten ttl after its last renewal.
func (r *Registry) MasterLeases(ttl time.Duration) (reconcilers.Leases, error) {
	resource := schema.GroupResource{Resource: "apiServerIPInfo"}
	config, err := r.factory.NewConfig(resource, &core.Endpoints{})
	if err != nil {
		return nil, err
	}
	newFunc := func() runtime.Object { return &core.Endpoints{} }
	kind, err := r.openAlone(config.ForResource(resource), mastersKey, newFunc(), nil)
	if err != nil {
		return nil, err
	}
	s := NewStorage(kind, newFunc, func() runtime.Object { return &core.EndpointsList{} })
	return &masterLeases{storage: s, ttl: uint64(ttl / time.Second)}, nil
}

// Servers lists the addresses of the servers that live and share the store.
func (r *Registry) Servers() ([]string, error) {
	m, err := r.MasterLeases(time.Second) // only renewals have a time to live
	if err != nil {
		return nil, err
	}
	return m.ListLeases()
}

// ListLeases implements reconcilers.Leases.
func (m *masterLeases) ListLeases() ([]string, error) {
	list := &core.EndpointsList{}
	if err := m.storage.GetList(context.Background(), mastersKey, storage.ListOptions{Recursive: true, Predicate: storage.Everything}, list); err != nil {
		return nil, err
	}
	var out []string
	for i := range list.Items {
		if s := list.Items[i].Subsets; len(s) > 0 && len(s[0].Addresses) > 0 {
			out = append(out, s[0].Addresses[0].IP)
		}
	}
	return out, nil
}

// UpdateLease implements reconcilers.Leases.
func (m *masterLeases) UpdateLease(ip string) error {
	return m.storage.GuaranteedUpdate(context.Background(), mastersKey+"/"+ip, &core.Endpoints{}, true, nil,
		func(in runtime.Object, _ storage.ResponseMeta) (runtime.Object, *uint64, error) {
			e := in.(*core.Endpoints)
			e.Subsets = []core.EndpointSubset{{Addresses: []core.EndpointAddress{{IP: ip}}}}
			e.Generation++ // a change, so that it is written and lives anew
			return e, &m.ttl, nil
		}, nil)
}

// RemoveLease implements reconcilers.Leases.
func (m *masterLeases) RemoveLease(ip string) error {
	return m.storage.Delete(context.Background(), mastersKey+"/"+ip, &core.Endpoints{}, nil, rest.ValidateAllObjectFunc, nil, storage.DeleteOptions{})
}

// Destroy implements reconcilers.Leases.
func (m *masterLeases) Destroy() {}
