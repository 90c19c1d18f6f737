package api

import (
	"context"
	"errors"
	"fmt"
	"sync"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/storage"
	storeerr "k8s.io/apiserver/pkg/storage/errors"
	core "k8s.io/kubernetes/pkg/apis/core"
	"k8s.io/kubernetes/pkg/registry/core/rangeallocation"
	"k8s.io/kubernetes/pkg/registry/core/service/allocator"
)

// errExhausted ends an update that found nothing to allocate; it never leaves this file.
var errExhausted = errors.New("nothing left to allocate")

// rangeStore persists one allocation bitmap (the node ports) in a RangeAllocation object, under the key that upstream
// uses. Every change is written before it is given out.
//
// Upstream's own type for this opens an etcd client by itself, which is why it is not used here.
type rangeStore struct {
	key      string
	resource schema.GroupResource
	storage  *Storage

	mu    sync.Mutex
	alloc allocator.Snapshottable // guarded by mu
	last  string                  // guarded by mu: resourceVersion that alloc mirrors
}

var (
	_ allocator.Interface           = (*rangeStore)(nil)
	_ rangeallocation.RangeRegistry = (*rangeStore)(nil)
)

// newRangeStore opens the table of ranges; key is such as "/ranges/servicenodeports".
func (r *Registry) newRangeStore(alloc allocator.Snapshottable, key string, resource schema.GroupResource) (*rangeStore, error) {
	config, err := r.factory.NewConfig(schema.GroupResource{Resource: "services"}, &core.Service{})
	if err != nil {
		return nil, err
	}
	newFunc := func() runtime.Object { return &core.RangeAllocation{} }
	kind, err := r.open(config.ForResource(resource), "/ranges", newFunc(), nil)
	if err != nil {
		return nil, err
	}
	return &rangeStore{key: key, resource: resource, storage: NewStorage(kind, newFunc, nil), alloc: alloc}, nil
}

// update changes the bitmap and writes it, starting over from the stored bitmap where somebody else changed it.
func (s *rangeStore) update(change func() error) error {
	ctx := context.Background()
	out := &core.RangeAllocation{}
	err := s.storage.GuaranteedUpdate(ctx, s.key, out, true, nil, storage.SimpleUpdate(func(in runtime.Object) (runtime.Object, error) {
		existing := in.(*core.RangeAllocation)
		if existing.ResourceVersion == "" {
			return nil, fmt.Errorf("cannot allocate resources of type %s at this time", s.resource)
		}
		if existing.ResourceVersion != s.last {
			if err := s.alloc.Restore(existing.Range, existing.Data); err != nil {
				return nil, err
			}
		}
		if err := change(); err != nil {
			return nil, err
		}
		existing.Range, existing.Data = s.alloc.Snapshot()
		s.last = existing.ResourceVersion
		return existing, nil
	}), nil)
	if errors.Is(err, errExhausted) {
		return err
	}
	return storeerr.InterpretUpdateError(err, s.resource, "")
}

// Allocate implements allocator.Interface.
func (s *rangeStore) Allocate(offset int) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.update(func() error {
		ok, err := s.alloc.Allocate(offset)
		if err == nil && !ok {
			err = errExhausted
		}
		return err
	})
	if errors.Is(err, errExhausted) {
		return false, nil
	}
	return err == nil, err
}

// AllocateNext implements allocator.Interface.
func (s *rangeStore) AllocateNext() (offset int, ok bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	err = s.update(func() error {
		var err error
		if offset, ok, err = s.alloc.AllocateNext(); err == nil && !ok {
			err = errExhausted
		}
		return err
	})
	if errors.Is(err, errExhausted) {
		return offset, false, nil
	}
	return offset, err == nil, err
}

// Release implements allocator.Interface.
func (s *rangeStore) Release(item int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.update(func() error { return s.alloc.Release(item) })
}

// ForEach implements allocator.Interface.
func (s *rangeStore) ForEach(fn func(int)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.alloc.ForEach(fn)
}

// Has implements allocator.Interface.
func (s *rangeStore) Has(item int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.alloc.Has(item)
}

// Free implements allocator.Interface.
func (s *rangeStore) Free() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.alloc.Free()
}

// Destroy implements allocator.Interface.
func (s *rangeStore) Destroy() {}

// Get implements rangeallocation.RangeRegistry: an absent range has no resourceVersion.
func (s *rangeStore) Get() (*core.RangeAllocation, error) {
	out := &core.RangeAllocation{}
	err := s.storage.Get(context.Background(), s.key, storage.GetOptions{IgnoreNotFound: true}, out)
	return out, storeerr.InterpretGetError(err, s.resource, "")
}

// CreateOrUpdate implements rangeallocation.RangeRegistry: the repair controller writes the bitmap it computed.
func (s *rangeStore) CreateOrUpdate(snapshot *core.RangeAllocation) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := &core.RangeAllocation{}
	err := s.storage.GuaranteedUpdate(context.Background(), s.key, out, true, nil, storage.SimpleUpdate(func(in runtime.Object) (runtime.Object, error) {
		existing := in.(*core.RangeAllocation)
		if existing.ResourceVersion != snapshot.ResourceVersion {
			return nil, apierrors.NewConflict(s.resource, "", errors.New("another caller has changed the range"))
		}
		return snapshot, nil
	}), nil)
	if err != nil {
		return storeerr.InterpretUpdateError(err, s.resource, "")
	}
	s.last = out.ResourceVersion
	return s.alloc.Restore(snapshot.Range, snapshot.Data)
}
