// Package objects gives the agent the ConfigMaps and Secrets that its pods
// refer to, and service account tokens.
//
// A watch is held for exactly the objects that some pod of the node refers to,
// counted by reference: one list/watch per object name, which is what the node
// authorizer allows. Readers wait for the first answer once and read memory
// afterwards; whoever refers to an object is told when it changes.
package objects

import (
	"context"
	"fmt"
	"reflect"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
)

// firstAnswer bounds how long a reader waits for the first list of an object.
const firstAnswer = 5 * time.Second

// kind is a kind of object that pods refer to.
type kind string

const (
	configMaps kind = "configmaps"
	secrets    kind = "secrets"
)

// key names one object.
type key struct {
	kind            kind
	namespace, name string
}

// Store holds the referenced objects. Create it with New. Safe for concurrent use.
type Store struct {
	client  kubernetes.Interface
	changed func(uid types.UID)

	mu      sync.Mutex
	ctx     context.Context
	entries map[key]*entry
	pods    map[types.UID]map[key]struct{}
	wg      sync.WaitGroup
}

type entry struct {
	refs   map[types.UID]struct{}
	cancel context.CancelFunc

	once   sync.Once
	synced chan struct{} // closed after the first list

	mu  sync.Mutex
	obj runtime.Object // nil: does not exist
}

// New returns a Store that watches until ctx ends. changed is called, from the
// watch's goroutine, for each pod that refers to an object that changed after
// it was first read; it must not block.
func New(ctx context.Context, client kubernetes.Interface, changed func(uid types.UID)) *Store {
	return &Store{client: client, changed: changed, ctx: ctx,
		entries: map[key]*entry{}, pods: map[types.UID]map[key]struct{}{}}
}

// Wait returns when all watches have ended; call it after the context ended.
func (s *Store) Wait() { s.wg.Wait() }

// Register holds watches on everything that pod refers to, until Unregister.
// Calling it again adapts to a changed pod.
func (s *Store) Register(pod *v1.Pod) {
	want := map[key]struct{}{}
	podutil.VisitPodSecretNames(pod, func(name string) bool {
		want[key{secrets, pod.Namespace, name}] = struct{}{}
		return true
	})
	podutil.VisitPodConfigmapNames(pod, func(name string) bool {
		want[key{configMaps, pod.Namespace, name}] = struct{}{}
		return true
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	have := s.pods[pod.UID]
	for k := range want {
		if _, ok := have[k]; !ok {
			s.acquireLocked(k, pod.UID)
		}
	}
	for k := range have {
		if _, ok := want[k]; !ok {
			s.releaseLocked(k, pod.UID)
		}
	}
	s.pods[pod.UID] = want
}

// Unregister gives up the watches of a pod.
func (s *Store) Unregister(uid types.UID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k := range s.pods[uid] {
		s.releaseLocked(k, uid)
	}
	delete(s.pods, uid)
}

func (s *Store) acquireLocked(k key, uid types.UID) {
	e := s.entries[k]
	if e == nil {
		ctx, cancel := context.WithCancel(s.ctx)
		e = &entry{refs: map[types.UID]struct{}{}, cancel: cancel, synced: make(chan struct{})}
		s.entries[k] = e
		s.wg.Go(func() { s.watch(ctx, k, e) })
	}
	e.refs[uid] = struct{}{}
}

func (s *Store) releaseLocked(k key, uid types.UID) {
	e := s.entries[k]
	if e == nil {
		return
	}
	delete(e.refs, uid)
	if len(e.refs) == 0 {
		e.cancel()
		delete(s.entries, k)
	}
}

// ConfigMap returns a referenced ConfigMap; it must not be modified. The error
// is NotFound when the object does not exist.
func (s *Store) ConfigMap(namespace, name string) (*v1.ConfigMap, error) {
	obj, err := s.get(key{configMaps, namespace, name})
	if err != nil {
		return nil, err
	}
	return obj.(*v1.ConfigMap), nil
}

// Secret returns a referenced Secret; it must not be modified. The error is
// NotFound when the object does not exist.
func (s *Store) Secret(namespace, name string) (*v1.Secret, error) {
	obj, err := s.get(key{secrets, namespace, name})
	if err != nil {
		return nil, err
	}
	return obj.(*v1.Secret), nil
}

func (s *Store) get(k key) (runtime.Object, error) {
	s.mu.Lock()
	e := s.entries[k]
	s.mu.Unlock()
	if e == nil {
		return nil, fmt.Errorf("object %q/%q not registered", k.namespace, k.name)
	}
	select {
	case <-e.synced:
	default:
		t := time.NewTimer(firstAnswer)
		defer t.Stop()
		select {
		case <-e.synced:
		case <-s.ctx.Done():
			return nil, s.ctx.Err()
		case <-t.C:
			return nil, fmt.Errorf("failed to sync %s cache: timed out waiting for the condition", k.kind)
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.obj == nil {
		return nil, apierrors.NewNotFound(v1.Resource(string(k.kind)), k.name)
	}
	return e.obj, nil
}

// watch follows one object until ctx ends.
func (s *Store) watch(ctx context.Context, k key, e *entry) {
	lw, expected := s.listWatch(ctx, k)
	r := cache.NewReflectorWithOptions(lw, expected, &sink{store: s, key: k, entry: e}, cache.ReflectorOptions{
		Name: fmt.Sprintf("object-%s/%s/%s", k.kind, k.namespace, k.name),
	})
	r.RunWithContext(ctx)
}

func (s *Store) listWatch(ctx context.Context, k key) (cache.ListerWatcher, runtime.Object) {
	selector := fields.OneTermEqualSelector("metadata.name", k.name).String()
	core := s.client.CoreV1()
	lw := &cache.ListWatch{}
	var expected runtime.Object
	switch k.kind {
	case configMaps:
		expected = &v1.ConfigMap{}
		lw.ListWithContextFunc = func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector = selector
			return core.ConfigMaps(k.namespace).List(ctx, o)
		}
		lw.WatchFuncWithContext = func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = selector
			return core.ConfigMaps(k.namespace).Watch(ctx, o)
		}
	default:
		expected = &v1.Secret{}
		lw.ListWithContextFunc = func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector = selector
			return core.Secrets(k.namespace).List(ctx, o)
		}
		lw.WatchFuncWithContext = func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = selector
			return core.Secrets(k.namespace).Watch(ctx, o)
		}
	}
	return cache.ToListWatcherWithWatchListSemantics(lw, s.client), expected
}

// sink receives what the reflector of one object sees.
type sink struct {
	store *Store
	key   key
	entry *entry
}

var _ cache.ReflectorStore = (*sink)(nil)

func (k *sink) set(obj runtime.Object) {
	e := k.entry
	e.mu.Lock()
	before := e.obj
	e.obj = obj
	e.mu.Unlock()
	first := false
	e.once.Do(func() { first = true; close(e.synced) })
	if first || !contentChanged(before, obj) {
		return
	}
	k.store.mu.Lock()
	uids := make([]types.UID, 0, len(e.refs))
	for uid := range e.refs {
		uids = append(uids, uid)
	}
	k.store.mu.Unlock()
	for _, uid := range uids {
		k.store.changed(uid)
	}
}

// contentChanged reports whether the data of an object differ; metadata alone
// wakes nobody.
func contentChanged(a, b runtime.Object) bool {
	if (a == nil) != (b == nil) {
		return true
	}
	switch x := a.(type) {
	case *v1.ConfigMap:
		y := b.(*v1.ConfigMap)
		return x.UID != y.UID || !reflect.DeepEqual(x.Data, y.Data) || !reflect.DeepEqual(x.BinaryData, y.BinaryData)
	case *v1.Secret:
		y := b.(*v1.Secret)
		return x.UID != y.UID || !reflect.DeepEqual(x.Data, y.Data)
	}
	return false
}

func (k *sink) named(obj any) bool {
	m, err := meta.Accessor(obj)
	return err == nil && m.GetName() == k.key.name
}

// Add is called for a new object.
func (k *sink) Add(obj any) error { return k.Update(obj) }

// Update is called for a changed object. A server that ignores field selectors
// (client-go's fake) sends others too.
func (k *sink) Update(obj any) error {
	if k.named(obj) {
		k.set(obj.(runtime.Object))
	}
	return nil
}

// Delete is called for a deleted object.
func (k *sink) Delete(obj any) error {
	if k.named(obj) {
		k.set(nil)
	}
	return nil
}

// Replace is called with the result of a list.
func (k *sink) Replace(list []any, _ string) error {
	for _, obj := range list {
		if k.named(obj) {
			k.set(obj.(runtime.Object))
			return nil
		}
	}
	k.set(nil)
	return nil
}

// Resync is never asked for.
func (k *sink) Resync() error { return nil }
