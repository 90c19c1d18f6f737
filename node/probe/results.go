package probe

import (
	"sync"

	v1 "k8s.io/api/core/v1"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
	"k8s.io/kubernetes/pkg/kubelet/prober/results"
)

// resultSet holds the last result per container; kuberuntime reads it to decide
// on restarts. Changes are told by Manager, not through Updates. Safe for
// concurrent use.
type resultSet struct {
	mu   sync.RWMutex
	byID map[kubecontainer.ContainerID]results.Result
}

var _ results.Manager = (*resultSet)(nil)

func newResultSet() *resultSet {
	return &resultSet{byID: map[kubecontainer.ContainerID]results.Result{}}
}

// Get returns the result of a container, if there is one.
func (s *resultSet) Get(id kubecontainer.ContainerID) (results.Result, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	r, ok := s.byID[id]
	return r, ok
}

// Set keeps a result.
func (s *resultSet) Set(id kubecontainer.ContainerID, r results.Result, _ *v1.Pod) {
	s.put(id, r)
}

// put keeps a result and reports whether it differs from the one before.
func (s *resultSet) put(id kubecontainer.ContainerID, r results.Result) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	old, ok := s.byID[id]
	s.byID[id] = r
	return !ok || old != r
}

// Remove drops the result of a container.
func (s *resultSet) Remove(id kubecontainer.ContainerID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.byID, id)
}

// Updates is never sent to.
func (s *resultSet) Updates() <-chan results.Update { return nil }
